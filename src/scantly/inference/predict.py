"""Predict scans: files, folders or the cases of a dataset, in the geometry of their inputs."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from scantly._version import __version__
from scantly.arguments import HasFolder, checked
from scantly.data.prepare import prepare, restore
from scantly.errors import ConfigError, DeviceError, ImageError, ScantlyError, listing, unknown_name
from scantly.files import digest, sole_writer
from scantly.imaging import Geometry, read_image
from scantly.imaging.decoding import within_memory
from scantly.imaging.dicom import Series
from scantly.imaging.dicom_seg import require_highdicom
from scantly.imaging.volumes import Source
from scantly.inference.inputs import Broken, find_inputs
from scantly.inference.journal import Journal, state_of
from scantly.inference.memory import available_bytes, megabytes
from scantly.inference.model import Model, load_model, model_file
from scantly.inference.original import class_maps, label_on_original_grid
from scantly.inference.outputs import (
    Prediction,
    outputs_of,
    refuse_long_names,
    refuse_overwriting,
    write_prediction,
)
from scantly.inference.windows import entropy, predict_array
from scantly.networks import check_sides
from scantly.networks.precision import say_slow_bf16

__all__ = ["Outcome", "Predictor", "predict", "predict_folder", "select_device"]

_LOGGER = logging.getLogger("scantly")
_PRECISIONS = ("32", "bf16")
_DEVICES = ("auto", "cpu", "cuda")


def select_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one.

    Raises:
        DeviceError: for ``cuda`` without a usable GPU.
        ConfigError: for a device that does not exist.
    """
    if name not in _DEVICES:
        raise ConfigError(unknown_name("device", name, _DEVICES))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' was asked for, but PyTorch sees no GPU; use --device cpu or auto.")
    return torch.device(name)


class Predictor:
    """A model on a device.

    Args:
        model: From :func:`~scantly.inference.model.load_model`.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32``, or ``bf16``: convolutions by bf16 autocast, sums over windows in float32.
        inference: Settings that replace the model's own, by name; see
            :meth:`~scantly.inference.settings.InferenceSettings.overridden`.

    Raises:
        ConfigError: for an unknown precision or setting.
    """

    def __init__(
        self,
        model: Model,
        *,
        device: str = "auto",
        precision: str = "32",
        inference: Mapping[str, Any] | None = None,
    ) -> None:
        if precision not in _PRECISIONS:
            raise ConfigError(unknown_name("precision", precision, _PRECISIONS))
        self.model = model
        self.precision = precision
        self.settings = model.inference.overridden(inference or {})
        self.settings.check(model.plan.patch_size)
        if self.settings.patch_size is not None:
            task = model.task
            check_sides(
                task.network_name, self.settings.patch_size, in_channels=task.channels, arguments=task.network_arguments
            )
        self.device = select_device(device)
        model.network.to(self.device)
        if precision == "bf16" and self.device.type == "cpu":  # measured: a fifth faster in bf16, no gain in float32
            layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
            model.network.to(memory_format=layouts[model.plan.spatial_dims])  # type: ignore[call-overload]
            say_slow_bf16(self.device.type)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        precision: str = "32",
        inference: Mapping[str, Any] | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> Predictor:
        """From ``model.safetensors`` or the folder that holds it; ``method`` as for ``load_model``."""
        return cls(load_model(Path(path), method=method), device=device, precision=precision, inference=inference)

    def predict(
        self, images: Sequence[Source], *, uncertainty: bool = False, probabilities: bool = False
    ) -> Prediction:
        """Predict one scan.

        Args:
            images: One file or series per channel.
            uncertainty: Compute the entropy too.
            probabilities: Keep the class probabilities too.

        Raises:
            ImageError: if a file cannot be read or the number of channels does not fit the model.
            DeviceError: if the memory does not suffice.
        """
        plan, task = self.model.plan, self.model.task
        image = read_image(images)
        if image.array.shape[0] != task.channels:
            raise ImageError(
                f"{images[0]} has {image.array.shape[0]} channel(s), the model was trained on {task.channels}; "
                "give all channels as <case>_0000, <case>_0001, ..."
            )
        geometry = image.geometry
        if plan.spatial_dims == 3 and min(geometry.shape) == 1:
            _LOGGER.warning(
                "%s is a single slice, but the model takes volumes: it is predicted with zeros around it, and its "
                "labels may be poor.",
                images[0],
            )
        with within_memory(images[0]):
            prepared, record = prepare(image, plan)
        del image  # a large scan is needed once
        need = _bytes_on_own_grid(len(task.classes), prepared, geometry, probabilities=probabilities)
        free = available_bytes(torch.device("cpu"))
        if free is not None and need > free:
            raise DeviceError(_too_large(images[0], need, probabilities=probabilities))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            probs = predict_array(
                self.model.network,
                prepared,
                spatial_dims=plan.spatial_dims,
                patch_size=plan.patch_size,
                device=self.device,
                settings=self.settings,
            )
        del prepared
        try:
            largest, resample = self.settings.largest_component, self.settings.resample
            labels = label_on_original_grid(probs, record, plan, largest_component=largest, resample=resample)
            restored = restore(probs, record, plan) if probabilities else None
            spread = None
            if uncertainty:
                spread = entropy(class_maps(probs, record, plan) if restored is None else restored)
        except MemoryError as error:
            raise DeviceError(_too_large(images[0], need, probabilities=probabilities)) from error
        return Prediction(labels, spread, geometry, restored)


def _bytes_on_own_grid(classes: int, prepared: np.ndarray, geometry: Geometry, *, probabilities: bool) -> int:
    """What the way back takes: prepared probabilities, about five maps of the scan, and its probabilities if kept."""
    maps = 5 + (classes if probabilities else 0)
    return 4 * (classes * math.prod(prepared.shape[1:]) + maps * math.prod(geometry.shape))


def _too_large(source: Source, need: int, *, probabilities: bool) -> str:
    free = available_bytes(torch.device("cpu"))
    told = "" if free is None else f", {megabytes(free)} are free"
    cure = "free memory" + (" or leave out --probabilities" if probabilities else "")
    return f"the prediction of {source} needs about {megabytes(need)} on the scan's own grid{told}; {cure}."


@dataclass(frozen=True)
class Outcome:
    """What a prediction of several scans left.

    Attributes:
        folder: Where the predictions are.
        files: The label file of every scan that could be predicted.
        present: How many of them an earlier, interrupted prediction had made.
        failed: Name of every other scan, and why it could not be predicted.
    """

    folder: Path
    files: list[Path]
    present: int
    failed: list[tuple[str, ScantlyError]]

    @property
    def error(self) -> ScantlyError | None:
        """All failures as one error; None if there are none."""
        if not self.failed:
            return None
        faults = [error for _, error in self.failed]
        total = len(self.files) + len(faults)
        others = f", the others are in {self.folder}" if self.files else ""
        head = f"{len(faults)} of {total} scans cannot be predicted{others}"
        return (
            faults[0] if total == 1 else listing(faults, f"{head}; mend or remove them and give the same command again")
        )


def predict_folder(
    model: str | Path,
    inputs: Iterable[str | Path],
    out: str | Path,
    *,
    uncertainty: bool = False,
    probabilities: bool = False,
    series: str | None = None,
    dicom_seg: bool = False,
    device: str = "auto",
    precision: str = "32",
    inference: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Outcome:
    """As :func:`predict`; scans that cannot be predicted are in the outcome instead of an error."""
    predictor = Predictor.load(model, device=device, precision=precision, inference=inference, method=method)
    folder = Path(out)
    failed: list[tuple[str, ScantlyError]] = []
    broken: Broken = []
    cases = find_inputs(inputs, channels=predictor.model.task.channels, series=series, out=folder, broken=broken)
    failed += broken
    if dicom_seg:
        _check_dicom_seg(cases)
    asked = {"uncertainty": uncertainty, "probabilities": probabilities, "dicom_seg": dicom_seg}
    refuse_overwriting(cases, folder, **asked)
    files: list[Path] = []
    present = 0
    with sole_writer(folder, "predicting"):
        for leftover in folder.glob(".tmp-*"):  # of a kill
            leftover.unlink(missing_ok=True)
        with Journal(folder, _key(predictor, model_file(Path(model)))).kept() as journal:
            for done, (case, sources) in enumerate(cases.items()):
                if progress:
                    progress(done, len(cases), case)
                state, paths = state_of(sources), outputs_of(folder, case, sources[0])
                wanted = paths.asked(**asked)
                if journal.holds(case, state, wanted):
                    present += 1
                else:
                    try:
                        refuse_long_names(case, wanted)
                        prediction = predictor.predict(sources, uncertainty=uncertainty, probabilities=probabilities)
                        by = predictor.model if dicom_seg else None
                        write_prediction(prediction, folder, case, sources[0], dicom_seg_by=by)
                    except (ImageError, DeviceError) as error:  # a scan too large for the memory is its own fault too
                        failed.append((case, error))
                        continue
                    journal.add(case, state, wanted)
                files.append(paths.label)
        if not failed:
            journal.finish()
    if progress and not failed:
        progress(len(cases), len(cases), "")
    return Outcome(folder, files, present, failed)


def _check_dicom_seg(cases: Mapping[str, Sequence[Source]]) -> None:
    """Before anything is predicted: the library is there, and every input is a series."""
    require_highdicom()
    for sources in cases.values():
        if not isinstance(sources[0], Series):
            raise ConfigError(f"--dicom-seg refers to a DICOM series, and {sources[0]} is none; leave it out.")


def _key(predictor: Predictor, file: Path) -> str:
    """Stands for all that shapes a prediction beside the scan."""
    with file.open("rb") as stream:
        weights = hashlib.file_digest(stream, "sha256").hexdigest()
    settings = {**predictor.settings.to_dict(), "precision": predictor.precision}
    method = dict(predictor.model.changed)
    return digest({"scantly": __version__, "model": weights, "settings": settings, "method": method})


@checked(series="'1.2.840.113619'")
def predict(
    model: str | Path | Annotated[HasFolder, "a run"],
    inputs: str | Path | Iterable[str | Path],
    out: str | Path,
    *,
    uncertainty: bool = False,
    probabilities: bool = False,
    series: str | None = None,
    dicom_seg: bool = False,
    device: str = "auto",
    precision: str = "32",
    inference: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Path]:
    """Predict files and folders of scans.

    A scan that cannot be read does not keep the others from being predicted. A prediction that was interrupted,
    or in which scans failed, goes on where it was when the same command is given again: scans that are done are
    left alone as long as model, settings and input files are the same.

    Args:
        model: A run, its folder, or a ``model.safetensors``.
        inputs: Files, folders of files, or folders of DICOM series; one, or several.
        out: Folder for the predictions.
        uncertainty: Write ``<case>_uncertainty`` beside each.
        probabilities: Write ``<case>_probabilities.nii.gz`` beside each, axes (x, y, z, class).
        series: SeriesInstanceUID to take, where a DICOM folder holds several.
        dicom_seg: Write ``<case>.dcm`` beside each: a DICOM segmentation that refers to the series.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32`` or ``bf16`` (faster, a little less exact).
        inference: Settings that replace those of the model, for instance ``{"flips": True}``; see
            :class:`~scantly.inference.settings.InferenceSettings`.
        method: Settings of the method that a finished model can change, for instance ``{"infer": "ds"}``; see
            :attr:`~scantly.methods.base.Method.prediction_settings`.
        progress: Called with (done, total, case).

    Returns:
        The label files of all inputs.

    Raises:
        RunError: if the model cannot be read, or another process is predicting into the folder.
        ImageError: if an input would be overwritten, or it is not clear what the scans are (nothing is written
            then), or one cannot be read; with several inputs it lists all that failed, after the others are written.
        DatasetError: if a folder holds a file of a type that is not read, or two files of one scan.
        ConfigError: for settings that do not exist or do not fit the model.
        DeviceError: if the memory does not suffice for a scan.
    """
    outcome = predict_folder(
        model if isinstance(model, str | Path) else model.folder,
        [inputs] if isinstance(inputs, str | Path) else inputs,
        out,
        uncertainty=uncertainty,
        probabilities=probabilities,
        series=series,
        dicom_seg=dicom_seg,
        device=device,
        precision=precision,
        inference=inference,
        method=method,
        progress=progress,
    )
    if outcome.error is not None:
        raise outcome.error
    return outcome.files
