import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

from scantly.data.plan import Plan
from scantly.errors import ConfigError, ImageError, RunError
from scantly.inference.model import load_model
from scantly.inference.settings import InferenceSettings
from scantly.inference.windows import predict_array
from scantly.training import engine, stages, validation
from scantly.training.evaluate import evaluate_run, score_run
from scantly.training.folders import evaluate_folders, score_folders
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
    with pytest.raises(ImageError, match="no reference for 1 of 2 predictions: stranger"):
        evaluate_folders(predictions, cohort / "labelsTs")
    with pytest.raises(ImageError, match="not a folder"):
        evaluate_folders(tmp_path / "nowhere", cohort / "labelsTs")


def references(folder, names="ab"):
    """Label files of one class in a corner, one per letter."""
    folder.mkdir()
    for name in names:
        label = np.zeros((6, 5, 4), np.uint8)
        label[:3] = 1
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_a_reference_without_prediction_is_no_success(tmp_path):
    """Two perfect predictions of four cases are no Dice of 1.000."""
    labels, predictions = references(tmp_path / "labels", "abcd"), references(tmp_path / "predictions", "bd")
    with pytest.raises(
        ImageError, match=r"predictions has no prediction for 2 of 4 references: a, c; .*--allow-missing"
    ):
        evaluate_folders(predictions, labels)
    table, summary = evaluate_folders(predictions, labels, allow_missing=True)
    assert list(table["case"]) == ["b", "d"]
    assert summary["missing"] == ["a", "c"]
    assert summary["overall"]["dice"]["mean"] == 1.0
    assert evaluate_folders(labels, labels)[1]["missing"] == []


def test_predictions_without_reference_are_all_named(tmp_path):
    labels, predictions = references(tmp_path / "labels", "a"), references(tmp_path / "predictions", "abc")
    with pytest.raises(ImageError, match=r"labels has no reference for 2 of 3 predictions: b, c; "):
        evaluate_folders(predictions, labels, allow_missing=True)


@pytest.mark.parametrize("side", ["labels", "predictions"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.nii", r"a\.nii.* and .*a\.nii.* are both label maps of 'a'; remove one"),
        ("b.mha", r"holds 1 file of a type that is not read: b\.mha"),
        ("z.dcm", r"holds 1 file of a type that is not read: z\.dcm"),
        ("more/b.nii.gz", r"files in subfolders, which are not searched: more/b\.nii\.gz"),
    ],
)
def test_what_would_not_be_scored_is_refused(tmp_path, side, name, words):
    folders = {kind: references(tmp_path / kind) for kind in ("labels", "predictions")}
    (folders[side] / name).parent.mkdir(exist_ok=True)
    (folders[side] / name).write_bytes(b"x")
    with pytest.raises(ImageError, match=words):
        evaluate_folders(folders["predictions"], folders["labels"])


def test_companions_and_what_predict_writes_beside_label_maps_are_passed_over(tmp_path):
    labels, predictions = references(tmp_path / "labels"), references(tmp_path / "predictions")
    for name in ("a_uncertainty.nii.gz", "a_probabilities.nii.gz", "a.dcm", "README.md", "Thumbs.db", ".DS_Store"):
        (predictions / name).write_bytes(b"x")
    assert set(evaluate_folders(predictions, labels)[0]["case"]) == {"a", "b"}


def test_a_case_may_be_called_like_an_uncertainty(tmp_path):
    labels = references(tmp_path / "labels")
    (labels / "a.nii.gz").rename(labels / "c_uncertainty.nii.gz")
    assert set(evaluate_folders(labels, labels)[0]["case"]) == {"b", "c_uncertainty"}


def test_an_unfinished_prediction_is_told(tmp_path, caplog):
    labels, predictions = references(tmp_path / "labels"), references(tmp_path / "predictions")
    (predictions / ".scantly-predictions.json").write_text("{}")
    evaluate_folders(predictions, labels)
    assert "predictions holds an unfinished prediction" in caplog.text


def test_cases_that_cannot_be_scored_are_all_told_and_the_others_are_scored(tmp_path):
    labels, predictions = references(tmp_path / "labels", "abcd"), references(tmp_path / "predictions", "abcd")
    (predictions / "a.nii.gz").write_bytes(b"no label")
    (labels / "b.nii.gz").write_bytes(b"no label")
    nib.save(nib.Nifti1Image(np.full((6, 5, 4), 7, np.uint8), np.eye(4)), predictions / "c.nii.gz")
    scores = score_folders(predictions, labels, classes=("background", "x"))
    assert list(scores.table["case"]) == ["d"]
    assert list(scores.failed) == ["a", "b", "c"]
    assert [failure["case"] for failure in scores.summary["failed"]] == ["a", "b", "c"]
    assert scores.summary["overall"]["cases"] == 1
    with pytest.raises(ImageError, match=r"^3 of 4 cases cannot be scored:\n  a: .*\n  b: .*\n  c: .*label 7"):
        evaluate_folders(predictions, labels, classes=("background", "x"))


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


@pytest.fixture
def spoilt(run, cohort):
    """The run, one of whose test scans is cut off for a while."""
    scan = sorted((cohort / "imagesTs").iterdir())[0]
    whole = scan.read_bytes()
    scan.write_bytes(whole[:300])
    yield scan.name.removesuffix("_0000.nii.gz")
    scan.write_bytes(whole)


def test_a_bad_test_case_does_not_end_the_evaluation_and_leaves_no_result(run, spoilt):
    before = {path: path.read_bytes() for path in (run.folder / "evaluation").glob("*")}
    shutil.rmtree(run.predictions("test"), ignore_errors=True)
    with pytest.raises(ImageError, match=f"{spoilt}_0000.* truncated"):
        run.evaluate("test")
    assert [path.name for path in run.predictions("test").iterdir()] != []
    scores = score_run(run, "test")
    assert list(scores.failed) == [spoilt]
    assert scores.table["case"].nunique() == 1
    assert scores.place is None
    assert {path: path.read_bytes() for path in (run.folder / "evaluation").glob("*")} == before


def test_two_evaluations_of_one_split_at_once(run):
    place = run.predictions("test")
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"), pytest.raises(RunError, match="another process is evaluating"):
        run.evaluate("test")


def test_unknown_or_unevaluated_splits(run):
    with pytest.raises(RunError, match="choose val or test"):
        run.evaluate("train")
    with pytest.raises(RunError, match="scantly evaluate"):
        run.summary("val")


def test_the_runs_inference_settings_hold_in_validation_and_in_its_model(cohort, tmp_path, monkeypatch):
    used = []

    def spy(network, array, *, settings, **options):
        used.append(settings)
        return predict_array(network, array, settings=settings, **options)

    monkeypatch.setattr(validation, "predict_array", spy)
    sets = {
        "plan": {"size": [32, 32], "spatial_dims": 2, "labeled_batch_size": 2},
        "network": {"arguments": {"widths": [4, 8], "dropout": [0, 0]}},
        "training": {"steps": 2, "device": "cpu"},
        "data": {"store": str(tmp_path / "store")},
        "evaluation": {"inference": {"flips": True, "largest_component": True, "batch": 3}},
    }
    trained = train_config(resolve(cohort, flags={"method": "supervised"}, sets=sets), tmp_path / "run", quiet=True)
    assert used
    assert all((asked.flips, asked.largest_component, asked.batch) == (True, True, 3) for asked in used)
    kept = load_model(trained.model_path).inference
    assert (kept.flips, kept.largest_component, kept.batch) == (True, True, None)
    trained.evaluate()
    assert trained.summary("test")["inference"] == {**kept.to_dict(), "precision": "32"}
    before = (trained.folder / "evaluation" / "test.json").read_bytes()
    summary = evaluate_run(trained, precision="bf16", inference={"flips": False})
    told = summary["inference"]
    assert (told["flips"], told["largest_component"], told["precision"]) == (False, True, "bf16")
    # the run's result under its protocol stays what it is
    assert summary["name"] == "test_flips-false_bf16"
    assert (trained.folder / "evaluation" / "test.json").read_bytes() == before
    assert trained.summary("test_flips-false_bf16") == summary
    assert trained.evaluation("test_flips-false_bf16") is not None
    with pytest.raises(ConfigError, match=r"sides of 31 x 31 do not fit network unet.*--size"):
        evaluate_run(trained, inference={"patch_size": [31, 31]})
    evaluate_run(trained, inference={"flips": True})  # no change: the usual place
    assert not (trained.folder / "evaluation" / "test_flips-true.json").exists()


def test_relabeling_uses_the_runs_windows_but_keeps_all_components(tmp_path, monkeypatch):
    class FakeStore:
        def read_image(self, case, index):
            return np.zeros((1, 2, 4, 4), np.float32)

        def record(self, case):
            return SimpleNamespace(geometry=None)

    probs = np.zeros((2, 2, 4, 4), np.float32)
    probs[0] = 0.5
    probs[1, 0, 0, 0] = probs[1, 1, 3, 2:] = 0.9
    asked = InferenceSettings(stride=(2, 2), largest_component=True)
    used = []

    def fake(*_, settings, **__):
        used.append(settings)
        return probs

    monkeypatch.setattr(stages, "predict_array", fake)
    monkeypatch.setattr(stages, "restore_label", lambda labels, *_: labels)
    monkeypatch.setattr(stages, "write_label", lambda *_: None)
    method = SimpleNamespace(predictor=nn.Identity(), pseudo_labels=lambda probs: probs.argmax(0))
    plan = Plan(
        spatial_dims=2,
        normalization=[{"scheme": "none"}],
        patch_size=(4, 4),
        labeled_batch_size=1,
        unlabeled_batch_size=1,
    )
    written = stages.relabel(
        method,
        ["a"],
        store=FakeStore(),
        plan=plan,
        device=torch.device("cpu"),
        folder=tmp_path,
        inference=asked,
    )
    assert used == [asked]
    np.testing.assert_array_equal(written.read("a", (slice(None),) * 3), probs.argmax(0))


def test_probability_files_are_no_label_maps(cohort, tmp_path):
    predictions = tmp_path / "predictions"
    shutil.copytree(cohort / "labelsTs", predictions)
    first = sorted(predictions.iterdir())[0]
    shutil.copy(first, predictions / first.name.replace(".nii.gz", "_probabilities.nii.gz"))
    table, _ = evaluate_folders(predictions, cohort / "labelsTs", classes=("background", "RV", "MYO", "LV"))
    assert len(table) == 2 * 3


@pytest.fixture(scope="module")
def crossing(cohort, tmp_path_factory):
    """A run of Diff-CL of two steps, whose last iteration predicts."""
    folder = tmp_path_factory.mktemp("crossing")
    sets = {
        "plan": {"size": [32, 32], "spatial_dims": 2, "labeled_batch_size": 2, "unlabeled_batch_size": 2},
        "network": {"arguments": {"widths": [4, 8], "dropout": [0, 0]}},
        "training": {"steps": 2, "device": "cpu"},
        "data": {"store": str(folder / "store")},
        "evaluation": {"selection": "last"},
    }
    config = resolve(cohort, flags={"method": "diffcl", "labeled": 2}, sets=sets)
    return train_config(config, folder / "run", quiet=True)


def test_what_the_method_was_asked_for_has_a_place_of_its_own(crossing):
    usual = evaluate_run(crossing, "val", device="cpu")
    assert usual["name"] == "val"
    assert "changed" not in usual
    before = (crossing.folder / "evaluation" / "val.json").read_bytes()
    asked = {"infer": "ds", "sampling_steps": 2}
    summary = evaluate_run(crossing, "val", device="cpu", method=asked)
    assert summary["name"] == "val_infer-ds_sampling_steps-2"
    assert summary["changed"] == asked
    assert summary["inference"]["window"] == usual["inference"]["window"]
    assert crossing.summary("val_infer-ds_sampling_steps-2") == summary
    assert crossing.evaluation("val_infer-ds_sampling_steps-2") is not None
    assert (crossing.folder / "evaluation" / "val.json").read_bytes() == before
    maps = [
        np.asarray(nib.load(next(crossing.predictions(name).iterdir())).dataobj) for name in ("val", summary["name"])
    ]
    assert (maps[0] != maps[1]).any()
    assert evaluate_run(crossing, "val", device="cpu", method={"infer": "cs"})["name"] == "val"
    both = evaluate_run(crossing, "test", device="cpu", method={"infer": "mean"}, inference={"flips": True})
    assert both["name"] == "test_flips-true_infer-mean"


def test_the_places_of_results_are_named_alike(crossing):
    """As in test_flips-true."""
    name = evaluate_run(crossing, "val", device="cpu", method={"sampling_clip": True})["name"]
    assert name == "val_sampling_clip-true"


def test_a_setting_that_was_the_trainings_is_refused_and_leaves_nothing(crossing):
    before = sorted(path.name for path in (crossing.folder / "evaluation").glob("*"))
    for values, sentence in (
        ({"queue": 3}, "belongs to the training of this diffcl model"),
        ({"sampling": 3}, "unknown setting of method diffcl 'sampling'"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            evaluate_run(crossing, "val", device="cpu", method=values)
    assert sorted(path.name for path in (crossing.folder / "evaluation").glob("*")) == before


def test_a_run_of_another_method_has_nothing_to_change(run):
    with pytest.raises(ConfigError, match="for a prediction nothing can be changed"):
        evaluate_run(run, "test", device="cpu", method={"dice_background": False})


@pytest.mark.parametrize("convention", ["clean", "literature"])
def test_a_class_in_neither_mask_in_validation(monkeypatch, convention):
    """Two cases, classes RV, MYO, LV: case one has RV and LV, found exactly; case two MYO, missed.

    Clean: RV (1) / 1, MYO (0) / 1, LV (1) / 1 and their mean 2/3; literature: RV (1 + 0) / 2, MYO (0 + 0) / 2, LV
    (1 + 0) / 2 and their mean 1/3, as what is in neither mask counts 0 in the choice of the checkpoint too.
    """
    shape = (1, 8, 8)
    one, two, nothing = np.zeros((3, *shape), np.uint8)
    one[0, :2], one[0, 4:], two[0, 3:5] = 1, 3, 2
    predictions = {"one": one, "two": nothing}
    references = {"one": one, "two": two}
    dataset = SimpleNamespace(
        classes=("background", "RV", "MYO", "LV"), read_label=lambda case: SimpleNamespace(array=references[case])
    )
    store = SimpleNamespace(read_image=lambda case, index: case, record=lambda case: case)
    monkeypatch.setattr(validation, "predict_array", lambda network, image, **_: image)
    monkeypatch.setattr(validation, "label_on_original_grid", lambda probs, *_, **__: predictions[probs])
    values = validation.validate(
        nn.Identity(),
        ["one", "two"],
        dataset=dataset,
        store=store,
        plan=SimpleNamespace(spatial_dims=2, patch_size=(8, 8)),
        device=torch.device("cpu"),
        autocast=nullcontext(),
        convention=convention,
    )
    expected = {"clean": (2 / 3, 1.0, 0.0, 1.0), "literature": (1 / 3, 0.5, 0.0, 0.5)}[convention]
    assert list(values.values()) == pytest.approx(expected)
    assert list(values) == ["val/dice", "val/dice/RV", "val/dice/MYO", "val/dice/LV"]


def test_the_run_validates_by_its_protocol(cohort, tmp_path, monkeypatch):
    asked = []

    def spy(*arguments, convention, **options):
        asked.append(convention)
        return validation.validate(*arguments, convention=convention, **options)

    monkeypatch.setattr(engine, "validate", spy)
    for protocol in ("clean", "literature"):
        sets = {
            "plan": {"size": [32, 32], "spatial_dims": 2, "labeled_batch_size": 2},
            "network": {"arguments": {"widths": [4, 8], "dropout": [0, 0]}},
            "training": {"steps": 2, "device": "cpu"},
            "data": {"store": str(tmp_path / "store")},
            "evaluation": {"protocol": protocol},
        }
        config = resolve(cohort, flags={"method": "supervised"}, sets=sets)
        train_config(config, tmp_path / protocol, quiet=True)
    assert set(asked[: len(asked) // 2]) == {"clean"}
    assert set(asked[len(asked) // 2 :]) == {"literature"}


def test_folders_are_scored_by_the_convention_asked_for(cohort, tmp_path):
    """A class that neither folder holds: left out, or 0."""
    predictions = tmp_path / "predictions"
    shutil.copytree(cohort / "labelsTs", predictions)
    classes = ("background", "RV", "MYO", "LV", "atrium")
    for convention, mean in (("clean", 1.0), ("literature", 0.75)):
        table, summary = evaluate_folders(predictions, cohort / "labelsTs", classes=classes, convention=convention)
        assert summary["overall"]["dice"]["mean"] == summary["overall"]["jaccard"]["mean"] == mean
        assert summary["classes"]["atrium"]["both_empty"] == len(table) / 4
