"""``scantly benchmark``: what it prints, refuses and leaves alone."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_helpers import contents

from scantly.benchmark import run as run_module
from scantly.benchmark.work import Job, Kind, Outcome, run_job
from scantly.files import write_json

SETTINGS = {
    "plan": {"size": [32, 32], "labeled_batch_size": 2, "unlabeled_batch_size": 2, "spatial_dims": 2},
    "network": {"arguments": {"widths": [4, 8], "dropout": [0, 0]}},
    "training": {"device": "cpu"},
}


@pytest.fixture
def spec(sound: Path, tmp_path: Path):
    """Writes a benchmark file."""

    def write(**changes: Any) -> Path:
        entry = {"path": str(sound), "labeled": [2], "steps": 4, "settings": SETTINGS, **changes.pop("entry", {})}
        values = {"datasets": {"discs": entry}, "methods": ["supervised", "mean_teacher"], "seeds": [1, 2], **changes}
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


class Pretending:
    """A pool whose cells are done at once, but for those that fail."""

    processes = 1

    def __init__(self, *failing: str, kind: Kind = "user") -> None:
        self._failing, self._kind = failing, kind

    def run(self, jobs: list[Job]):
        for job in jobs:
            if job.name in self._failing:
                yield Outcome(job.name, "failed", "it is broken.", self._kind)
                continue
            write_json(Path(job.folder) / "evaluation" / f"{job.split}.json", {})
            yield Outcome(job.name, "done", cost={"seconds": 3600.0})


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch):
    """Have no cell trained; names of cells that fail."""

    def use(*failing: str, kind: Kind = "user") -> None:
        monkeypatch.setattr(run_module, "LocalPool", lambda processes: Pretending(*failing, kind=kind))
        monkeypatch.setattr("scantly.report.benchmark_page.benchmark_report", lambda grid: grid.folder / "report.html")

    return use


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"methods": ["mean_techer"]}, [], "did you mean 'mean_teacher'?"),
        ({"entry": {"labeled": [500]}}, [], "ask for 4 or fewer"),
        ({"entry": {"labeled": [0]}}, [], "0 is no number above 0"),
        ({"entry": {"path": "nowhere"}}, [], "nowhere does not exist"),
        ({"entry": {"recipe": "acdcc"}}, [], "did you mean 'acdc'?"),
        ({"seeds": [1, 1]}, [], "listed more than once: 1"),
        ({"metods": []}, [], "did you mean 'methods'?"),
        ({}, ["--device", "tpu"], "tpu"),
        ({}, ["--precision", "16"], "16"),
        ({}, ["--on", "rey"], "did you mean 'ray'?"),
        ({}, ["--address", "10.0.0.1:6379"], "add --on ray"),
        ({}, ["--processes", "0"], "greater than or equal to 1"),
    ],
)
def test_a_bad_input_is_one_sentence_and_nothing_is_written(
    scantly, spec, sound: Path, tmp_path: Path, changes: dict[str, Any], words: list[str], said: str
) -> None:
    out, before = tmp_path / "out", contents(sound)
    outcome = scantly("benchmark", spec(**changes), "--out", out, *words)
    assert outcome.status == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert said in outcome.err
    assert not out.exists()
    assert contents(sound) == before


def test_every_fault_is_a_sentence(scantly, spec, tmp_path: Path) -> None:
    bad = {**SETTINGS, "training": {"lr": -1}}
    outcome = scantly(
        "benchmark", spec(methods=["icd"], entry={"labeled": [2, 99], "settings": bad}), "--out", tmp_path / "out"
    )
    assert outcome.status == 2
    sentences = outcome.err.splitlines()
    assert len(sentences) == 3
    for said in ("training.lr", "did you mean 'ict'?", "--labeled 99"):
        assert sum(said in sentence for sentence in sentences) == 1
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing(scantly, tmp_path: Path) -> None:
    outcome = scantly("benchmark", tmp_path / "nowhere.yaml", "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "nowhere.yaml does not exist" in outcome.sentence


def test_a_folder_of_something_else(scantly, spec, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    for words in ([], ["--dry-run"]):
        outcome = scantly("benchmark", spec(), "--out", folder, *words)
        assert outcome.status == 2
        assert "it holds 'chapter.tex'" in outcome.sentence
    assert contents(folder) == {"chapter.tex": b"precious"}


def test_a_dry_run_prints_the_table_and_writes_nothing(scantly, spec, sound: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    outcome = scantly("benchmark", spec(), "--out", tmp_path / "out", "--dry-run", "--processes", "2")
    assert outcome.status == 0, outcome.err
    lines = [line.split() for line in outcome.out.splitlines()]
    assert outcome.out.splitlines()[0] == "8 cells, 8 of them open"
    assert lines[3][:6] == ["discs", "supervised", "2,", "all", "4", "4"]
    assert {tuple(line[1:5]) for line in lines[4:6]} == {
        ("mean_teacher", "2", "2", "2"),
        ("supervised_planned", "2", "2", "2"),
    }
    assert all("tried" in line for line in lines[3:6])
    assert "on 2 processes" in outcome.out
    assert "Nothing was written." in outcome.out
    assert set(contents(tmp_path)) - set(before) == {"spec.yaml"}


def test_what_came_of_the_cells(scantly, spec, tmp_path: Path, pretending) -> None:
    out, path = tmp_path / "out", spec(planned=False, upper_bound=False)
    broken = "discs/mean_teacher-2-seed2"
    pretending(broken)
    outcome = scantly("benchmark", path, "--out", out)
    assert outcome.status == 2
    assert "3 of 4 cells are done, 1 failed, 0 are open" in outcome.out
    assert f"  {broken}: it is broken." in outcome.out
    assert f"report: {out / 'report.html'}" in outcome.out
    said = "scantly: 1 of 4 cells failed; when the cause is mended, --retry-failed does them again."
    assert outcome.err.splitlines()[-1] == said

    pretending()
    outcome = scantly("benchmark", path, "--out", out)
    assert outcome.status == 2
    assert "3 of 4 cells are done, 1 failed" in outcome.out
    dry = scantly("benchmark", path, "--out", out, "--dry-run", "--retry-failed")
    assert "4 cells, 1 of them open" in dry.out
    assert "1 h 0 min" in dry.out
    assert "measured" in dry.out
    outcome = scantly("benchmark", path, "--out", out, "--retry-failed")
    assert outcome.status == 0
    assert "4 of 4 cells are done, 0 failed, 0 are open" in outcome.out
    assert f"report: {out / 'report.html'}" in outcome.out


def test_a_cell_that_fails_for_a_fault_of_ours_ends_with_status_1(scantly, spec, tmp_path: Path, pretending) -> None:
    pretending("discs/mean_teacher-2-seed2", kind="fault")
    outcome = scantly("benchmark", spec(planned=False, upper_bound=False), "--out", tmp_path / "out")
    assert outcome.status == 1
    assert "1 of 4 cells failed; when the cause is mended, --retry-failed does them again." in outcome.err
    assert "Traceback" not in outcome.err
    assert "report: " in outcome.out


def test_a_small_benchmark_from_file_to_report(scantly, spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Here:
        processes = 1

        def run(self, jobs: list[Job]):
            yield from map(run_job, jobs)

    monkeypatch.setattr(run_module, "LocalPool", lambda processes: Here())
    out = tmp_path / "out"
    small = {"planned": False, "upper_bound": False, "methods": ["supervised"], "seeds": [1]}
    outcome = scantly("benchmark", spec(**small, title="Discs"), "--out", out)
    assert outcome.status == 0, outcome.err
    assert "1 of 1 cells are done" in outcome.out
    assert "Discs" in (out / "report.html").read_text(encoding="utf-8")
    assert (out / "results.csv").is_file()
    again = scantly("benchmark", spec(**small, title="Discs"), "--out", out)
    assert again.status == 0, again.err


def test_a_full_disk_is_one_sentence(scantly, spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    outcome = scantly("benchmark", spec(), "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "has 1 MB left on its disk" in outcome.sentence


def test_without_ray(scantly, spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = scantly("benchmark", spec(), "--out", tmp_path / "out", "--on", "ray")
    assert outcome.status == 2
    assert "pip install 'scantly[ray]'" in outcome.sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), SystemExit(15)], ids=["Ctrl-C", "SIGTERM on Ray"])
def test_being_stopped_is_one_sentence(
    scantly, spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: BaseException
) -> None:
    class Interrupted(Pretending):
        def run(self, jobs: list[Job]):
            yield from super().run(jobs[:1])
            raise stopped

    monkeypatch.setattr(run_module, "LocalPool", lambda processes: Interrupted())
    outcome = scantly("benchmark", spec(), "--out", tmp_path / "out")
    assert outcome.status == 2
    assert "stopped with 1 of 8 cells done; the same command goes on" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
