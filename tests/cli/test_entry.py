"""The process: what it imports, its exit status, its two streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import scantly as package

HEAVY = {"torch", "monai", "lightning", "pandas", "numpy", "nibabel", "scipy", "matplotlib"}
REPORT_IMPORTS = """
import atexit, json, sys
atexit.register(lambda: sys.stderr.write(json.dumps(sorted({name.split(".")[0] for name in sys.modules}))))
from scantly.cli import main
main()
"""


def process(code: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["methods"], ["methods", "--json"]])
def test_quick_answers_import_nothing_heavy(words: list[str]) -> None:
    done = process(REPORT_IMPORTS, *words)
    assert done.returncode == 0
    assert done.stdout
    assert HEAVY.isdisjoint(json.loads(done.stderr))


def test_version(scantly) -> None:
    assert scantly("--version").out == f"scantly {package.__version__}\n"


def test_as_a_module_it_answers_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "scantly", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"scantly {package.__version__}\n"


def test_help_lists_the_commands_and_each_help_ends_with_examples(scantly) -> None:
    text = scantly("--help").out
    listed = [line.split()[0] for line in text.split("Commands:")[1].split("Examples:")[0].splitlines() if line.strip()]
    assert listed == [
        "demo",
        "methods",
        "init",
        "check",
        "plan",
        "train",
        "predict",
        "evaluate",
        "compare",
        "benchmark",
    ]
    for command in listed:
        examples = scantly(command, "--help").out.split("Examples:")[1].split("\n")[1:-1]
        assert examples
        assert all(line.startswith("    scantly ") for line in examples)


@pytest.mark.parametrize(
    ("words", "offered"),
    [(["trian"], "train"), (["train", "d", "--sede", "3"], "--seed"), (["check", "d", "--jsn"], "--json")],
)
def test_unknown_commands_and_options_name_the_nearest(scantly, words: list[str], offered: str) -> None:
    outcome = scantly(*words)
    assert (outcome.status, outcome.out) == (2, "")
    assert offered in outcome.err.splitlines()[-1]


def test_debug_shows_the_traceback_and_keeps_the_status(scantly) -> None:
    for words in (["--debug", "methods", "none"], ["methods", "none", "--debug"]):
        outcome = scantly(*words)
        assert outcome.status == 2
        assert "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("scantly: unknown method 'none'")


FAULTY = """
from scantly.methods import catalogue
def broken():
    raise KeyError("lost")
catalogue.methods = broken
from scantly.cli import main
main()
"""


def test_a_fault_of_ours_is_called_so() -> None:
    done = process(FAULTY, "methods")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "fault of Scantly" in done.stderr
    assert "KeyError: 'lost'" in done.stderr
    assert "--debug" in done.stderr
    assert "Traceback" in process(FAULTY, "methods", "--debug").stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", "from scantly.cli import main; main()", "methods"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        timeout=300,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_path_that_the_system_refuses_is_a_sentence(scantly, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "dataset.json"))

    monkeypatch.setattr("scantly.data.checks.check", refuse)
    outcome = scantly("check", tmp_path)
    assert outcome.status == 2
    assert outcome.sentence == f"cannot use {tmp_path / 'dataset.json'}: Permission denied; check its permissions."


def test_ctrl_c_outside_a_training_is_a_sentence(scantly, tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scantly.data.checks.check", interrupted)
    outcome = scantly("check", tmp_path)
    assert outcome.status == 2
    assert outcome.sentence.startswith("stopped by Ctrl-C")
