"""``scantly predict``, ``scantly evaluate`` and ``scantly compare``."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scantly.cli.inference_options import (
    Batch,
    Flips,
    LargestComponent,
    MethodSettings,
    Overlap,
    Precision,
    Size,
    Stride,
    Window,
    method_settings,
    overrides,
)
from scantly.cli.output import progress, say, say_json, say_table, say_wrapped

if TYPE_CHECKING:
    import pandas as pd

    from scantly.evaluation import Definition
    from scantly.inference.predict import Outcome

__all__ = ["compare", "evaluate", "predict", "say_comparison"]

_SHOWN = ("dice", "jaccard", "hd95_voxels", "asd_voxels", "hd95_mm", "asd_mm")
_COUNTED = {"missed": "missed", "spurious": "spurious", "both_empty": "in neither"}


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or a model.safetensors.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT", help="Scans, folders of scans or DICOM series.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the label maps.")],
    uncertainty: Annotated[
        bool,
        typer.Option("--uncertainty", help="Also write <case>_uncertainty: entropy from 0 (certain) to 1."),
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Also write <case>_probabilities.nii.gz, axes (x, y, z, class)."),
    ] = False,
    series: Annotated[
        str | None, typer.Option("--series", metavar="UID", help="DICOM series, where a folder holds several.")
    ] = None,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Also write <case>.dcm: DICOM-SEG that refers to the series.")
    ] = False,
    window: Window = None,
    overlap: Overlap = None,
    stride: Stride = None,
    size: Size = None,
    flips: Flips = None,
    largest_component: LargestComponent = None,
    batch: Batch = None,
    precision: Precision = None,
    set_values: MethodSettings = None,
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")
    ] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Segment scans.

    The label maps have exactly the geometry and the file type of their inputs (.h5 has neither: .nii.gz).
    Folders are searched with their subfolders. Scans that cannot be predicted are listed at the end, with exit
    status 2. After that, or an interruption, the same command goes on with the scans that are missing.
    """
    from scantly.inference.predict import predict_folder

    settings = overrides(
        window=window,
        overlap=overlap,
        stride=stride,
        size=size,
        flips=flips,
        largest_component=largest_component,
        batch=batch,
    )
    with progress("predicting") as report:
        outcome = predict_folder(
            run,
            inputs,
            out,
            uncertainty=uncertainty,
            probabilities=probabilities,
            series=series,
            dicom_seg=dicom_seg,
            device=device,
            precision=precision or "32",
            inference=settings,
            method=method_settings(set_values),
            progress=report,
        )
    if json:
        say_json(
            {
                "out": str(out),
                "label_maps": [str(path) for path in outcome.files],
                "present": outcome.present,
                "failed": [{"case": case, "reason": str(error)} for case, error in outcome.failed],
            }
        )
    elif outcome.files:
        _say_written(outcome, out)
    if outcome.error is not None:
        raise outcome.error


def _say_written(outcome: Outcome, out: Path) -> None:
    count = len(outcome.files) - outcome.present
    verb = "was" if outcome.present == 1 else "were"
    before = f"; {outcome.present} of an interrupted prediction {verb} already there" if outcome.present else ""
    say(f"{count} label map{'' if count == 1 else 's'} written to {out}{before}")


def evaluate(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A finished run.")] = None,
    *,
    split: Annotated[
        str | None,
        typer.Option("--split", metavar="val|test", help="Default: test where there is one, else val."),
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", metavar="DIR", help="Label maps of any origin.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="DIR", help="Reference label maps of the same names.")
    ] = None,
    window: Window = None,
    overlap: Overlap = None,
    stride: Stride = None,
    size: Size = None,
    flips: Flips = None,
    largest_component: LargestComponent = None,
    batch: Batch = None,
    precision: Precision = None,
    set_values: MethodSettings = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option("--allow-missing", help="Score the predictions there are, though references lack theirs."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Score a run, or label maps of any origin.

    A run is scored on its validation or test cases, other label maps against references of the same names
    (class names come from a dataset.json beside the folder of references).
    Dice, Jaccard, HD95, ASD and more per case and class, in voxels and mm; missed and spurious structures are
    counted and never flatter. Cases that cannot be scored are listed at the end, with exit status 2; the result of a
    run is then printed but not kept.
    """
    from scantly.errors import ConfigError

    settings = overrides(
        window=window,
        overlap=overlap,
        stride=stride,
        size=size,
        flips=flips,
        largest_component=largest_component,
        batch=batch,
    )
    given = {
        "RUN": run,
        "--split": split,
        "--device": device,
        "--precision": precision,
        "options for windows": settings or None,
        "--set": set_values,
        "--predictions": predictions,
        "--labels": labels,
        "--allow-missing": allow_missing or None,
    }
    named = {name for name, value in given.items() if value is not None}
    of_folders = {"--predictions", "--labels", "--allow-missing"}
    if predictions is not None and labels is not None and named <= of_folders:
        from scantly.data.layout import describe
        from scantly.training.folders import score_folders

        described = describe(labels.parent)[0]
        classes = described.classes if described else None
        scores = score_folders(predictions, labels, classes=classes, allow_missing=allow_missing)
    elif run is not None and not named & of_folders:
        from scantly.training.evaluate import score_run
        from scantly.training.run import Run

        scores = score_run(
            Run.open(run),
            split,
            device=device or "auto",
            precision=precision or "32",
            inference=settings,
            method=method_settings(set_values),
        )
    else:
        raise ConfigError(
            "evaluate takes a RUN (with --split), or --predictions and --labels together (with --allow-missing), "
            "nothing else; "
            f"got {' and '.join(name for name in given if name in named) or 'neither'}."
        )
    if json:
        say_json(scores.summary)
    else:
        _say_summary(scores.summary)
        if scores.place is not None:
            say(f"per case: {scores.place}")
    if scores.error is not None:
        raise scores.error


def _say_summary(summary: Mapping[str, Any]) -> None:
    definitions = _definitions()
    rows = [_row(name, scores) for name, scores in summary["classes"].items()]
    rows.append(_row("mean over classes", {**summary["overall"], "averaged": None}))
    about = [str(summary[key]) for key in ("method", "name") if key in summary]
    title = " on ".join(about) or "predictions"
    scored, lost = summary["overall"]["cases"], len(summary.get("failed", ())) + len(summary.get("missing", ()))
    cases = f"{scored} of {scored + lost} cases" if lost else f"{scored} cases"
    say_table(
        ["class", *_heads(definitions), "n", *_COUNTED.values()],
        rows,
        title=f"{title}: {cases}, protocol {summary['protocol']}",
    )
    say_wrapped(
        "Mean ± standard deviation over cases. n: cases in the means; missed, spurious, in neither: structures that "
        "only the reference, only the prediction, or neither has."
    )
    _say_definitions(definitions)
    say_wrapped(f"Empty masks: {summary['empty_masks']}")
    if summary.get("missing"):
        say_wrapped(f"Not scored, since there is no prediction: {', '.join(summary['missing'])}.")


def _definitions() -> dict[str, Definition]:
    from scantly.evaluation import DEFINITIONS

    return {metric: DEFINITIONS[metric] for metric in _SHOWN}


def _heads(definitions: Mapping[str, Definition]) -> list[str]:
    return [d.title if d.unit == "1" else f"{d.title} ({d.unit})" for d in definitions.values()]


def _say_definitions(definitions: Mapping[str, Definition]) -> None:
    for head, definition in zip(_heads(definitions), definitions.values(), strict=True):
        say_wrapped(f"{head}: {definition.text}")


def _row(name: str, scores: Mapping[str, Any]) -> list[str]:
    cells = [_mean(scores[metric]["mean"], scores[metric]["std_over_cases"], metric) for metric in _SHOWN]
    counts = ["" if scores[key] is None else str(scores[key]) for key in ("averaged", *_COUNTED)]
    return [name, *cells, *counts]


def _mean(mean: float | None, deviation: float | None, metric: str) -> str:
    if mean is None:
        return "-"
    places = 3 if metric in {"dice", "jaccard"} else 2
    return f"{mean:.{places}f}" + ("" if deviation is None else f" ± {deviation:.{places}f}")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Evaluated runs.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The report, one HTML page.")] = Path(
        "report.html"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Compare runs on one HTML page.

    Tables, paired statistics, plots, example slices and configurations. Evaluate the runs first.
    """
    from scantly.report import compare as write_report
    from scantly.report import comparison_table
    from scantly.training.run import Run

    opened = [Run.open(folder) for folder in runs]
    report = write_report(opened, out)
    table = comparison_table(opened)
    if json:
        say_json({"report": str(report), "table": [_without_nan(row) for row in table.to_dict("records")]})
        return
    _say_comparison(table)
    say(f"report: {report}")


def say_comparison(runs: Sequence[Path]) -> None:
    """Print the table of several evaluated runs."""
    from scantly.report import comparison_table
    from scantly.training.run import Run

    _say_comparison(comparison_table([Run.open(folder) for folder in runs]))


def _say_comparison(table: pd.DataFrame) -> None:
    definitions = _definitions()
    for (protocol, split), part in table.groupby(["protocol", "split"], sort=False):
        rows = []
        for record in part.to_dict("records"):
            row = _without_nan(record)
            cells = [_mean(row[metric], row[f"{metric}_std_over_cases"], metric) for metric in _SHOWN]
            counts = [str(row[key]) for key in ("seeds", "cases", *_COUNTED)]
            rows.append([str(row["method"]), str(row["class"]), *cells, *counts])
        heads = ["method", "class", *_heads(definitions), "seeds", "cases", *_COUNTED.values()]
        say_table(heads, rows, title=f"{split} cases, protocol {protocol}", text_columns=2)
    say_wrapped(
        "Mean ± standard deviation over cases; structures that are missed, spurious or in neither are counted over all "
        "seeds."
    )
    _say_definitions(definitions)


def _without_nan(row: Mapping[Hashable, Any]) -> dict[str, Any]:
    return {str(key): None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
