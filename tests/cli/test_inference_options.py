"""The options that say how whole scans are predicted, as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scantly.cli.inference_options import overrides

NONE = dict.fromkeys(("window", "overlap", "stride", "size", "flips", "largest_component", "batch"))


def test_sides_are_given_as_the_literature_writes_them() -> None:
    assert overrides(**NONE) == {}
    given = {**NONE, "stride": "18 18 4", "size": "112 112 80", "flips": False}
    assert overrides(**given) == {"stride": [4, 18, 18], "patch_size": [80, 112, 112], "flips": False}
    assert overrides(**{**NONE, "stride": "8 16"}) == {"stride": [8, 16]}


def test_predict_with_every_option(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    words = ("--window", "uniform", "--stride", "8", "16", "--size", "16", "16", "--flips", "--largest-component")
    more = ("--probabilities", "--precision", "bf16", "--batch", "2", "--device", "cpu")
    outcome = scantly("predict", trained, sound / "imagesTs", "--out", tmp_path / "out", *words, *more)
    assert outcome.status == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"case{n}{kind}.nii.gz" for n in (6, 7) for kind in ("", "_probabilities")
    ]
    assert nib.load(tmp_path / "out" / "case6_probabilities.nii.gz").shape == (32, 32, 3, 3)


def test_a_folder_goes_on_after_a_bad_scan(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    scans, out = Path(shutil.copytree(sound / "imagesTs", tmp_path / "scans")), tmp_path / "out"
    good = (scans / "case6_0000.nii.gz").read_bytes()
    (scans / "case6_0000.nii.gz").write_bytes(good[:300])
    failed = scantly("predict", trained, scans, "--out", out)
    assert failed.status == 2
    assert "1 of 2 scans cannot be predicted, the others are in" in failed.err
    assert str(scans / "case6_0000.nii.gz") in failed.err
    assert "Traceback" not in failed.err
    (scans / "case6_0000.nii.gz").write_bytes(good)
    outcome = scantly("predict", trained, scans, "--out", out)
    assert outcome.out == f"1 label map written to {out}; 1 of an interrupted prediction was already there\n"
    assert sorted(path.name for path in out.iterdir()) == ["case6.nii.gz", "case7.nii.gz"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--window", "round"), "inference.window"),
        (("--overlap", "1"), "inference.overlap"),
        (("--stride", "4"), "--stride takes H W or H W D in voxels"),
        (("--stride", "8", "8", "4"), "stride is 4 x 8 x 8, but the model is 2D"),
        (("--stride", "64", "64"), "would leave gaps"),
        (("--overlap", "0.5", "--stride", "8", "8"), "overlap and stride both"),
        (("--precision", "16"), "unknown precision '16'"),
    ],
)
def test_options_that_do_not_fit(scantly, trained: Path, sound: Path, tmp_path: Path, words, sentence: str) -> None:
    outcome = scantly("predict", trained, sound / "imagesTs", "--out", tmp_path / "out", *words)
    assert outcome.status == 2
    assert sentence in outcome.sentence
    assert not (tmp_path / "out").exists()


def test_evaluate_says_how_it_predicted(scantly, trained: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    outcome = scantly("evaluate", run, "--overlap", "0.25", "--flips", "--json", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)["inference"]
    assert (told["window"], told["overlap"], told["flips"], told["precision"]) == ("gaussian", 0.25, True, "32")
    refused = scantly("evaluate", "--predictions", run / "predictions" / "test", "--labels", tmp_path, "--flips")
    assert refused.status == 2
    assert "options for windows" in refused.sentence


def test_settings_of_the_run_reach_the_model_file(scantly, sound: Path, tmp_path: Path, small) -> None:
    run = tmp_path / "run"
    words = ("train", sound, "--method", "supervised", "--labeled", "2", "--out", run, *small)
    stride = ("evaluation.inference.stride=[8,8]", "evaluation.inference.batch=2")
    outcome = scantly(*words, *stride, "evaluation.inference.largest_component=true")
    assert outcome.status == 0, outcome.err
    data = (run / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = json.loads(header["__metadata__"]["scantly"])["inference"]
    assert (told["stride"], told["largest_component"]) == ([8, 8], True)
    assert "batch" not in told
    again = scantly(*words, "evaluation.inference.stride=[8,8]", "evaluation.inference.largest_component=true")
    assert again.status == 0, again.err  # finished, and the batch is no other configuration
    labels = scantly("predict", run, sound / "imagesTs", "--out", tmp_path / "out")
    assert labels.status == 0, labels.err
    for path in (tmp_path / "out").iterdir():
        assert np.asarray(nib.load(path).dataobj).dtype == np.uint8


def test_a_stride_with_gaps_is_refused_before_training(scantly, sound: Path, tmp_path: Path, small) -> None:
    words = ("train", sound, "--method", "supervised", "--labeled", "2", "--out", tmp_path / "run", *small)
    outcome = scantly(*words, "evaluation.inference.stride=[8,64]")
    assert outcome.status == 2
    assert "evaluation.inference.stride 8 x 64 is larger than the window 32 x 32" in outcome.sentence
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def crossing(scantly, sound: Path, tmp_path_factory, small) -> Path:
    """A finished run of Diff-CL."""
    run = tmp_path_factory.mktemp("crossing") / "run"
    outcome = scantly("train", sound, "--method", "diffcl", "--labeled", "2", "--out", run, *small)
    assert outcome.status == 0, outcome.err
    return run


def test_a_finished_model_is_asked_for_another_predictor(scantly, crossing: Path, sound: Path, tmp_path: Path) -> None:
    found = []
    for name, words in {"cs": (), "ds": ("--set", "method.infer=ds", "method.sampling_steps=2")}.items():
        out = tmp_path / name
        outcome = scantly("predict", crossing, *words, "--out", out, "--device", "cpu", sound / "imagesTs")
        assert outcome.status == 0, outcome.err
        found.append(np.asarray(nib.load(out / "case6.nii.gz").dataobj))
    assert (found[0] != found[1]).any()


def test_the_asked_predictor_is_judged_apart(scantly, crossing: Path) -> None:
    words = ("--set", "method.sampling_steps=2", "--set", "method.infer=ds", "--device", "cpu", "--json")
    outcome = scantly("evaluate", crossing, *words)
    assert outcome.status == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["name"] == "test_infer-ds_sampling_steps-2"
    assert summary["changed"] == {"infer": "ds", "sampling_steps": 2}
    assert (crossing / "evaluation" / "test_infer-ds_sampling_steps-2.csv").is_file()
    assert not (crossing / "evaluation" / "test.json").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate"])
@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("method.inferr=ds", "unknown setting of method diffcl 'inferr'; did you mean 'infer'?"),
        ("method.mu1=1", "setting 'method.mu1' belongs to the training of this diffcl model"),
        ("method.infer=both", "setting 'method.infer' is 'both'"),
        ("method.infer.cs=1", "setting 'method.infer' is {'cs': 1}"),
        ("training.lr=1", "--set training is nothing that a finished model can change; only method.* is"),
        ("infer=ds", "--set infer is nothing that a finished model can change"),
        ("infer", "--set takes key=value"),
        ("method=ds", "--set method"),
    ],
)
def test_settings_that_a_finished_model_does_not_have(
    scantly, crossing: Path, sound: Path, tmp_path: Path, command: str, assignment: str, sentence: str
) -> None:
    rest = (sound / "imagesTs", "--out", tmp_path / "out") if command == "predict" else ()
    outcome = scantly(command, crossing, *rest, "--set", assignment)
    assert outcome.status == 2
    assert sentence in outcome.sentence
    assert not (tmp_path / "out").exists()


def test_other_methods_have_nothing_to_change(scantly, trained: Path, sound: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "out", "--set", "method.dice_background=false")
    outcome = scantly("predict", trained, sound / "imagesTs", *words)
    assert outcome.status == 2
    assert "supervised model; for a prediction nothing can be changed" in outcome.sentence


def test_label_maps_of_any_origin_have_no_method(scantly, tmp_path: Path) -> None:
    words = ("--predictions", tmp_path, "--labels", tmp_path, "--set", "method.infer=ds")
    outcome = scantly("evaluate", *words)
    assert outcome.status == 2
    assert "got --set and --predictions and --labels" in outcome.sentence
