"""Text files as people and Windows write them: read where their meaning is sure, else refused in one sentence."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scantly.benchmark.spec import read_spec
from scantly.data.dataset import Dataset
from scantly.data.layout import describe
from scantly.data.plan import Plan
from scantly.data.splitfile import read_split_file
from scantly.errors import ScantlyError
from scantly.evaluation import load_table
from scantly.files import read_json, read_yaml
from scantly.inference.journal import Journal
from scantly.training.recipes import read_recipe
from scantly.training.resolve import parse_sets, resolve
from scantly.training.run import Run

JSON = '{\r\n  "name": "Schädel",\r\n  "list": [1, 2]\r\n}\r\n'
YAML = "name: Schädel\r\nlist:\r\n- 1\r\n- 2\r\n"
VALUE = {"name": "Schädel", "list": [1, 2]}
READERS: list[tuple[str, Callable[[Path], Any]]] = [("json", read_json), ("yaml", read_yaml)]


def sentence(read: Callable[[Path], Any], path: Path, content: bytes | str) -> str:
    """What is said of a file; always one line that begins with the file."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ScantlyError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith(".") and "\n" not in message
    return message.removeprefix(str(path))


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path, kind: str, read: Any, mark: bytes) -> None:
    path = tmp_path / f"file.{kind}"
    path.write_bytes(mark + (JSON if kind == "json" else YAML).encode())
    assert read(path) == VALUE


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_told_with_its_cure(tmp_path: Path, kind: str, read: Any, coding: str) -> None:
    said = sentence(read, tmp_path / f"file.{kind}", (JSON if kind == "json" else YAML).encode(coding))
    assert said == f" is saved as {coding[:6].upper()}; save it as UTF-8."


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize("coding", ["latin-1", "cp1252", "mac-roman"])
def test_another_coding_is_told_with_its_line_and_cure(tmp_path: Path, kind: str, read: Any, coding: str) -> None:
    text = JSON if kind == "json" else "# first\n" + YAML
    said = sentence(read, tmp_path / f"file.{kind}", text.encode(coding))
    assert said == " is not saved as UTF-8 (line 2 holds other bytes, as of Latin-1 or Windows-1252); save it as UTF-8."


@pytest.mark.parametrize(("kind", "read"), READERS)
@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", codecs.BOM_UTF8])
def test_an_empty_file_is_called_empty(tmp_path: Path, kind: str, read: Any, content: bytes) -> None:
    assert " is empty; " in sentence(read, tmp_path / f"file.{kind}", content.replace(b"\t", b" "))


def test_yaml_of_comments_alone_is_called_empty(tmp_path: Path) -> None:
    assert " is empty; write 'section: ...' lines." in sentence(read_yaml, tmp_path / "file.yaml", "# nothing\n---\n")


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_bytes_that_are_no_text_are_told(tmp_path: Path, kind: str, read: Any) -> None:
    assert " is no text file" in sentence(read, tmp_path / f"file.{kind}", bytes(range(32)) * 4)


@pytest.mark.parametrize(("kind", "read"), READERS)
def test_a_folder_and_a_missing_file_are_told(tmp_path: Path, kind: str, read: Any) -> None:
    with pytest.raises(ScantlyError, match=r"is a folder; give the file"):
        read(tmp_path)
    with pytest.raises(ScantlyError, match=r"gone does not exist\.$"):
        read(tmp_path / "gone")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{\n  "a": 1,\n  "b": 2,\n}', "line 3: the comma before the closing '}' is one too many"),
        ('{"a": [\n1,\n\n2, ]}', "line 4: the comma before the closing ']' is one too many"),
        ('{"a": 1\n "b": 2}', "line 2, column 2: expecting ',' delimiter"),
        ("{'a': 1}", "line 1, column 2: expecting property name enclosed in double quotes"),
        ('{"a": 1 // one\n}', "line 1, column 9: expecting ',' delimiter"),
        ('{"a": 1}\n{"b": 2}', "line 2, column 1: extra data"),
        ('{"a": "C:\\data"}', "line 1, column 10: "),
        ('{"a": {\n"b": 1', "line 2, column 7: expecting ',' delimiter"),
    ],
)
def test_json_that_is_not_well_formed_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert sentence(read_json, tmp_path / "a.json", text).startswith(f" is not valid JSON ({said}")


def test_values_that_python_alone_would_take_or_choke_on_are_refused(tmp_path: Path) -> None:
    assert "is not valid JSON (NaN is no JSON number)" in sentence(read_json, tmp_path / "a.json", '{"a": NaN}')
    assert "is not valid JSON (" in sentence(read_json, tmp_path / "a.json", '{"a": ' + "9" * 5000 + "}")
    assert "nested too deeply" in sentence(read_json, tmp_path / "a.json", '{"a": ' + "[" * 200_000)
    assert "nested too deeply" in sentence(read_yaml, tmp_path / "a.yaml", "a: " + "[" * 20_000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1, 2\n", "is not valid YAML (line 3: "),
        ("a: 1\n\tb: 2\n", "is not valid YAML (line 2: "),
        ("a: 1\nb: 2001-13-45\n", "is not valid YAML ("),
        ("a: 1\n--- \nb: 2\n", "is not valid YAML (line 2: "),
        ("a: \x07\n", "is not valid YAML ("),
        ("a: !!python/name:os.system\n", "is not valid YAML (line 1: "),
        ("? [1, 2]\n: 3\n", "is not valid YAML (line 1: "),
    ],
)
def test_yaml_that_is_not_well_formed_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in sentence(read_yaml, tmp_path / "a.yaml", text)


def test_a_key_given_twice_is_refused_with_its_name(tmp_path: Path) -> None:
    twice = '{"labels": {"background": 0, "heart": 1, "heart": 2}}'
    assert " has the key 'heart' twice in one object; keep one." in sentence(read_json, tmp_path / "a.json", twice)
    said = sentence(read_yaml, tmp_path / "a.yaml", "training:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    assert said == " has the key 'steps' twice (lines 2 and 4); keep one."
    with pytest.raises(ScantlyError, match=r"--set method: .* has the key 'a' twice"):
        parse_sets(["method={a: 1, a: 2}"])


def test_yaml_anchors_may_be_merged_and_their_keys_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("base: &base\n  a: 1\n  b: 2\nown:\n  <<: *base\n  b: 3\n")
    assert read_yaml(path)["own"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(("text", "what"), [("[1, 2]", "a list"), ('"a"', "text"), ("7", "a number"), ("null", "null")])
def test_another_thing_than_an_object_is_named(tmp_path: Path, text: str, what: str) -> None:
    assert f" holds {what}, not an object" in sentence(read_json, tmp_path / "a.json", text)
    said = sentence(read_yaml, tmp_path / "a.yaml", text)
    assert said == (
        " is empty; write 'section: ...' lines."
        if what == "null"
        else f" holds {what}, not settings; write 'section: ...' lines."
    )


#: Every text file that a user may write or open, by the function that reads it.
PLACES: list[tuple[str, str, Callable[[Path], Any]]] = [
    ("dataset.json", "json", lambda path: Dataset.open(path.parent)),
    ("splits.json", "json", lambda path: read_split_file(path.parent)),
    ("environment.json", "json", lambda path: Run(path.parent).environment),
    ("evaluation/val.json", "json", lambda path: Run(path.parent.parent).summary("val")),
    ("config.yaml", "yaml", lambda path: Run(path.parent).config),
    ("plan.yaml", "yaml", Plan.read),
    ("settings.yaml", "yaml", lambda path: resolve(path.parent, config_file=path)),
    ("recipe.yaml", "yaml", lambda path: read_recipe(str(path))),
    ("benchmark.yaml", "yaml", read_spec),
    ("table.csv", "csv", load_table),
    ("log/metrics.csv", "csv", lambda path: Run(path.parent.parent).log()),
]


@pytest.mark.parametrize(("name", "kind", "read"), PLACES, ids=[name for name, _, _ in PLACES])
def test_every_text_file_says_what_it_was_saved_as(tmp_path: Path, name: str, kind: str, read: Any) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    assert " is saved as UTF-16; save it as UTF-8." in sentence(read, path, "a: Schädel".encode("utf-16"))
    assert " is not saved as UTF-8 (line 1 " in sentence(read, path, "a: Schädel".encode("latin-1"))
    assert " is empty; " in sentence(read, path, "")
    if kind != "csv":
        assert " holds a list, not " in sentence(read, path, "[1, 2]")


def test_dataset_and_splits_written_by_windows_are_read(tmp_path: Path) -> None:
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "Herz – links": 1}, "file_ending": ".png"}
    for name, content in (("dataset.json", description), ("splits.json", {"train": ["a"], "unit": "Schädel"})):
        text = json.dumps(content, ensure_ascii=False, indent=1).replace("\n", "\r\n")
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    found, faults = describe(tmp_path)
    assert found is not None and found.classes == ("background", "Herz – links") and not faults
    splits = read_split_file(tmp_path)
    assert splits is not None and splits.unit == "Schädel"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file_ending": None}, '"file_ending" is null, which cannot be read; use one of .nii.gz, '),
        ({"file_ending": 7}, '"file_ending" is 7, which cannot be read; '),
        ({"file_ending": ...}, '"file_ending" is missing; write for instance "file_ending": ".nii.gz"'),
        ({"channel_names": ...}, '"channel_names" is missing; write for instance {"0": "MR"}.'),
        ({"channel_names": ["MR"]}, '"channel_names" holds a list, not an object; write for instance {"0": "MR"}.'),
        ({"channel_names": {}}, '"channel_names" is empty; write for instance {"0": "MR"}.'),
        ({"labels": ...}, '"labels" is missing; write for instance {"background": 0, "heart": 1}.'),
        ({"labels": ["background", "heart"]}, '"labels" holds a list, not an object; write for instance {"background'),
        ({"labels": {}}, '"labels" is empty; write for instance {"background": 0, "heart": 1}.'),
    ],
)
def test_a_missing_key_of_dataset_json_is_called_missing(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    content: dict[str, Any] = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    content = {key: value for key, value in (content | change).items() if value is not ...}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    _, (fault,) = describe(tmp_path)
    assert fault.message.startswith(f"{tmp_path / 'dataset.json'}: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"train": "a"}, "'train' is 'a': write a list, for instance [\"a\", \"b\"]."),
        ({"train": {"a": 1}}, "'train' is {'a': 1}: write a list"),
        ({"train": ["a", 7]}, "'train.1' is 7: write text, in quotation marks."),
        ({"groups": ["a"]}, "'groups' is ['a']: write an object"),
        ({"dev_split": ["a"]}, "'dev_split' is ['a']: write an object"),
        ({"labeled": {"1": "a"}}, "'labeled.1' is 'a': write a list"),
    ],
)
def test_wrong_kinds_in_splits_json_are_told_in_json_s_words(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "splits.json"
    message = sentence(lambda path: read_split_file(path.parent), path, json.dumps(content))
    assert message.startswith(f": {said}")


def test_a_table_of_semicolons_is_told(tmp_path: Path) -> None:
    said = sentence(load_table, tmp_path / "t.csv", "case;class;status;dice\na;heart;scored;0,5\n")
    assert " is separated by semicolons" in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"[1]", "it holds a list, not an object"),
        ("{}".encode("utf-16"), "it is saved as UTF-16"),
        (
            b'{"key": "a",',
            "it is not valid JSON (line 1, column 13: expecting property name enclosed in double quotes)",
        ),
    ],
)
def test_a_damaged_journal_may_be_removed(tmp_path: Path, content: bytes, reason: str) -> None:
    said = sentence(lambda path: Journal(path.parent, "key"), tmp_path / Journal.NAME, content)
    assert said == f" does not list predictions; remove it, and all scans are predicted ({reason})."
