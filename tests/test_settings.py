import pytest
from pydantic import Field

from scantly.errors import ConfigError
from scantly.settings import Settings, merge, parse


class Inner(Settings):
    width: int = Field(3, ge=1)


class Outer(Settings):
    inner: Inner = Inner()
    rate: float = 0.5


def test_defaults_and_values():
    assert parse(Outer, {"inner": {"width": 4}}, where="") == Outer(inner=Inner(width=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratte": 1}, "unknown setting 's.ratte'; did you mean 's.rate'"),
        ({"inner": {"widht": 1}}, "unknown setting 's.inner.widht'; did you mean 's.inner.width'"),
        ({"inner": {"width": 0}}, "setting 's.inner.width' is 0: input should be greater"),
        ({"rate": "fast"}, "setting 's.rate' is 'fast'"),
        ({"rate": float("nan")}, "setting 's.rate' is nan"),
    ],
)
def test_faults_name_key_value_and_cure(values, message):
    with pytest.raises(ConfigError) as caught:
        parse(Outer, values, where="s")
    assert message in str(caught.value)


def test_all_faults_come_together():
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"rate": "x", "inner": {"width": 0}}, where="")
    assert len(str(caught.value).splitlines()) == 2


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        Outer().rate = 1.0


def test_merge_replaces_scalars_and_lists_and_descends_into_mappings():
    assert merge({"a": {"x": 1, "y": [1]}, "b": 1}, {"a": {"y": [2, 3]}, "b": {"z": 1}}) == {
        "a": {"x": 1, "y": [2, 3]},
        "b": {"z": 1},
    }


def test_merge_copies():
    first = {"a": {"x": 1}}
    merged = merge(first)
    merged["a"]["x"] = 2
    assert first == {"a": {"x": 1}}
