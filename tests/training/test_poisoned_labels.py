"""Labels of unlabeled cases never reach the training: with nonsense in them, or without them, it ends with equal bytes.

Every method of the catalogue is trained in all its stages on a generated dataset, and again on copies of it in which
the labels of the unlabeled and the test cases hold other classes, or those of the unlabeled cases are gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from scantly.data.dataset import Dataset
from scantly.data.phantom import CLASSES, write_phantom
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.splits import resolve_split
from scantly.files import read_json, write_json
from scantly.methods import catalogue
from scantly.settings import merge
from scantly.training.checkpoint import load_checkpoint
from scantly.training.resolve import plan, resolve
from scantly.training.run import Run
from scantly.training.train import train_config
from small_methods import LEVELS, SMALL

LABELED = 2
STEPS = 3
#: Fewer rounds and rows, shorter memories; and all predictions count as confident, as none is after three steps:
#: otherwise the unlabeled rows would have no part in the training.
QUICK: dict[str, dict[str, Any]] = {
    "lclpl": {"rounds": STEPS - 1, "seg_rows": 4, "pairs": 4},
    "diffcl": {"queue": 64, "pushed": 8, "anchors": 8, "candidates": 64, "positives": 4, "negatives": 8},
    **{name: {"confidence_threshold": 0} for name in ("pseudo_label", "fixmatch", "unimatch", "gapmatch")},
}
#: Method and settings of every run: each method as it is, and those that have another way to use the pool.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        entry.name: (entry.name, merge(SMALL.get(entry.name, {}), QUICK.get(entry.name, {})))
        for entry in catalogue.CATALOGUE
    },
    "pseudo_label in rounds": ("pseudo_label", {"form": "rounds", "rounds": STEPS - 1}),
}
#: Runs with stages that begin with pseudo-labels of the whole pool; a new one belongs here.
RELABELING = ("lclpl", "pseudo_label in rounds")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Sums of several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def true(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four subjects to train, two of them labeled, one to validate, one to test; all have label files."""
    root = write_phantom(tmp_path_factory.mktemp("datasets") / "true", subjects=6, val=1, test=1, size=(8, 24, 24))
    splits = read_json(root / "splits.json")
    splits["labeled"] = {str(LABELED): splits["labeled"][str(LABELED)]}  # a longer list would promise labels to all
    write_json(root / "splits.json", splits)
    return root


@pytest.fixture(scope="module")
def poisoned(true: Path) -> Path:
    """A copy with another class in every voxel of the hidden labels."""
    root = copy_of(true, "poisoned")
    for number, path in enumerate(hidden_labels(root)):
        poison(path, number)
    return root


@pytest.fixture(scope="module")
def removed(true: Path) -> Path:
    """A copy without the labels of the unlabeled cases; a listed test case must have one."""
    root = copy_of(true, "removed")
    for path in hidden_labels(root, test=False):
        path.unlink()
    return root


@pytest.fixture(scope="module")
def undisturbed(true: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Run]:
    """The run on true labels by name and dimensions, trained once."""
    runs: dict[tuple[str, int], Run] = {}

    def run(name: str, dims: int) -> Run:
        if (name, dims) not in runs:
            runs[name, dims] = trained(true, name, dims, tmp_path_factory.mktemp("undisturbed") / "run")
        return runs[name, dims]

    return run


def copy_of(root: Path, name: str) -> Path:
    """A dataset beside another; its folder is part of the store's name, so nothing prepared is shared."""
    return Path(shutil.copytree(root, root.parent / name))


def hidden_labels(root: Path, *, test: bool = True) -> list[Path]:
    """Label files of the unlabeled cases, and of the test cases; validation may see its own."""
    dataset = Dataset.open(root)
    split = resolve_split(dataset, labeled=LABELED)
    assert [len(part) for part in (split.labeled, split.unlabeled, split.val, split.test)] == [2, 2, 1, 1]
    paths = [dataset.case(name).label for name in (*split.unlabeled, *(split.test if test else ()))]
    return [path for path in paths if path is not None]


def poison(path: Path, seed: int) -> None:
    """Write another class, drawn at random, into every voxel."""
    image = nib.load(path)
    label = np.asarray(image.dataobj)
    others = np.random.default_rng(seed).integers(1, len(CLASSES), label.shape)
    nonsense = ((label + others) % len(CLASSES)).astype(label.dtype)
    assert (nonsense != label).all()
    nib.save(nib.Nifti1Image(nonsense, image.affine, image.header), path)


def trained(root: Path, name: str, dims: int, out: Path) -> Run:
    """A few steps in patches that are smaller than the slices; the store is the dataset's own."""
    method, settings = RUNS[name]
    levels = LEVELS.get(method, 2)
    sizes: dict[int, dict[str, Any]] = {
        2: {"patch": [16, 16], "arguments": {"widths": [4, 8, 8][:levels], "dropout": [0.1] * levels}},
        3: {"patch": [16, 16, 16], "arguments": {"widths": [4, 8, 8][:levels], "blocks": [1] * levels, "dropout": 0.5}},
    }
    sets: dict[str, Any] = {
        "data": {"store": str(root.parent / f"{root.name}-store")},
        "plan": {
            "spatial_dims": dims,
            "patch_size": sizes[dims]["patch"],
            "labeled_batch_size": 2,
            "unlabeled_batch_size": 2,
            "foreground_fraction": 0.5,
        },
        "network": {"name": {2: "unet", 3: "vnet"}[dims], "arguments": sizes[dims]["arguments"]},
        "method": settings,
        "training": {
            "steps": STEPS,
            "validate_every": STEPS,
            "checkpoint_every": STEPS,
            "log_every": 1,
            "device": "cpu",
        },
        "evaluation": {"selection": "best" if method == "lclpl" else "last"},  # its rounds begin with the best
    }
    return train_config(resolve(root, flags={"method": method, "labeled": LABELED}, sets=sets), out, quiet=True)


def differences(run: Run, other: Run) -> set[str]:
    """In what two runs differ, apart from times and places."""
    found = set()
    if run.model_path.read_bytes() != other.model_path.read_bytes():
        found.add("model")
    if logged(run) != logged(other):
        found.add("log")
    states = [load_checkpoint(each.last_checkpoint)["method"] for each in (run, other)]
    assert states[0].keys() == states[1].keys()
    if not all(torch.equal(value, states[1][key]) for key, value in states[0].items()):
        found.add("method")  # its networks, averages, memories and counters after the last step
    if configured(run) != configured(other):
        found.add("config")
    return found


def logged(run: Run) -> list[str]:
    """Every number of the log but times, as it is written."""
    lines = (run.folder / "log" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if ",time/" not in line]
    assert sum(",loss/" in line for line in kept) >= STEPS
    return kept


def configured(run: Run) -> dict[str, Any]:
    """The configuration, plan and split in it, but for the places of dataset and store."""
    data = {key: value for key, value in run.config["data"].items() if key not in {"dataset", "store"}}
    return {**run.config, "data": data}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", RUNS)
def test_labels_of_unlabeled_cases_change_nothing(undisturbed, poisoned, removed, tmp_path, name, dims):
    run = undisturbed(name, dims)
    assert (run.folder / "pseudo_labels").is_dir() == (name in RELABELING)
    for root in (poisoned, removed):
        assert not differences(run, trained(root, name, dims, tmp_path / root.name)), root.name


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["supervised", "mean_teacher"])
def test_a_label_that_is_used_does_change_the_weights(true, undisturbed, tmp_path, name, dims):
    run = undisturbed(name, dims)
    root = copy_of(true, f"labeled-{name}-{dims}")
    poison(root / "labelsTr" / f"{run.split.labeled[0]}.nii.gz", 0)
    assert differences(run, trained(root, name, dims, tmp_path / "run")) == {"model", "log", "method"}


@pytest.mark.parametrize("name", RELABELING)
def test_a_leak_by_pseudo_labels_would_be_seen(true, poisoned, tmp_path, monkeypatch, name):
    """The engine is made to write the files' labels where it should write its predictions."""
    write = PseudoLabels.write
    runs = []
    for root in (true, poisoned):
        dataset = Dataset.open(root)

        def leaking(self, case, array, dataset=dataset):
            write(self, case, dataset.read_label(case).array)

        monkeypatch.setattr(PseudoLabels, "write", leaking)
        runs.append(trained(root, name, 2, tmp_path / root.name))
    assert differences(*runs) == {"model", "log", "method"}


@pytest.mark.parametrize("name", ["mean_teacher", *RELABELING])
def test_label_files_of_unlabeled_cases_are_not_opened(true, undisturbed, tmp_path, name):
    root = copy_of(true, f"unreadable-{name}")
    for path in hidden_labels(root):
        path.write_bytes(b"no scan")
    assert not differences(undisturbed(name, 2), trained(root, name, 2, tmp_path / "run"))


def test_the_plan_does_not_depend_on_labels_of_unlabeled_cases(true, poisoned, removed):
    """A plan from the data alone, of scans whose intensities are measured within the labels, as those of CT are."""
    plans = []
    for root in (true, poisoned, removed):
        ct = copy_of(root, f"{root.name}-ct")
        description = read_json(ct / "dataset.json")
        write_json(ct / "dataset.json", {**description, "channel_names": {"0": "CT"}})
        plans.append(plan(ct, flags={"labeled": LABELED}))
    assert plans[0].normalization[0].scheme == "ct"
    assert plans[0] == plans[1] == plans[2]
