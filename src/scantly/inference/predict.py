"""Predict scans: files, folders or the cases of a dataset, in the geometry of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scantly.data.plan import Plan
from scantly.data.prepare import Record, prepare, restore, restore_label
from scantly.errors import DeviceError, ImageError
from scantly.imaging import Geometry, file_ending, read_image, write_label, write_scalar
from scantly.inference.inputs import find_inputs
from scantly.inference.model import Model, load_model
from scantly.inference.windows import entropy, predict_array

__all__ = [
    "Prediction",
    "Predictor",
    "label_on_original_grid",
    "predict",
    "select_device",
    "write_prediction",
]

def select_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        DeviceError: for ``cuda`` without a usable GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but PyTorch sees no GPU; use --device cpu or auto.")
    return torch.device(name)


def label_on_original_grid(probs: np.ndarray, record: Record, plan: Plan) -> np.ndarray:
    """Class indices on the scan's own grid.

    Where the plan resamples by nearest neighbor (the literature's ACDC preparation), the most probable class
    is taken first and the label map resized, as published; else probabilities are resampled first.

    Args:
        probs: ``(classes, D, H, W)`` in prepared space.
        record: What the preparation did to this scan.
        plan: The plan.

    Returns:
        ``(D, H, W)`` of the original scan, unsigned integers.
    """
    if plan.interpolation == "nearest":
        return restore_label(probs.argmax(0).astype(np.uint8), record, plan)
    return np.asarray(restore(probs, record, plan).argmax(0), dtype=np.uint8)


@dataclass(frozen=True)
class Prediction:
    """Labels and, if asked for, uncertainty of one scan, on its own grid.

    Attributes:
        labels: ``(D, H, W)``, class indices.
        uncertainty: ``(D, H, W)``, entropy of the class probabilities over ``ln C``, in [0, 1].
        geometry: Of the input.
    """

    labels: np.ndarray
    uncertainty: np.ndarray | None
    geometry: Geometry


class Predictor:
    """A model on a device.

    Args:
        model: From :func:`~scantly.inference.model.load_model`.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    def __init__(self, model: Model, *, device: str = "auto") -> None:
        self.model = model
        self.device = select_device(device)
        model.network.to(self.device)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto") -> Predictor:
        """From ``model.safetensors`` or the folder that holds it."""
        return cls(load_model(Path(path)), device=device)

    def predict(self, images: Sequence[Path], *, uncertainty: bool = False) -> Prediction:
        """Predict one scan.

        Args:
            images: One file per channel.
            uncertainty: Compute the entropy too.

        Raises:
            ImageError: if a file cannot be read or the number of channels does not fit the model.
        """
        plan, task = self.model.plan, self.model.task
        image = read_image(images)
        if image.array.shape[0] != task.channels:
            raise ImageError(
                f"{images[0]} has {image.array.shape[0]} channel(s), the model was trained on {task.channels}; "
                "give all channels as <case>_0000, <case>_0001, ..."
            )
        prepared, record = prepare(image, plan)
        probs = predict_array(
            self.model.network,
            prepared,
            spatial_dims=plan.spatial_dims,
            patch_size=plan.patch_size,
            device=self.device,
        )
        labels = label_on_original_grid(probs, record, plan)
        spread = entropy(restore(probs, record, plan)) if uncertainty else None
        return Prediction(labels, spread, image.geometry)


def write_prediction(prediction: Prediction, folder: Path, case: str, source: Path) -> Path:
    """Write ``<case><ending>`` (and ``<case>_uncertainty``) in the input's format and geometry.

    Inputs without geometry (``.h5``) become ``.nii.gz`` with spacing 1; uncertainty of PNG inputs becomes TIFF,
    which holds floating-point values.

    Returns:
        The label file.
    """
    path, uncertainty_path = _written(folder, case, source)
    write_label(path, prediction.labels, prediction.geometry)
    if prediction.uncertainty is not None:
        write_scalar(uncertainty_path, prediction.uncertainty, prediction.geometry)
    return path


def _written(folder: Path, case: str, source: Path) -> tuple[Path, Path]:
    """The label file and the uncertainty file of a scan."""
    ending = file_ending(source) or ".nii.gz"
    ending = ".nii.gz" if ending == ".h5" else ending
    scalar_ending = ".tiff" if ending == ".png" else ending
    return folder / f"{case}{ending}", folder / f"{case}_uncertainty{scalar_ending}"


def _refuse_overwriting(cases: Mapping[str, Sequence[Path]], folder: Path) -> None:
    """A scan without a channel suffix has the name of its own label map."""
    inputs = {file.resolve() for files in cases.values() for file in files}
    for case, files in cases.items():
        for path in _written(folder, case, files[0]):
            if path.resolve() in inputs:
                raise ImageError(f"{path} is a scan and would be overwritten by a prediction; choose another --out.")


def predict(
    model: str | Path,
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    uncertainty: bool = False,
    device: str = "auto",
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Path]:
    """Predict files and folders of scans.

    Args:
        model: Run folder, or a ``model.safetensors``.
        inputs: Files or folders.
        out: Folder for the predictions.
        uncertainty: Write ``<case>_uncertainty`` beside each.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Called with (done, total, case).

    Returns:
        The label files written.

    Raises:
        RunError: if the model cannot be read.
        ImageError: if an input cannot, or would be overwritten; nothing is written then.
    """
    predictor = Predictor.load(model, device=device)
    cases = find_inputs(inputs, channels=predictor.model.task.channels)
    _refuse_overwriting(cases, Path(out))
    written = []
    for done, (case, files) in enumerate(cases.items()):
        if progress:
            progress(done, len(cases), case)
        prediction = predictor.predict(files, uncertainty=uncertainty)
        written.append(write_prediction(prediction, Path(out), case, files[0]))
    if progress:
        progress(len(cases), len(cases), "")
    return written
