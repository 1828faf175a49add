import nibabel as nib
import numpy as np
import pytest

from scantly.errors import ImageError
from scantly.imaging import read_image, read_label
from scantly.inference.inputs import find_inputs
from scantly.inference.predict import Predictor, predict
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
        predict(trained.folder, [tmp_path], tmp_path)
    assert scan.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["patient.nii.gz"]
    assert predict(trained.folder, [scan], tmp_path / "out")


def test_numbered_scans_of_a_one_channel_model_keep_their_numbers(tmp_path):
    for name in ("scan_0001.nii.gz", "scan_0002.nii.gz", "other_0000.nii.gz"):
        (tmp_path / name).touch()
    assert sorted(find_inputs([tmp_path], channels=1)) == ["other", "scan_0001", "scan_0002"]
