import json
import subprocess
import sys

import pytest

from scantly.errors import ConfigError
from scantly.methods import catalogue


def test_names_are_unique_and_every_entry_loads():
    names = [entry.name for entry in catalogue.CATALOGUE]
    assert len(names) == len(set(names))
    for name in names:
        assert catalogue.load(name).__doc__


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mean_teacher'"):
        catalogue.load("mean_techer")


def test_reading_the_catalogue_imports_no_torch():
    code = "import sys; from scantly.methods.catalogue import methods; methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_is_described():
    for name in catalogue.methods():
        settings = catalogue.describe(name)["settings"]
        assert all(field["description"] for field in settings.values()), name


def test_descriptions_are_plain_data():
    for name in catalogue.methods():
        described = catalogue.describe(name)
        assert json.loads(json.dumps(described)) == described, name


def test_settings_within_settings_are_told_one_by_one():
    settings = catalogue.describe("gapmatch")["settings"]
    assert settings["cutmix.probability"]["default"] == 0.5
    assert settings["cutmix.area"]["default"] == [0.02, 0.4]
    assert settings["strong"]["default"] is None
    assert "cutmix" not in settings
    assert catalogue.describe("plgcl")["settings"]["strong.p_noise"]["default"] == 0.5  # PLGCL's, not StrongConfig's


@pytest.mark.parametrize("name", [entry.name for entry in catalogue.CATALOGUE])
def test_the_defaults_that_are_told_are_those_that_hold(name):
    plain = catalogue.load(name).Config().model_dump(mode="json")
    for key, told in catalogue.describe(name)["settings"].items():
        value = plain
        for part in key.split("."):
            value = value[part]
        assert told["default"] == value, key


def test_description_states_defaults():
    settings = catalogue.describe("mean_teacher")["settings"]
    assert settings["ema_decay"]["default"] == 0.99
    assert settings["predict_with"]["type"] == "teacher | student"
