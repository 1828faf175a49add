"""Judge predictions of any origin against references of the same names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scantly.arguments import checked
from scantly.data.unread import not_readable, several
from scantly.errors import ImageError, ScantlyError
from scantly.evaluation import Convention, Row, score_case
from scantly.imaging import ENDINGS, Label, file_ending, geometry_difference, read_label, stem
from scantly.imaging.dicom_files import files_below
from scantly.inference.journal import Journal
from scantly.training.scores import Scores, scores_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["evaluate_folders", "score_folders"]

_LOGGER = logging.getLogger("scantly")
_NAMED = 20
#: What ``scantly predict`` writes beside ``<case>``.
_BESIDE = ("_uncertainty", "_probabilities")


@checked(classes="['background', 'heart']")
def evaluate_folders(
    predictions: str | Path,
    labels: str | Path,
    *,
    classes: Sequence[str] | None = None,
    convention: Convention = "clean",
    allow_missing: bool = False,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score predictions of any origin against label files of the same names.

    Args:
        predictions: Folder of label maps.
        labels: Folder of reference label maps.
        classes: Class names, background first; ``None``: ``class 1``, ``class 2``, ... up to the largest value.
        convention: How empty masks count, ``clean`` or ``literature``.
        allow_missing: Score the predictions that there are, though some references have none.

    Returns:
        Per-case table and its summary; ``missing`` in it names the references without prediction.

    Raises:
        ImageError: if a folder holds no label maps, a prediction has no reference or the other way round, a file
            would not be scored, or a pair cannot be read or has different geometry: all of these are told.
    """
    scores = score_folders(predictions, labels, classes=classes, convention=convention, allow_missing=allow_missing)
    if scores.error is not None:
        raise scores.error
    return scores.table, scores.summary


def score_folders(
    predictions: str | Path,
    labels: str | Path,
    *,
    classes: Sequence[str] | None = None,
    convention: Convention = "clean",
    allow_missing: bool = False,
) -> Scores:
    """As :func:`evaluate_folders`; cases that cannot be read or do not fit are in the result instead of an error.

    Raises:
        ImageError: if what is to be scored is not clear, or no case can be scored.
    """
    pairs, missing = _pairs(Path(predictions), Path(labels), allow_missing=allow_missing)
    failed: dict[str, ScantlyError] = {}
    if classes is None:
        largest = max((_largest(pair, name, failed) for name, pair in pairs.items()), default=0)
        classes = ("background", *(f"class {value}" for value in range(1, largest + 1)))
    rows: list[Row] = []
    for name in [name for name in pairs if name not in failed]:
        try:
            predicted, reference = _read(*pairs[name])
            for path, label in zip(pairs[name], (predicted, reference), strict=True):
                _refuse_unknown(path, label, len(classes))
        except ImageError as error:
            failed[name] = error
            continue
        rows += score_case(
            predicted.array,
            reference.array,
            classes=classes,
            spacing=reference.geometry.spacing if reference.geometry.has_spacing else None,
            convention=convention,
            case=name,
        )
    scores = scores_of(rows, dict(sorted(failed.items())), convention=convention)
    scores.summary["missing"] = missing
    return scores


def _read(predicted_path: Path, reference_path: Path) -> tuple[Label, Label]:
    predicted, reference = read_label(predicted_path), read_label(reference_path)
    difference = geometry_difference(predicted.geometry, reference.geometry)
    if difference:
        raise ImageError(f"{predicted_path} and {reference_path} do not fit: {difference}; resample one of them.")
    return predicted, reference


def _largest(pair: tuple[Path, Path], name: str, failed: dict[str, ScantlyError]) -> int:
    """Largest value of a prediction and its reference; 0, with the reason in ``failed``, if they do not fit."""
    try:
        return max(int(np.max(label.array, initial=0)) for label in _read(*pair))
    except ImageError as error:
        failed[name] = error
        return 0


def _refuse_unknown(path: Path, label: Label, classes: int) -> None:
    largest = int(np.max(label.array, initial=0))
    if largest >= classes:
        raise ImageError(f"{path} has label {largest}, but there are classes 0-{classes - 1} only.")


def _pairs(predictions: Path, labels: Path, *, allow_missing: bool) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Prediction and reference by name, and the references without prediction."""
    predicted, references = _label_maps(predictions), _label_maps(labels)
    if (predictions / Journal.NAME).is_file():
        _LOGGER.warning("%s holds an unfinished prediction: label maps may be missing in it.", predictions)
    strangers = sorted(predicted.keys() - references.keys())
    if strangers:
        raise ImageError(
            f"{labels} has no reference for {len(strangers)} of {len(predicted)} predictions: {_listed(strangers)}; "
            "add the references, or move these predictions away."
        )
    missing = sorted(references.keys() - predicted.keys())
    if missing and not allow_missing:
        raise ImageError(
            f"{predictions} has no prediction for {len(missing)} of {len(references)} references: {_listed(missing)}; "
            "predict them, or score the others alone with --allow-missing."
        )
    return {name: (path, references[name]) for name, path in predicted.items()}, missing


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _label_maps(folder: Path) -> dict[str, Path]:
    """Label maps of a folder by name.

    Raises:
        ImageError: if there is none, or a file of the folder would not be scored.
    """
    if not folder.is_dir():
        raise ImageError(f"{folder} is not a folder.")
    files = files_below(folder)
    maps = [file for file in files if file_ending(file) and file.parent == folder]
    names = {stem(file) for file in maps}
    ours = [file for file in files if _is_beside(file, names)]
    _refuse_lost(folder, [file for file in files if file not in set(ours)])
    found: dict[str, Path] = {}
    for file in maps:
        if file in ours:
            continue
        name = stem(file)
        if name in found:
            raise ImageError(f"{file} and {found[name]} are both label maps of '{name}'; remove one.")
        found[name] = file
    if not found:
        raise ImageError(f"{folder} holds no label maps; give the folder that holds them.")
    return found


def _is_beside(file: Path, names: Iterable[str]) -> bool:
    """Whether a file is an uncertainty, probabilities or DICOM segmentation beside a label map of its name."""
    if file.suffix == ".dcm":
        return file.stem in names
    return any(stem(file).removesuffix(kind) in names for kind in _BESIDE if stem(file).endswith(kind))


def _refuse_lost(folder: Path, files: Sequence[Path]) -> None:
    lost = not_readable(files)
    if lost:
        raise ImageError(
            f"{folder} holds {len(lost)} file{'' if len(lost) == 1 else 's'} of a type that is not read: "
            f"{several(lost, folder)}; convert them to one of {', '.join(ENDINGS)}, or move them away."
        )
    deeper = [file for file in files if file_ending(file) and file.parent != folder]
    if deeper:
        raise ImageError(
            f"{folder} holds files in subfolders, which are not searched: {several(deeper, folder)}; move them up, or "
            "give the folder that holds the label maps."
        )
