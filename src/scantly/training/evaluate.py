"""Judge a finished run on a split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scantly.data.dataset import Dataset
from scantly.errors import DatasetError, DeviceError, ImageError, RunError, ScantlyError
from scantly.evaluation import Convention, Row, save_table, score_case
from scantly.files import sole_writer, write_json
from scantly.inference.outputs import write_prediction
from scantly.inference.predict import Predictor
from scantly.inference.settings import setting_word
from scantly.training.progress import ProgressLine
from scantly.training.run import Run
from scantly.training.scores import Scores, scores_of

__all__ = ["evaluate_run", "score_run"]


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
        RunError: if the run is not finished, the split is empty, its cases chose the checkpoint, or another process
            is evaluating them.
        ScantlyError: naming all cases that cannot be scored; the others are predicted, but no result is written.
    """
    scores = score_run(run, split, device=device, precision=precision, inference=inference, method=method)
    if scores.error is not None:
        raise scores.error
    return scores.summary


def score_run(
    run: Run,
    split: str | None = None,
    *,
    device: str = "auto",
    precision: str = "32",
    inference: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
) -> Scores:
    """As :func:`evaluate_run`; cases that cannot be scored are in the result instead of an error.

    A result of a part of the cases is not written: it would pass for the run's.

    Raises:
        RunError: as there.
        ScantlyError: if no case can be scored.
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
    rows: list[Row] = []
    failed: dict[str, ScantlyError] = {}
    folder = run.predictions(place)
    with (
        sole_writer(folder, "evaluating", cure="wait for it"),
        ProgressLine(f"evaluating {chosen}", len(names)) as line,
    ):
        for done, name in enumerate(names, start=1):
            try:
                rows += _score(name, predictor, dataset, folder, config.evaluation.protocol)
            except (DatasetError, DeviceError, ImageError) as error:
                failed[name] = error
            line.update(done, note=name)
        scores = scores_of(rows, failed, convention=config.evaluation.protocol)
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
            **scores.summary,
        }
        if failed:
            return replace(scores, summary=summary)
        path = run.folder / "evaluation" / f"{place}.csv"
        save_table(scores.table, path)
        write_json(path.with_suffix(".json"), summary)
    return replace(scores, summary=summary, place=path)


def _score(name: str, predictor: Predictor, dataset: Dataset, folder: Path, convention: Convention) -> list[Row]:
    """Predict one case, keep the label map, and score it."""
    case = dataset.case(name)
    reference = dataset.read_label(name)
    prediction = predictor.predict(case.images)
    write_prediction(prediction, folder, name, case.images[0])
    return score_case(
        prediction.labels,
        reference.array,
        classes=dataset.classes,
        spacing=prediction.geometry.spacing if prediction.geometry.has_spacing else None,
        convention=convention,
        case=name,
    )


def _difference(predictor: Predictor) -> str:
    """How the prediction differs from the one that the run's protocol says; empty if it does not."""
    parts = [predictor.settings.difference(predictor.model.inference)]
    parts += [f"{name}-{setting_word(value)}" for name, value in sorted(predictor.model.changed.items())]
    parts += [] if predictor.precision == "32" else [predictor.precision]
    return "_".join(part for part in parts if part)
