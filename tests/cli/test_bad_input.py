"""What a user can get wrong: one sentence with file, value and cure, status 2, earlier results untouched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import nibabel as nib
import numpy as np
import pytest
import torch
from cli_helpers import AFFINE, Command, contents

METHOD = ("--method", "supervised")


@pytest.fixture
def fails(scantly: Command, small: tuple[str, ...], tmp_path: Path):
    """Train on a spoilt folder: the status is 2, nothing was trained; gives the sentence."""

    def run(dataset: Path, *words: str | Path) -> str:
        before = contents(dataset)
        out = tmp_path / "run"
        outcome = scantly("train", dataset, *METHOD, "--out", out, *small, *words)
        assert outcome.status == 2
        assert outcome.out == ""
        assert not (out / "checkpoints").exists()
        assert contents(dataset) == before
        assert "Traceback" not in outcome.err
        *progress, sentence = outcome.err.splitlines()
        assert all(line.startswith("preparing ") for line in progress)  # all cases are looked at
        return sentence.removeprefix("scantly: ")

    return run


def found(scantly: Command, dataset: Path) -> dict[str, Any]:
    """The errors that ``scantly check --json`` finds, by code."""
    outcome = scantly("check", dataset, "--json")
    assert outcome.status == 2
    return {finding["code"]: finding for finding in json.loads(outcome.out)["findings"]}


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj).copy()


def test_an_empty_folder(scantly, fails, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    sentence = fails(empty)
    assert str(empty) in sentence
    assert "scantly init" in sentence
    for words in (["plan", empty], ["check", empty]):
        outcome = scantly(*words)
        assert outcome.status == 2
        assert sentence in outcome.out + outcome.err


def test_a_truncated_scan(scantly, fails, dataset: Path) -> None:
    scan = dataset / "imagesTr" / "case5_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[: scan.stat().st_size // 2])
    assert str(scan) in fails(dataset)
    assert [finding["file"] for finding in found(scantly, dataset).values()] == [str(scan)]


def test_a_label_of_another_shape(scantly, fails, dataset: Path) -> None:
    label = dataset / "labelsTr" / "case1.nii.gz"
    save(label, voxels(label)[:, :30])
    sentence = fails(dataset)
    assert str(label) in sentence
    assert "30" in sentence
    assert str(label) in {finding["file"] for finding in found(scantly, dataset).values()}


def test_a_label_of_another_affine(scantly, fails, dataset: Path) -> None:
    label = dataset / "labelsTr" / "case1.nii.gz"
    save(label, voxels(label), np.diag([-2.0, -2.0, 8.0, 1.0]))
    assert str(label) in fails(dataset)
    assert str(label) in {finding["file"] for finding in found(scantly, dataset).values()}


def test_a_label_value_that_is_not_in_dataset_json(scantly, fails, dataset: Path) -> None:
    label = dataset / "labelsTr" / "case2.nii.gz"
    array = voxels(label)
    array[0, 0, 0] = 7
    save(label, array)
    sentence = fails(dataset)
    assert str(label) in sentence
    assert "7" in sentence
    assert "dataset.json" in sentence
    assert str(label) in {finding["file"] for finding in found(scantly, dataset).values()}


def test_nan_voxels_and_mending_them(scantly, fails, small, dataset: Path, tmp_path: Path) -> None:
    scan = dataset / "imagesTr" / "case3_0000.nii.gz"
    sound = voxels(scan)
    spoilt = sound.copy()
    spoilt[3, 4, 1] = np.nan
    save(scan, spoilt)
    sentence = fails(dataset)
    assert str(scan) in sentence
    assert "nan" in sentence.lower()
    assert str(scan) in {finding["file"] for finding in found(scantly, dataset).values()}
    save(scan, sound)
    assert scantly("train", dataset, *METHOD, "--out", tmp_path / "run", *small).status == 0


def test_a_missing_channel(scantly, fails, two_channels: Path) -> None:
    gone = two_channels / "imagesTr" / "case1_0001.nii.gz"
    gone.unlink()
    assert str(gone) in fails(two_channels)
    assert str(gone) in {finding["file"] for finding in found(scantly, two_channels).values()}


def test_more_labeled_cases_than_there_are(fails, dataset: Path) -> None:
    sentence = fails(dataset, "--labeled", "500")
    assert "500" in sentence
    assert "ask for 4 or fewer" in sentence


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["--method", "mean_techer"], "mean_teacher"),
        (["--set", "training.step=5"], "training.steps"),
        (["--set", "trainig.lr=0.1"], "training"),
        (["--set", "method.consistncy=0.5", "--method", "mean_teacher"], "method.consistency"),
        (["--recipe", "acdcc"], "acdc"),
    ],
)
def test_unknown_names_offer_the_nearest(fails, dataset: Path, words: list[str], offered: str) -> None:
    assert f"did you mean '{offered}'?" in fails(dataset, *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--steps", "0"], "training.steps"),
        (["--labeled", "many"], "many"),
        (["--labeled", "500%"], "500%"),
        (["--dims", "4"], "4"),
        (["--size", "32"], "--size takes H W or H W D"),
        (["--size", "31", "32"], "31"),
        (["--device", "tpu"], "tpu"),
        (["--precision", "16"], "16"),
        (["--protocol", "dirty"], "dirty"),
        (["--set", "training.lr"], "training.lr"),
        (["--set", "training.steps=7"], "training.steps"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--set", "network.name=unett"], "unet"),
    ],
)
def test_values_that_do_not_fit(fails, dataset: Path, words: list[str], named: str) -> None:
    assert named in fails(dataset, *words)


def test_a_run_folder_of_another_configuration(scantly, small, sound: Path, trained: Path) -> None:
    before = contents(trained)
    outcome = scantly("train", sound, *METHOD, "--out", trained, *small, "--labeled", "3", "--seed", "5")
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    assert outcome.err.startswith(f"scantly: {trained} holds a run of another configuration; choose another --out.")
    assert "  training.seed: 1337 -> 5\n" in outcome.err
    assert "  data.labeled: 2 -> 3\n" in outcome.err
    assert contents(trained) == before


def test_a_folder_that_is_no_run(scantly, small, sound: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("precious")
    outcome = scantly("train", sound, *METHOD, "--out", tmp_path, *small)
    assert outcome.status == 2
    assert "thesis.tex" in outcome.sentence
    assert thesis.read_text() == "precious"


def test_two_runs_in_one_folder_at_once(scantly, small, sound: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with filelock.FileLock(out / ".lock"):
        outcome = scantly("train", sound, *METHOD, "--out", out, *small)
    assert outcome.status == 2
    assert str(out) in outcome.sentence
    assert "another process" in outcome.sentence
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.fixture
def file_size_limit() -> Iterator[Any]:
    """Sets the largest size of a file that this process may write, in bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_while_a_checkpoint_is_written(
    scantly, small, sound: Path, tmp_path: Path, monkeypatch, file_size_limit
) -> None:
    from scantly.training import engine

    out, saved = tmp_path / "run", []
    save_checkpoint = engine.save_checkpoint

    def fill_up(path: Path, state: dict[str, Any]) -> None:
        if saved:
            file_size_limit(len(saved[0]) // 2)
        save_checkpoint(path, state)
        saved.append(path.read_bytes())

    monkeypatch.setattr(engine, "save_checkpoint", fill_up)
    words = ("train", sound, "--method", "mean_teacher", "--labeled", "2", "--out", out, *small)
    outcome = scantly(*words)
    file_size_limit(resource.RLIM_INFINITY)
    assert outcome.status == 2
    assert "Traceback" not in outcome.err
    last = out / "checkpoints" / "last.ckpt"
    assert outcome.err.splitlines()[-1].startswith(f"scantly: cannot write {last}")
    assert "free space" in outcome.err
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    assert last.read_bytes() == saved[0]
    assert torch.load(last, weights_only=True)["iteration"] == 2

    monkeypatch.setattr(engine, "save_checkpoint", save_checkpoint)
    resumed = scantly(*words, "--resume")
    assert resumed.status == 0, resumed.err
    assert "resuming after iteration 2 of 4" in resumed.err


SLOW_TRAINING = """
import time
from scantly.data import loader
from scantly.training.engine import Engine
start_worker = loader._start_worker
def slow_second_worker(number):
    time.sleep(number)  # a worker that is still starting when Ctrl-C comes
    start_worker(number)
loader._start_worker = slow_second_worker
step = Engine._step
def slow_step(*arguments):
    print("step", flush=True)
    time.sleep(0.3)
    return step(*arguments)
Engine._step = slow_step
from scantly.cli import main
main()
"""


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on(scantly, small, sound: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ["train", str(sound), *METHOD, "--labeled", "2", "--out", str(out), "--workers", "2", *small]
    words[words.index("--steps") + 1] = "30"
    words[words.index("training.checkpoint_every=2")] = "training.checkpoint_every=30"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_TRAINING, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader's processes too
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in err
    said, sentence = err.splitlines()[-2:]
    assert said == "stopping after this iteration; again to stop at once"
    assert err.count(said) == 1
    assert sentence.startswith("scantly: stopped after iteration ")
    assert "--resume" in sentence
    iteration = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["iteration"]
    assert 0 < iteration < 30
    assert not (out / "model.safetensors").exists()

    refused = scantly(*words)
    assert refused.status == 2
    assert "--resume" in refused.sentence
    resumed = scantly(*words, "--resume")
    assert resumed.status == 0, resumed.err
    assert f"resuming after iteration {iteration} of 30" in resumed.err
    assert (out / "model.safetensors").is_file()


def test_predicting_what_cannot_be_read(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes((sound / "imagesTs" / "case6_0000.nii.gz").read_bytes()[:300])
    for given in (scan, tmp_path / "nowhere.nii.gz"):
        outcome = scantly("predict", trained, given, "--out", tmp_path / "out")
        assert outcome.status == 2
        assert str(given) in outcome.err.splitlines()[-1]
        assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command", [["predict", "RUN", "scan.nii.gz", "--out", "o"], ["evaluate", "RUN"], ["compare", "RUN"]]
)
def test_a_folder_that_holds_no_run(scantly, tmp_path: Path, command: list[str]) -> None:
    outcome = scantly(*(str(tmp_path) if word == "RUN" else word for word in command))
    assert outcome.status == 2
    assert str(tmp_path) in outcome.sentence


def test_scores_that_would_need_another_split(scantly, trained: Path) -> None:
    for split in ("val", "train"):
        outcome = scantly("evaluate", trained, "--split", split)
        assert outcome.status == 2
        assert split in outcome.sentence


def test_predict_goes_on_past_bad_scans_and_lists_them(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    scans, out = Path(shutil.copytree(sound / "imagesTs", tmp_path / "scans")), tmp_path / "out"
    whole = (scans / "case6_0000.nii.gz").read_bytes()
    (scans / "case6_0000.nii.gz").write_bytes(whole[:300])
    outcome = scantly("predict", trained, scans, "--out", out)
    assert outcome.status == 2
    assert outcome.out == f"1 label map written to {out}\n"
    head, line = outcome.err.splitlines()[-2:]
    assert head.startswith(f"scantly: 1 of 2 scans cannot be predicted, the others are in {out}; mend or remove them")
    assert line.startswith(f"  {scans / 'case6_0000.nii.gz'} ")
    told = scantly("predict", trained, scans, "--out", out, "--json")
    assert told.status == 2
    document = json.loads(told.out)
    assert (document["label_maps"], document["present"]) == ([str(out / "case7.nii.gz")], 1)
    ((case, reason),) = (failure.values() for failure in document["failed"])
    assert case == "case6"
    assert str(scans / "case6_0000.nii.gz") in reason
    (scans / "case6_0000.nii.gz").write_bytes(whole)
    mended = scantly("predict", trained, scans, "--out", out)
    assert mended.status == 0
    assert mended.out == f"1 label map written to {out}; 1 of an interrupted prediction was already there\n"


def test_two_predictions_into_one_folder_at_once(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with filelock.FileLock(out / ".lock"):
        outcome = scantly("predict", trained, sound / "imagesTs", "--out", out)
    assert outcome.status == 2
    assert f"another process is predicting in {out}; wait for it or choose another --out" in outcome.sentence


def test_all_bad_scans_are_told_before_a_training(scantly, fails, dataset: Path) -> None:
    """Headers and voxels, of labeled, unlabeled and validation cases; good cases stay prepared."""
    splits = {"train": [f"case{n}" for n in (0, 1, 2, 4)], "val": ["case3"], "test": ["case6"]}
    (dataset / "splits.json").write_text(json.dumps(splits))
    header, zipped = dataset / "imagesTr" / "case0_0000.nii.gz", dataset / "imagesTr" / "case4_0000.nii.gz"
    header.write_bytes(b"no header")
    zipped.write_bytes(zipped.read_bytes()[:-9])
    label, reference = dataset / "labelsTr" / "case1.nii.gz", dataset / "labelsTr" / "case3.nii.gz"
    save(label, voxels(label)[:, :30])
    reference.write_bytes(b"no label")
    for words in ((), ("--recipe", "acdc-cpu", "--size", "32", "32")):
        outcome = scantly("train", dataset, *METHOD, *words, "--out", dataset.parent / "run", "--steps", "1")
        assert outcome.status == 2
        head, *lines = outcome.err.splitlines()[-5:]
        assert head.startswith("scantly: 4 of 5 cases cannot be used")
        assert all(any(f"  {path} " in f"{line} " for line in lines) for path in (header, zipped, label, reference))
    planned = scantly("plan", dataset)
    assert planned.status == 2
    assert planned.out == ""
    assert str(header) in planned.err
    assert str(zipped) in planned.err


def test_evaluate_names_references_without_prediction(scantly, sound: Path, tmp_path: Path) -> None:
    predictions = Path(shutil.copytree(sound / "labelsTs", tmp_path / "predictions"))
    (predictions / "case6.nii.gz").unlink()
    words = ("evaluate", "--predictions", predictions, "--labels", sound / "labelsTs")
    outcome = scantly(*words)
    assert (outcome.status, outcome.out) == (2, "")
    assert f"{predictions} has no prediction for 1 of 2 references: case6; " in outcome.sentence
    assert "--allow-missing" in outcome.sentence
    told = scantly(*words, "--allow-missing")
    assert told.status == 0, told.err
    assert told.out.startswith("predictions: 1 of 2 cases, protocol clean\n")
    assert "Not scored, since there is no prediction: case6." in told.out
    assert json.loads(scantly(*words, "--allow-missing", "--json").out)["missing"] == ["case6"]
    assert scantly("evaluate", tmp_path, "--allow-missing").status == 2


def test_evaluate_goes_on_past_what_cannot_be_scored(scantly, sound: Path, tmp_path: Path) -> None:
    predictions = Path(shutil.copytree(sound / "labelsTs", tmp_path / "predictions"))
    (predictions / "case6.nii.gz").write_bytes(b"no label")
    words = ("evaluate", "--predictions", predictions, "--labels", sound / "labelsTs")
    outcome = scantly(*words)
    assert outcome.status == 2
    assert outcome.out.startswith("predictions: 1 of 2 cases, protocol clean\n")
    assert str(predictions / "case6.nii.gz") in outcome.sentence
    document = json.loads(scantly(*words, "--json").out)
    assert [failure["case"] for failure in document["failed"]] == ["case6"]
