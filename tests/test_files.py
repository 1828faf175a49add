import errno
import os
import subprocess
import sys

import pytest

from scantly.errors import ConfigError, RunError
from scantly.files import (
    atomic_path,
    digest,
    name_too_long,
    read_json,
    read_yaml,
    sole_writer,
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


HOLD = """
import sys, time
from pathlib import Path
from scantly.files import sole_writer
with sole_writer(Path(sys.argv[1]), "predicting"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    """A process that holds a folder; gives it once it does."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_while_the_first_lives_and_a_kill_frees_the_folder(tmp_path):
    folder = tmp_path / "out"
    with hold(folder) as process:
        refused = pytest.raises(RunError, match=r"another process is predicting in .*out; wait for it or choose")
        with refused, sole_writer(folder, "predicting"):
            raise AssertionError("two writers")
        process.kill()
    with sole_writer(folder, "predicting"):
        (folder / "a").write_text("1")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_folder_that_stays_empty_is_not_left_behind(tmp_path):
    with sole_writer(tmp_path / "deep" / "out", "predicting"):
        assert (tmp_path / "deep" / "out").is_dir()
    assert not (tmp_path / "deep" / "out").exists()
    (tmp_path / "own").mkdir()
    with sole_writer(tmp_path / "own", "predicting"):
        pass
    assert list((tmp_path / "own").iterdir()) == []


def test_a_folder_that_cannot_be_held_is_told(tmp_path):
    (tmp_path / "file").write_text("no folder")
    refused = pytest.raises(RunError, match=r"cannot write in .*file/out: Not a directory; choose another folder")
    with refused, sole_writer(tmp_path / "file" / "out", "predicting"):
        raise AssertionError("written through a file")


@pytest.mark.parametrize("letter", ["a", "ä"])
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, letter):
    name = letter * (248 // len(letter.encode())) + ".nii.gz"
    with atomic_path(tmp_path / name) as temporary:
        assert temporary.name.endswith(f"{letter}.nii.gz")
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(RunError, match="File name too long"):
        write_text(tmp_path / ("a" + name), "1")


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
