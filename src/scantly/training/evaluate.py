"""Judge a finished run on a split, or any predictions against labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scantly.arguments import checked
from scantly.data.dataset import Dataset
from scantly.errors import ImageError, RunError
from scantly.evaluation import Convention, make_table, save_table, score_case, summarize
from scantly.files import write_json
from scantly.imaging import file_ending, geometry_difference, read_label, stem
from scantly.inference.outputs import write_prediction
from scantly.inference.predict import Predictor
from scantly.inference.settings import setting_word
from scantly.training.progress import ProgressLine
from scantly.training.run import Run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["evaluate_folders", "evaluate_run"]

_COMPANIONS = ("_uncertainty", "_probabilities")


def evaluate_run(
    run: Run,
    split: str | None = None,
    *,
    device: str = "auto",
    precision: str = "32",
    inference: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Predict the cases of a split with ``model.safetensors`` and score them on their original grids.

    Args:
        run: A finished run.
        split: ``val`` or ``test``; ``None``: test where there is one, else val.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32`` or ``bf16``.
        inference: Settings that replace those of the run's ``evaluation.inference``, by name.
        method: Settings of the method that a finished model can change, see
            :attr:`~scantly.methods.base.Method.prediction_settings`.

    Returns:
        The summary, also written to ``evaluation/<split>.json``; the table goes to ``evaluation/<split>.csv``. If
        windows, precision or method are not the run's own, both names and the folder of predictions get what differs,
        for instance ``val_window-whole``: the run's result under its protocol stays what it is.

    Raises:
        RunError: if the run is not finished, the split is empty, or its cases chose the checkpoint.
    """
    config = run.settings
    cases = run.split
    chosen = split or ("test" if cases.test else "val")
    names: Sequence[str] = {"val": cases.val, "test": cases.test}.get(chosen, ())
    if chosen not in {"val", "test"}:
        raise RunError(f"unknown split '{chosen}'; choose val or test.")
    if not names:
        raise RunError(f"{run.folder} has no {chosen} cases; see 'split' in its config.yaml.")
    if chosen == "val" and config.evaluation.selection == "best":
        raise RunError(
            f"the checkpoint of {run.folder} was chosen on its val cases, so their scores would flatter it; evaluate "
            "--split test, or train with --set evaluation.selection=last."
        )
    dataset = Dataset.open(Path(config.data.dataset))
    predictor = Predictor.load(run.folder, device=device, precision=precision, inference=inference, method=method)
    place = "_".join(part for part in (chosen, _difference(predictor)) if part)
    rows: list[dict[str, Any]] = []
    with ProgressLine(f"evaluating {chosen}", len(names)) as line:
        for done, name in enumerate(names, start=1):
            case = dataset.case(name)
            if case.label is None:
                raise RunError(f"{chosen} case '{name}' has no label file; add it or leave the case out of the split.")
            prediction = predictor.predict(case.images)
            write_prediction(prediction, run.predictions(place), name, case.images[0])
            rows += score_case(
                prediction.labels,
                dataset.read_label(name).array,
                classes=dataset.classes,
                spacing=prediction.geometry.spacing if prediction.geometry.has_spacing else None,
                convention=config.evaluation.protocol,
                case=name,
            )
            line.update(done, note=name)
    table = make_table(rows)
    summary = {
        "split": chosen,
        "name": place,
        "recipe": config.recipe,
        "selection": config.evaluation.selection,
        "method": config.method_name,
        "labeled": config.data.labeled,
        "seed": config.training.seed,
        "steps": config.training.steps,
        "inference": {**predictor.settings.to_dict(), "precision": predictor.precision},
        **({"changed": dict(predictor.model.changed)} if predictor.model.changed else {}),
        **summarize(table, protocol=config.evaluation.protocol, convention=config.evaluation.protocol),
    }
    save_table(table, run.folder / "evaluation" / f"{place}.csv")
    write_json(run.folder / "evaluation" / f"{place}.json", summary)
    return summary


def _difference(predictor: Predictor) -> str:
    """How the prediction differs from the one that the run's protocol says; empty if it does not."""
    parts = [predictor.settings.difference(predictor.model.inference)]
    parts += [f"{name}-{setting_word(value)}" for name, value in sorted(predictor.model.changed.items())]
    parts += [] if predictor.precision == "32" else [predictor.precision]
    return "_".join(part for part in parts if part)


@checked(classes="['background', 'heart']")
def evaluate_folders(
    predictions: str | Path,
    labels: str | Path,
    *,
    classes: Sequence[str] | None = None,
    convention: Convention = "clean",
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Score predictions of any origin against label files of the same names.

    Args:
        predictions: Folder of label maps.
        labels: Folder of reference label maps; each prediction needs one.
        classes: Class names, background first; ``None``: ``class 1``, ``class 2``, ... up to the largest value.
        convention: How empty masks count, ``clean`` or ``literature``.

    Returns:
        Per-case table and its summary.

    Raises:
        ImageError: if a folder holds no label maps, a reference is missing, or a pair has different geometry.
    """
    pairs = _pairs(Path(predictions), Path(labels))
    if classes is None:
        largest = max(int(read_label(path).array.max()) for pair in pairs.values() for path in pair)
        classes = ("background", *(f"class {value}" for value in range(1, largest + 1)))
    rows: list[dict[str, Any]] = []
    for name, (predicted_path, reference_path) in pairs.items():
        predicted, reference = read_label(predicted_path), read_label(reference_path)
        difference = geometry_difference(predicted.geometry, reference.geometry)
        if difference:
            raise ImageError(f"{predicted_path} and {reference_path} do not fit: {difference}; resample one of them.")
        largest = int(np.max(predicted.array, initial=0))
        if largest >= len(classes):
            raise ImageError(f"{predicted_path} has label {largest}, but there are classes 0-{len(classes) - 1} only.")
        rows += score_case(
            predicted.array,
            reference.array,
            classes=classes,
            spacing=reference.geometry.spacing if reference.geometry.has_spacing else None,
            convention=convention,
            case=name,
        )
    table = make_table(rows)
    return table, summarize(table, protocol=convention, convention=convention)


def _pairs(predictions: Path, labels: Path) -> dict[str, tuple[Path, Path]]:
    found: dict[str, dict[str, Path]] = {}
    for folder in (predictions, labels):
        if not folder.is_dir():
            raise ImageError(f"{folder} is not a folder.")
        by_name: dict[str, Path] = {}
        for file in sorted(folder.iterdir()):
            if not file_ending(file) or file.name.startswith(".") or stem(file).endswith(_COMPANIONS):
                continue
            if stem(file) in by_name:
                raise ImageError(f"{file} and {by_name[stem(file)]} are both label maps of '{stem(file)}'; remove one.")
            by_name[stem(file)] = file
        found[str(folder)] = by_name
        if not by_name:
            raise ImageError(f"{folder} holds no label maps; give the folder that holds them.")
    predicted, references = found[str(predictions)], found[str(labels)]
    missing = sorted(set(predicted) - set(references))
    if missing:
        raise ImageError(f"{labels} has no label for '{missing[0]}' ({len(missing)} missing in all); add or remove it.")
    return {name: (path, references[name]) for name, path in predicted.items()}
