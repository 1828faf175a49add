import errno
import os

import pytest

from scantly.errors import ConfigError, RunError
from scantly.files import (
    atomic_path,
    digest,
    name_too_long,
    read_json,
    read_yaml,
    temporary_name,
    write_json,
    write_text,
    write_yaml,
)


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "earlier")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_told_and_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "earlier")

    def fill():
        with atomic_path(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"a\.txt: No space left on device"):
        fill()
    assert path.read_text() == "earlier"


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match=r"cannot write .*file/a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "1")


def test_permissions_of_the_earlier_file_are_kept(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "1")
    path.chmod(0o640)
    write_text(path, "2")
    assert path.stat().st_mode & 0o777 == 0o640


def test_json_and_yaml_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"ü": "x"}}
    write_json(tmp_path / "v.json", value)
    write_yaml(tmp_path / "v.yaml", value)
    assert read_json(tmp_path / "v.json") == read_yaml(tmp_path / "v.yaml") == value


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "v.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[1, 2]", "a: [1", "!!python/object/apply:os.system ['true']"])
def test_yaml_that_is_no_plain_mapping_is_refused(tmp_path, text):
    path = tmp_path / "v.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"v\.yaml"):
        read_yaml(path)


def test_missing_files_are_named(tmp_path):
    for read in (read_json, read_yaml):
        with pytest.raises(ConfigError, match=r"nothing\.x does not exist"):
            read(tmp_path / "nothing.x")


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


LONG = ["a" * 244, "a" * 248 + ".nii.gz", "é" * 124 + ".nii.gz", "界" * 82 + ".nii.gz", "a" * 255]


@pytest.mark.parametrize("name", LONG, ids=lambda name: f"{name[0]}-{len(os.fsencode(name))}")
def test_every_name_that_the_file_system_takes_is_written(tmp_path, name):
    path = tmp_path / name
    with atomic_path(path) as temporary:
        assert len(os.fsencode(temporary.name)) <= 255
        assert temporary.suffixes == path.suffixes and temporary.name.startswith(".tmp-")
        temporary.write_text("whole")
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [(name, "whole")]
    assert name_too_long(path) is None
    assert len(os.fsencode(temporary_name(name))) <= 255


def test_a_name_too_long_is_told_with_its_cure(tmp_path):
    path = tmp_path / ("ä" * 128)
    with pytest.raises(RunError, match=r"File name too long; choose a shorter name\. What was there before is unch"):
        write_text(path, "1")
    assert name_too_long(path) == f"{path} would have a name of 256 bytes, 255 are possible"
    assert name_too_long(tmp_path / "not" / "there" / ("ä" * 128))
    assert list(tmp_path.iterdir()) == []
