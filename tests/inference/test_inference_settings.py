import pytest

from scantly.errors import ConfigError
from scantly.inference.settings import InferenceSettings
from scantly.settings import parse

LITERATURE = InferenceSettings(window="uniform", stride=(4, 18, 18), largest_component=True)


def test_a_new_window_leaves_the_protocols_distances_behind():
    gaussian = LITERATURE.overridden({"window": "gaussian"})
    assert (gaussian.window, gaussian.stride, gaussian.largest_component) == ("gaussian", None, True)
    assert LITERATURE.overridden({"window": "whole"}).stride is None
    assert LITERATURE.overridden({"window": "gaussian", "stride": [8, 8, 8]}).stride == (8, 8, 8)


def test_other_settings_replace_themselves_only():
    assert LITERATURE.overridden({}) == LITERATURE
    assert LITERATURE.overridden({"stride": [9, 9, 9]}) == LITERATURE.model_copy(update={"stride": (9, 9, 9)})
    wider = LITERATURE.overridden({"overlap": 0.75})
    assert (wider.window, wider.overlap, wider.stride) == ("uniform", 0.75, None)
    flipped = LITERATURE.overridden({"flips": True, "largest_component": False})
    assert (flipped.flips, flipped.largest_component, flipped.stride) == (True, False, (4, 18, 18))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlap": 0.5, "stride": [8, 8]}, "overlap and stride both"),
        ({"windows": "whole"}, "unknown setting 'inference.windows'; did you mean 'inference.window'"),
        ({"window": "round"}, "inference.window"),
        ({"overlap": 1.0}, "inference.overlap"),
        ({"stride": [8]}, "two .* or three .* positive numbers"),
        ({"stride": [8, 0]}, "positive"),
        ({"batch": 0}, "inference.batch"),
        ({"window": "whole", "patch_size": [8, 8]}, "without windows"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        InferenceSettings().overridden(values)


def test_plain_data_comes_back_and_says_nothing_of_the_machine():
    values = LITERATURE.model_copy(update={"batch": 3}).to_dict()
    assert "batch" not in values
    assert parse(InferenceSettings, values, where="") == LITERATURE
