import shutil

import nibabel as nib
import numpy as np
import pytest

from scantly.errors import ImageError, RunError
from scantly.training.evaluate import evaluate_folders
from scantly.training.resolve import resolve
from scantly.training.train import train_config


def test_references_score_perfectly_against_themselves(cohort, tmp_path):
    predictions = tmp_path / "predictions"
    shutil.copytree(cohort / "labelsTs", predictions)
    table, summary = evaluate_folders(predictions, cohort / "labelsTs", classes=("background", "RV", "MYO", "LV"))
    assert summary["overall"]["dice"]["mean"] == 1.0
    assert summary["overall"]["hd95_mm"]["mean"] == 0.0
    assert len(table) == 2 * 3


def test_pairs_that_do_not_fit_are_named(cohort, tmp_path):
    predictions = tmp_path / "predictions"
    shutil.copytree(cohort / "labelsTs", predictions)
    first = sorted(predictions.iterdir())[0]
    image = nib.load(first)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), 2 * image.affine), first)
    with pytest.raises(ImageError, match=first.name):
        evaluate_folders(predictions, cohort / "labelsTs")
    nib.save(nib.Nifti1Image(np.full(image.shape, 9, np.uint8), image.affine, image.header), first)
    with pytest.raises(ImageError, match="label 9"):
        evaluate_folders(predictions, cohort / "labelsTs", classes=("background", "a"))
    first.rename(predictions / "stranger.nii.gz")
    with pytest.raises(ImageError, match="no label for 'stranger'"):
        evaluate_folders(predictions, cohort / "labelsTs")
    with pytest.raises(ImageError, match="not a folder"):
        evaluate_folders(tmp_path / "nowhere", cohort / "labelsTs")


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    sets = {
        "plan": {"size": [32, 32], "spatial_dims": 2, "labeled_batch_size": 2},
        "network": {"arguments": {"widths": [4, 8], "dropout": [0, 0]}},
        "training": {"steps": 2, "device": "cpu"},
        "data": {"store": str(folder / "store")},
    }
    return train_config(resolve(cohort, flags={"method": "supervised"}, sets=sets), folder / "run", quiet=True)


def test_summary_says_what_was_measured_and_how(run):
    run.evaluate()
    summary = run.summary("test")
    assert (summary["split"], summary["protocol"], summary["selection"]) == ("test", "clean", "best")
    assert set(summary["classes"]) == {"RV", "MYO", "LV"}
    assert summary["definitions"]["hd95_mm"]["unit"] == "mm"
    table = run.evaluation("test")
    assert len(table) == 2 * 3
    by_hand = table.groupby("class")["dice"].mean().mean()
    assert summary["overall"]["dice"]["mean"] == pytest.approx(by_hand)


def test_unknown_or_unevaluated_splits(run):
    with pytest.raises(RunError, match="choose val or test"):
        run.evaluate("train")
    with pytest.raises(RunError, match="scantly evaluate"):
        run.summary("val")
