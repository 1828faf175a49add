"""nnU-Net as a row, with stand-ins for its commands that note what they are asked and do the least of it."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from scantly.benchmark.cells import NNUNET, Cell, resolve_cells
from scantly.benchmark.nnunet import EPOCHS, epochs, train_nnunet
from scantly.benchmark.spec import BenchmarkSpec
from scantly.data.dataset import Dataset
from scantly.data.phantom import write_phantom
from scantly.errors import ConfigError, RunError
from scantly.files import read_json
from scantly.training.run import Run

STAND_IN = """#!{python}
import json, os, shutil, sys
from pathlib import Path
words = sys.argv[1:]
with open({noted!r}, "a") as file:
    file.write(json.dumps([Path(sys.argv[0]).name, *words]) + "\\n")
raw, done, results = (Path(os.environ["nnUNet_" + name]) for name in ("raw", "preprocessed", "results"))
(dataset,) = raw.iterdir()
after = lambda flag: words[words.index(flag) + 1]
if "preprocess" in sys.argv[0]:
    (done / dataset.name).mkdir(parents=True)
    (done / dataset.name / "nnUNetPlans.json").write_text("{{}}")
elif "train" in sys.argv[0]:
    if os.environ.get("FAIL"):
        sys.exit(3)
    place = results / dataset.name / f"{{after('-tr')}}__nnUNetPlans__{{words[1]}}" / "fold_all"
    place.mkdir(parents=True)
    (place / "checkpoint_final.pth").write_bytes(b"weights")
else:
    out = Path(after("-o"))
    out.mkdir(parents=True, exist_ok=True)
    for image in Path(after("-i")).iterdir():
        name = image.name.replace("_0000", "")
        shutil.copy(Path(os.environ["REFERENCE"]) / name, out / name)
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom(tmp_path_factory.mktemp("nnunet") / "cohort", subjects=8, val=1, test=2, size=(5, 40, 48))


@pytest.fixture
def noted(tmp_path: Path, cohort: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-ins note their words; they predict the reference."""
    commands, notes = tmp_path / "bin", tmp_path / "noted.jsonl"
    commands.mkdir()
    for name in ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"):
        file = commands / name
        file.write_text(STAND_IN.format(python=sys.executable, noted=str(notes)), encoding="utf-8")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    monkeypatch.setenv("REFERENCE", str(cohort / "labelsTs"))
    return notes


def cell(cohort: Path) -> Cell:
    entry = {"path": str(cohort), "labeled": [2], "steps": 400, "settings": {"plan": {"spatial_dims": 2}}}
    spec = BenchmarkSpec.model_validate(
        {"datasets": {"hearts": entry}, "methods": ["supervised"], "seeds": [1], "planned": False, "nnunetv2": True}
    )
    return next(found for found in resolve_cells(spec) if found.row == NNUNET)


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (250, 1), (1500, 5), (2000, 10), (30_000, 100), (10**7, 8000)])
def test_the_nearest_number_of_epochs_on_offer(steps: int, count: int) -> None:
    assert epochs(steps) == count
    assert count in EPOCHS


def test_it_is_asked_for_the_labeled_cases_alone_and_reads_as_a_run(cohort: Path, noted: Path, tmp_path: Path) -> None:
    found, folder = cell(cohort), tmp_path / "cell"
    assert found.config is not None
    cost = train_nnunet(folder, found.config, "test", device="cpu")
    asked = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [words[0] for words in asked] == ["nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"]
    assert asked[1][1:] == ["1", "2d", "all", "-tr", "nnUNetTrainer_1epoch", "-device", "cpu"]
    raw = folder / "nnunet" / "raw" / "Dataset001_scantly"
    labeled = found.config.split["labeled"]
    assert sorted(path.name for path in (raw / "labelsTr").iterdir()) == [f"{name}.nii.gz" for name in sorted(labeled)]
    described = read_json(raw / "dataset.json")
    assert described["numTraining"] == len(labeled) == 2
    assert list(described["labels"]) == list(Dataset.open(cohort).classes)
    run = Run.open(folder)
    assert run.config["method"] == {"name": "nnunetv2", "epochs": 1}
    assert run.summary("test")["overall"]["dice"]["mean"] == pytest.approx(1.0)  # it "predicted" the reference
    assert run.timing()[0] > 0
    assert cost["model_bytes"] == len(b"weights")
    assert cost["parameters"] is None


def test_what_is_done_is_not_done_again(cohort: Path, noted: Path, tmp_path: Path) -> None:
    found = cell(cohort)
    assert found.config is not None
    for _ in range(2):
        train_nnunet(tmp_path / "cell", found.config, "test", device="cpu")
    assert len(noted.read_text().splitlines()) == 3


@pytest.mark.usefixtures("noted")
def test_a_command_that_fails_is_named(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIL", "1")
    found = cell(cohort)
    assert found.config is not None
    with pytest.raises(RunError, match="nnUNetv2_train ended with status 3"):
        train_nnunet(tmp_path / "cell", found.config, "test", device="cpu")
    assert not (tmp_path / "cell" / "evaluation").exists()


def test_where_it_is_not_installed_the_benchmark_does_not_begin(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scantly.benchmark.nnunet._which", lambda _: None)
    with pytest.raises(ConfigError, match="nnUNetv2_plan_and_preprocess is not installed; pip install"):
        cell(cohort)
