import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch

from scantly.data.plan import Plan
from scantly.errors import ConfigError, DeviceError, ImageError, RunError
from scantly.imaging import read_image, read_label
from scantly.inference.inputs import find_inputs
from scantly.inference.model import load_model, save_model
from scantly.inference.original import largest_components
from scantly.inference.predict import Predictor, predict, predict_folder
from scantly.inference.settings import InferenceSettings
from scantly.inference.windows import entropy
from scantly.methods.base import Task
from scantly.methods.diffcl import DiffCL
from scantly.methods.supervised import Supervised
from scantly.training.resolve import resolve
from scantly.training.train import train_config


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    sets = {
        "plan": {
            "size": [32, 32],
            "normalization": [{"scheme": "zscore"}],
            "labeled_batch_size": 4,
            "unlabeled_batch_size": 4,
            "spatial_dims": 2,
        },
        "network": {"arguments": {"widths": [8, 16, 32], "dropout": [0.0, 0.0, 0.0]}},
        "training": {"steps": 300, "device": "cpu", "lr": 0.02},
        "data": {"store": str(folder / "store")},
    }
    config = resolve(cohort, flags={"method": "supervised"}, sets=sets)
    return train_config(config, folder / "run", quiet=True)


def test_a_prediction_has_its_inputs_exact_geometry(trained, cohort, tmp_path):
    source = next((cohort / "imagesTs").glob("*.nii.gz"))
    written = predict(trained.folder, [source], tmp_path, uncertainty=True)
    image = nib.load(source)
    for path in (written[0], tmp_path / written[0].name.replace(".nii.gz", "_uncertainty.nii.gz")):
        out = nib.load(path)
        assert np.array_equal(out.affine, image.affine)
        assert out.shape == image.shape
        assert out.header["sform_code"] == image.header["sform_code"]
        assert out.header["qform_code"] == image.header["qform_code"]
        assert out.header.get_xyzt_units() == image.header.get_xyzt_units()
    spread = np.asarray(nib.load(tmp_path / written[0].name.replace(".nii.gz", "_uncertainty.nii.gz")).dataobj)
    assert 0 <= spread.min() <= spread.max() <= 1
    assert spread.max() > 0


@pytest.mark.parametrize("axes", [((1, -1), (0, 1), (2, 1)), ((0, -1), (1, -1), (2, -1)), ((2, 1), (0, 1), (1, 1))])
def test_the_same_scan_stored_in_another_orientation_gets_the_same_labels(trained, cohort, tmp_path, axes):
    source = nib.load(next((cohort / "imagesTs").glob("*.nii.gz")))
    turned = source.as_reoriented(np.array(axes, dtype=float))
    nib.save(turned, tmp_path / "turned_0000.nii.gz")
    nib.save(source, tmp_path / "same_0000.nii.gz")
    predict(trained.folder, [tmp_path / "turned_0000.nii.gz", tmp_path / "same_0000.nii.gz"], tmp_path / "out")
    same, other = (nib.load(tmp_path / "out" / f"{name}.nii.gz") for name in ("same", "turned"))
    back = nib.as_closest_canonical(other).get_fdata()
    assert np.array_equal(back, nib.as_closest_canonical(same).get_fdata())
    assert np.array_equal(other.affine, turned.affine)
    assert back.max() > 0


def test_it_learned_something(trained, cohort):
    case = next((cohort / "imagesTs").glob("*.nii.gz"))
    labels = Predictor.load(trained.folder, device="cpu").predict([case]).labels
    reference = read_label(cohort / "labelsTs" / case.name.replace("_0000", "")).array
    foreground = (labels > 0) & (reference > 0)
    assert 2 * foreground.sum() / ((labels > 0).sum() + (reference > 0).sum()) > 0.4


def test_png_input_gives_png_output(trained, cohort, tmp_path):
    from PIL import Image

    case = next((cohort / "imagesTs").glob("*.nii.gz"))
    plane = read_image([case]).array[0, 2]
    scaled = (255 * (plane - plane.min()) / np.ptp(plane)).astype(np.uint8)
    Image.fromarray(scaled).save(tmp_path / "slice_0000.png")
    (path,) = predict(trained.folder, [tmp_path / "slice_0000.png"], tmp_path / "out")
    assert path.name == "slice.png"
    assert np.asarray(Image.open(path)).shape == scaled.shape


def test_inputs_are_found_and_faults_named(tmp_path):
    for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", ".hidden_0000.nii.gz"):
        (tmp_path / name).touch()
    found = find_inputs([tmp_path], channels=2)
    assert {name: [p.name for p in files] for name, files in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    with pytest.raises(ImageError, match="'a' has channels"):
        find_inputs([tmp_path], channels=3)
    with pytest.raises(ImageError, match="does not exist"):
        find_inputs([tmp_path / "no.nii.gz"], channels=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no scans"):
        find_inputs([tmp_path / "empty"], channels=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a_0000.nii.gz").touch()
    with pytest.raises(ImageError, match="both channel 0 of 'a'"):
        find_inputs([tmp_path / "a_0000.nii.gz", tmp_path / "other"], channels=1)


def test_a_scan_is_never_overwritten_by_its_prediction(trained, cohort, tmp_path):
    """Without a channel suffix, scan and label map would have one name."""
    scan = tmp_path / "patient.nii.gz"
    scan.write_bytes(next((cohort / "imagesTs").glob("*.nii.gz")).read_bytes())
    before = scan.read_bytes()
    with pytest.raises(ImageError, match=r"patient\.nii\.gz is a scan .* choose another --out"):
        predict(trained.folder, [scan], tmp_path)
    assert scan.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["patient.nii.gz"]
    assert predict(trained.folder, [scan], tmp_path / "out")


def test_numbered_scans_of_a_one_channel_model_keep_their_numbers(tmp_path):
    for name in ("scan_0001.nii.gz", "scan_0002.nii.gz", "other_0000.nii.gz"):
        (tmp_path / name).touch()
    assert sorted(find_inputs([tmp_path], channels=1)) == ["other", "scan_0001", "scan_0002"]


def scans_of(cohort, folder):
    """Three scans in a folder: the two test cases and a copy."""
    folder.mkdir()
    sources = sorted((cohort / "imagesTs").glob("*.nii.gz"))
    for name, source in zip(("a", "b", "c"), (*sources, sources[0]), strict=True):
        (folder / f"{name}_0000.nii.gz").write_bytes(source.read_bytes())
    return folder


@pytest.fixture
def passes(monkeypatch):
    """Names of the scans that were really predicted."""
    seen = []
    original = Predictor.predict

    def spy(self, images, **options):
        seen.append(images[0].name[0])
        return original(self, images, **options)

    monkeypatch.setattr(Predictor, "predict", spy)
    return seen


def test_an_interrupted_prediction_goes_on_where_it_was(trained, cohort, tmp_path, passes):
    scans, out = scans_of(cohort, tmp_path / "scans"), tmp_path / "out"

    def stop(done, total, case):
        if case == "c":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(trained.folder, [scans], out, progress=stop)
    assert sorted(path.name for path in out.iterdir()) == [".scantly-predictions.json", "a.nii.gz", "b.nii.gz"]
    before = {name: (out / name).stat().st_mtime_ns for name in ("a.nii.gz", "b.nii.gz")}
    outcome = predict_folder(trained.folder, [scans], out)
    assert passes == ["a", "b", "c"]
    assert (outcome.files, outcome.present) == ([out / f"{name}.nii.gz" for name in "abc"], 2)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert sorted(path.name for path in out.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    predict(trained.folder, [scans], out)  # complete: the same command makes all of them again
    assert passes == [*"abc", *"abc"]


@pytest.mark.parametrize("change", ["scan", "missing", "settings", "precision", "uncertainty", "model"])
def test_what_has_changed_meanwhile_is_predicted_again(trained, cohort, tmp_path, passes, change):
    scans, out, model = scans_of(cohort, tmp_path / "scans"), tmp_path / "out", tmp_path / "model.safetensors"
    shutil.copy(trained.model_path, model)
    (scans / "c_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match="1 of 3 scans cannot be predicted"):
        predict(model, [scans], out)
    shutil.copy(scans / "a_0000.nii.gz", scans / "c_0000.nii.gz")
    passes.clear()
    options = {}
    if change == "scan":
        os.utime(scans / "a_0000.nii.gz", ns=(1, 1))
    elif change == "missing":
        (out / "a.nii.gz").unlink()
    elif change == "settings":
        options = {"inference": {"flips": True}}
    elif change == "precision":
        options = {"precision": "bf16"}
    elif change == "uncertainty":
        options = {"uncertainty": True}
    else:
        other_model(trained, model)
    predict(model, [scans], out, **options)
    assert passes == (["a", "c"] if change in {"scan", "missing"} else ["a", "b", "c"])


def other_model(trained, path):
    """The trained model with halved weights."""
    loaded = load_model(trained.model_path)
    weights = {name: 0.5 * tensor for name, tensor in loaded.network.state_dict().items()}
    save_model(
        path, weights, task=loaded.task, plan=loaded.plan, method=loaded.method, configuration=loaded.configuration
    )
    return path


def test_uncertainty_maps_of_another_model_are_not_taken_for_ones_own(trained, cohort, tmp_path):
    scans, out, other = scans_of(cohort, tmp_path / "scans"), tmp_path / "out", tmp_path / "other.safetensors"
    other_model(trained, other)
    predict(trained.folder, [scans], out, uncertainty=True)
    sound = (scans / "c_0000.nii.gz").read_bytes()
    (scans / "c_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match="1 of 3 scans"):
        predict(other, [scans], out)
    (scans / "c_0000.nii.gz").write_bytes(sound)
    assert predict_folder(other, [scans], out, uncertainty=True).present == 0
    predict(other, [scans], tmp_path / "fresh", uncertainty=True)
    for name in ("a_uncertainty.nii.gz", "b_uncertainty.nii.gz"):
        np.testing.assert_array_equal(*(nib.load(folder / name).get_fdata() for folder in (out, tmp_path / "fresh")))


def test_a_journal_of_another_model_is_gone_before_the_first_scan_is_written(trained, cohort, tmp_path):
    """A kill after that must not leave the other model's list beside this model's files."""
    scans, out = scans_of(cohort, tmp_path / "scans"), tmp_path / "out"
    (scans / "c_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match="1 of 3 scans"):
        predict(trained.folder, [scans], out)

    def look(done, total, case):
        assert not (out / ".scantly-predictions.json").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(other_model(trained, tmp_path / "other.safetensors"), [scans], out, progress=look)


def test_the_uncertainty_of_one_scan_is_not_the_label_of_another(trained, cohort, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    for name in ("a_0000.nii.gz", "a_uncertainty_0000.nii.gz"):
        shutil.copy(next((cohort / "imagesTs").glob("*.nii.gz")), scans / name)
    with pytest.raises(ImageError, match=r"a_uncertainty\.nii\.gz would be written for both .*a_0000.* and .*rename"):
        predict(trained.folder, [scans], out, uncertainty=True)
    assert not out.exists()
    assert len(predict(trained.folder, [scans], out)) == 2


def test_when_all_scans_fail_none_is_said_to_be_there(trained, cohort, tmp_path):
    (tmp_path / "scans").mkdir()
    for name in "ab":
        (tmp_path / "scans" / f"{name}_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match=r"^2 of 2 scans cannot be predicted; mend or remove them"):
        predict(trained.folder, [tmp_path / "scans"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_scan_does_not_keep_the_others_from_being_predicted(trained, cohort, tmp_path, passes):
    scans, out = scans_of(cohort, tmp_path / "scans"), tmp_path / "out"
    for name in "ab":
        (scans / f"{name}_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match="2 of 3 scans cannot be predicted, the others are in ") as caught:
        predict(trained.folder, [scans], out)
    first, *others = str(caught.value).splitlines()
    assert "give the same command again" in first
    assert [str(scans / f"{name}_0000.nii.gz") in line for name, line in zip("ab", others, strict=True)] == [True] * 2
    assert (out / "c.nii.gz").is_file()


def test_whatever_is_wrong_with_one_scan_the_others_are_predicted(trained, cohort, tmp_path, passes, monkeypatch):
    """A link to nothing, a second channel, a name too long for its output, and one that is too large."""
    scans, out = scans_of(cohort, tmp_path / "scans"), tmp_path / "out"
    (scans / "d_0000.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    shutil.copy(scans / "a_0000.nii.gz", scans / "b_0001.nii.gz")
    long = "e" * 240
    shutil.copy(scans / "a_0000.nii.gz", scans / f"{long}_0000.nii.gz")
    spied = Predictor.predict

    def too_large(self, images, **options):
        if images[0].name.startswith("c"):
            raise DeviceError("too large.")
        return spied(self, images, **options)

    monkeypatch.setattr(Predictor, "predict", too_large)
    outcome = predict_folder(trained.folder, [scans], out, uncertainty=True)
    ends = {
        "b": "named <case>_0000, <case>_0001, ...",
        "c": "too large.",
        "d": "d_0000.nii.gz does not exist.",
        long: f"a name of 259 bytes, 255 are possible; give the scan '{long}' a shorter name.",
    }
    assert sorted(name for name, _ in outcome.failed) == sorted(ends)
    assert all(str(error).endswith(ends[name]) for name, error in outcome.failed)
    assert sorted(path.name for path in out.glob("*.nii.gz")) == ["a.nii.gz", "a_uncertainty.nii.gz"]
    monkeypatch.setattr(Predictor, "predict", spied)
    passes.clear()
    (scans / "b_0001.nii.gz").unlink()
    assert predict_folder(trained.folder, [scans], out, uncertainty=True).present == 1
    assert passes == ["b", "c", "d"]


def test_two_predictions_into_one_folder_at_once(trained, cohort, tmp_path):
    out = tmp_path / "out"

    def again(done, total, case):
        if not case:  # the end, behind the lock
            return
        refused.append(case)
        with pytest.raises(RunError, match=r"another process is predicting in .*out; wait for it or choose another"):
            predict(trained.folder, [cohort / "imagesTs"], out)

    refused = []
    predict(trained.folder, [cohort / "imagesTs"], out, progress=again)
    assert len(refused) == 2
    assert all(path.name.endswith(".nii.gz") for path in out.iterdir())


def test_what_a_kill_left_is_removed(trained, cohort, tmp_path):
    (tmp_path / ".tmp-1234-a.nii.gz").write_bytes(b"half")
    written = predict(trained.folder, [next((cohort / "imagesTs").glob("*.nii.gz"))], tmp_path)
    assert list(tmp_path.iterdir()) == written


@pytest.mark.parametrize("content", ["[]", '{"key": "1", "done": []}', '{"key": "1", "done": {"a": "state"}}'])
def test_a_damaged_journal_is_named(trained, cohort, tmp_path, content):
    (tmp_path / ".scantly-predictions.json").write_text(content)
    with pytest.raises(ConfigError, match=r"\.scantly-predictions\.json does not list predictions; remove it"):
        predict(trained.folder, [next((cohort / "imagesTs").glob("*.nii.gz"))], tmp_path)


def test_probabilities_lie_on_the_scans_grid_and_agree_with_labels_and_uncertainty(trained, cohort, tmp_path):
    source = sorted((cohort / "imagesTs").glob("*.nii.gz"))[0]
    (label,) = predict(
        trained.folder, [source], tmp_path, uncertainty=True, probabilities=True, inference={"flips": True}
    )
    image, labels = nib.load(source), nib.load(label)
    case = label.name.removesuffix(".nii.gz")
    written = nib.load(tmp_path / f"{case}_probabilities.nii.gz")
    assert written.shape == (*image.shape, 4)
    assert written.get_data_dtype() == np.float32
    assert np.array_equal(written.affine, image.affine)
    probs = np.asarray(written.dataobj)
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probs.argmax(-1), np.asarray(labels.dataobj))
    spread = np.asarray(nib.load(tmp_path / f"{case}_uncertainty.nii.gz").dataobj)
    by_hand = -(probs * np.log(np.clip(probs, 1e-12, 1))).sum(-1) / np.log(4)
    np.testing.assert_allclose(spread, by_hand, atol=1e-5)
    plain = predict(trained.folder, [source], tmp_path / "plain")
    assert not np.array_equal(nib.load(plain[0]).get_fdata(), labels.get_fdata()) or spread.max() > 0


def test_probabilities_of_a_picture_are_nifti(trained, cohort, tmp_path):
    from PIL import Image

    plane = read_image([next((cohort / "imagesTs").glob("*.nii.gz"))]).array[0, 2]
    Image.fromarray((255 * (plane - plane.min()) / np.ptp(plane)).astype(np.uint8)).save(tmp_path / "slice.png")
    predict(trained.folder, [tmp_path / "slice.png"], tmp_path / "out", probabilities=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["slice.png", "slice_probabilities.nii.gz"]
    assert nib.load(tmp_path / "out" / "slice_probabilities.nii.gz").shape == (*plane.T.shape, 1, 4)


def test_settings_of_the_model_hold_unless_others_are_asked_for(trained):
    model = load_model(trained.model_path)
    kept = replace(model, inference=InferenceSettings(flips=True, largest_component=True))
    assert Predictor(kept, device="cpu").settings == kept.inference
    assert Predictor(kept, device="cpu", inference={"flips": False}).settings.flips is False
    with pytest.raises(ConfigError, match="unknown precision '16'"):
        Predictor(model, device="cpu", precision="16")
    with pytest.raises(ConfigError, match="stride is 4 x 8 x 8, but the model is 2D"):
        Predictor(model, device="cpu", inference={"stride": [4, 8, 8]})


def test_largest_component_and_bf16_change_what_they_say(trained, cohort):
    source = sorted((cohort / "imagesTs").glob("*.nii.gz"))[0]
    plain = Predictor.load(trained.folder, device="cpu").predict([source]).labels
    chosen = (
        Predictor.load(trained.folder, device="cpu", inference={"largest_component": True}).predict([source]).labels
    )
    np.testing.assert_array_equal(chosen, largest_components(plain))
    half = Predictor.load(trained.folder, device="cpu", precision="bf16").predict([source], probabilities=True)
    whole = Predictor.load(trained.folder, device="cpu").predict([source], probabilities=True)
    difference = np.abs(half.probabilities - whole.probabilities)
    assert 0 < difference.max() < 0.2
    assert (half.labels == whole.labels).mean() > 0.98


def test_too_little_memory_ends_in_a_sentence(trained, cohort, monkeypatch):
    source = next((cohort / "imagesTs").glob("*.nii.gz"))
    predictor = Predictor.load(trained.folder, device="cpu")

    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("scantly.inference.predict.label_on_original_grid", fail)
    with pytest.raises(DeviceError, match=r"needs about .* on the scan's own grid"):
        predictor.predict([source])
    monkeypatch.setattr(predictor.model.network, "forward", fail)
    with pytest.raises(
        DeviceError, match=r"for \d x windows of 32 x 32 \(y, x\) voxels; a batch of \d may fit: --batch"
    ):
        predictor.predict([source])


def test_what_the_scans_own_grid_takes_is_checked_before_the_network_runs(trained, cohort, monkeypatch):
    """Labels take 20 bytes per voxel of the scan, probabilities 16 more (4 classes), and 16 per prepared voxel."""
    source = next((cohort / "imagesTs").glob("*.nii.gz"))
    depth, *sides = read_image([source]).array.shape[1:]
    voxels, prepared = depth * sides[0] * sides[1], depth * 32 * 32
    predictor = Predictor.load(trained.folder, device="cpu")
    free = 20 * voxels + 16 * prepared
    monkeypatch.setattr("scantly.inference.predict.available_bytes", lambda device: free)
    assert predictor.predict([source]).labels.any()
    monkeypatch.setattr(predictor.model.network, "forward", None)  # must not be called
    with pytest.raises(DeviceError, match=r"on the scan's own grid, .* are free; .* leave out --probabilities\.$"):
        predictor.predict([source], probabilities=True)
    monkeypatch.setattr("scantly.inference.predict.available_bytes", lambda device: free - 1)
    with pytest.raises(DeviceError, match=r"on the scan's own grid, .* are free; free memory\.$"):
        predictor.predict([source])


@pytest.fixture
def volumetric(tmp_path):
    """An untrained V-Net for patches of 16 x 16 x 16."""
    torch.manual_seed(0)
    task = Task(1, ("background", "a"), 3, (16, 16, 16), "vnet", {"widths": [4, 8], "blocks": [1, 1]})
    plan = Plan(
        spatial_dims=3,
        spacing=(1, 1, 1),
        normalization=[{"scheme": "zscore"}],
        patch_size=(16, 16, 16),
        labeled_batch_size=1,
        unlabeled_batch_size=1,
    )
    weights = Supervised(task, Supervised.Config()).predictor.state_dict()
    path = tmp_path / "model.safetensors"
    save_model(path, weights, task=task, plan=plan, method="supervised", configuration={})
    return path


def test_a_single_slice_for_a_volumetric_model_is_told(volumetric, trained, tmp_path, caplog):
    rng = np.random.default_rng(0)
    for name, shape in (("flat", (24, 24, 1)), ("deep", (24, 24, 20))):
        nib.save(nib.Nifti1Image(rng.normal(size=shape), np.eye(4)), tmp_path / f"{name}.nii.gz")
    scans = [tmp_path / "flat.nii.gz", tmp_path / "deep.nii.gz"]
    predict(volumetric, scans, tmp_path / "out")
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(scans[0]) in message and "a single slice" in message
    caplog.clear()
    predict(trained.folder, scans[:1], tmp_path / "by-slices")
    assert "single slice" not in caplog.text


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("values", [{}, {"window": "whole"}, {"window": "uniform", "stride": [4, 8, 8]}])
def test_volumes_by_windows_and_in_one_pass(volumetric, tmp_path, values, precision):
    scan = np.random.default_rng(0).normal(size=(15, 24, 9))
    nib.save(nib.Nifti1Image(scan, np.diag([-1.0, 1.2, 2.0, 1])), tmp_path / "scan.nii.gz")
    predictor = Predictor.load(volumetric, device="cpu", precision=precision, inference=values)
    prediction = predictor.predict([tmp_path / "scan.nii.gz"], uncertainty=True, probabilities=True)
    assert prediction.labels.shape == (9, 24, 15)
    assert prediction.probabilities.shape == (2, 9, 24, 15)
    np.testing.assert_allclose(prediction.probabilities.sum(0), 1, atol=1e-5)
    assert prediction.probabilities.dtype == np.float32
    np.testing.assert_array_equal(prediction.labels, prediction.probabilities.argmax(0))
    np.testing.assert_allclose(prediction.uncertainty, entropy(prediction.probabilities), atol=1e-6)


def write_diffcl(path, widths=(4, 8)):
    """An untrained Diff-CL model of slices of 32 x 32."""
    torch.manual_seed(0)
    arguments = {"widths": list(widths), "dropout": [0.0] * len(widths)}
    task = Task(1, ("background", "a", "b"), 2, (32, 32), "unet", arguments)
    plan = Plan(
        spatial_dims=2,
        normalization=[{"scheme": "zscore"}],
        patch_size=(32, 32),
        labeled_batch_size=1,
        unlabeled_batch_size=1,
    )
    weights = DiffCL(task, DiffCL.Config()).predictor.state_dict()
    save_model(path, weights, task=task, plan=plan, method="diffcl", configuration={})
    return path


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_the_method_is_asked_for_another_predictor(cohort, tmp_path, precision):
    model, source = write_diffcl(tmp_path / "model.safetensors"), next((cohort / "imagesTs").glob("*.nii.gz"))
    found = {}
    for name, values in {
        "usual": None,
        "cs": {"infer": "cs"},
        "ds": {"infer": "ds", "sampling_steps": 2},
        "again": {"infer": "ds", "sampling_steps": 2},
        "seed": {"infer": "ds", "sampling_steps": 2, "sampling_seed": 1},
        "mean": {"infer": "mean", "sampling_steps": 2},
    }.items():
        (written,) = predict(
            model, [source], tmp_path / name, method=values, probabilities=True, precision=precision, device="cpu"
        )
        found[name] = np.asarray(nib.load(written).dataobj)
        probs = nib.load(written.with_name(written.name.replace(".nii.gz", "_probabilities.nii.gz"))).get_fdata()
        np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-4)
        found[f"{name} probabilities"] = probs
    assert np.array_equal(found["usual"], found["cs"])
    assert np.array_equal(found["ds"], found["again"])
    for one, other in (("cs", "ds"), ("ds", "seed"), ("cs", "mean"), ("ds", "mean")):
        assert not np.array_equal(found[f"{one} probabilities"], found[f"{other} probabilities"])
    assert (found["cs"] != found["ds"]).any()
    half = (found["cs probabilities"] + found["ds probabilities"]) / 2
    np.testing.assert_allclose(found["mean probabilities"], half, atol=1e-2 if precision == "bf16" else 1e-4)


def test_with_other_settings_of_the_method_everything_is_predicted_again(cohort, tmp_path, passes):
    scans, out, model = scans_of(cohort, tmp_path / "scans"), tmp_path / "out", tmp_path / "model.safetensors"
    write_diffcl(model)
    sound = (scans / "c_0000.nii.gz").read_bytes()
    (scans / "c_0000.nii.gz").write_bytes(b"no scan")
    with pytest.raises(ImageError, match="1 of 3 scans cannot be predicted"):
        predict(model, [scans], out)
    (scans / "c_0000.nii.gz").write_bytes(sound)
    passes.clear()
    assert predict_folder(model, [scans], out, method={"infer": "ds", "sampling_steps": 1}).present == 0
    assert passes == ["a", "b", "c"]


def test_nothing_is_written_where_a_setting_of_the_method_is_refused(cohort, tmp_path):
    model = write_diffcl(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="belongs to the training"):
        predict(model, [cohort / "imagesTs"], tmp_path / "out", method={"eta": 1.0})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("infer", ["cs", "ds"])
def test_one_pass_over_the_whole_fits_the_sides_that_the_networks_need(tmp_path, infer):
    """Six levels take multiples of 32; slices of 32 x 48 are padded to these."""
    model = write_diffcl(tmp_path / "model.safetensors", widths=(4,) * 6)
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(32, 48, 2)), np.eye(4)), tmp_path / "scan.nii.gz")
    settings = {"infer": infer, "sampling_steps": 1}
    written = predict(
        model, [tmp_path / "scan.nii.gz"], tmp_path / "out", inference={"window": "whole"}, method=settings
    )
    assert nib.load(written[0]).shape == (32, 48, 2)
