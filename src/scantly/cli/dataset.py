"""``scantly init`` and ``scantly check``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scantly.cli.output import progress, say, say_json, warn

if TYPE_CHECKING:
    from scantly.data.checks import Finding
    from scantly.errors import ScantlyError

__all__ = ["check", "init"]

_HAS_ERRORS = 2


def init(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder to make.")],
    images: Annotated[
        Path, typer.Option("--images", metavar="DIR", help="Folder of scans, or of one folder of DICOM files per case.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="DIR", help="Folder of label maps, matched by name; may be fewer."),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the files. Default: links, which need no space but the originals."),
    ] = False,
) -> None:
    """Bare folders of scans and labels -> dataset folder.

    DICOM series are converted to NIfTI. The new folder is checked at once. Scans without a label map become the
    unlabeled pool. Channel and class names are written down for you to edit. Cases that cannot be taken are named
    and left out, with exit status 2.
    """
    from scantly.data.create import init as make_dataset

    left_out: dict[str, ScantlyError] = {}
    with progress("reading") as report:
        made = make_dataset(dataset, images, labels, link=not copy, progress=report, left_out=left_out)
    unlabeled = sum(case.label is None for case in made.train.values())
    say(f"{dataset}: {_cases(len(made.train) - unlabeled)} with label, {unlabeled} without")
    say(f"channels: {', '.join(made.channels)}")
    say(f"classes: {', '.join(f'{value} {name}' for value, name in enumerate(made.classes))}")
    say(f"Next: edit the channel and class names in {dataset / 'dataset.json'}; if subjects have several")
    say(f"scans or you have lists for training and test, write {dataset / 'splits.json'}.\n")
    faulty = _check(dataset, as_json=False)
    if left_out:
        _say_left_out(dataset, left_out)
    if faulty or left_out:
        raise typer.Exit(_HAS_ERRORS)


def _say_left_out(dataset: Path, left_out: Mapping[str, ScantlyError]) -> None:
    count = f"{_cases(len(left_out))} {'is' if len(left_out) == 1 else 'are'}"
    listed = "\n".join(f"  {name}: {error}" for name, error in left_out.items())
    warn(f"{count} left out; mend what is said here, remove {dataset} and give the same command again:\n{listed}")


def check(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find what would spoil a training.

    Reads every file of the dataset folder. Exit status 2 if there is an error; warnings alone give 0.
    """
    if _check(dataset, as_json=json):
        raise typer.Exit(_HAS_ERRORS)


def _check(dataset: Path, *, as_json: bool) -> bool:
    """Say what is wrong; returns whether there is an error."""
    from scantly.data.checks import check as find_faults

    with progress("checking") as report:
        findings = find_faults(dataset, progress=report)
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    cases = None if errors else _count(dataset)
    if as_json:
        say_json(
            {
                "dataset": str(dataset),
                "cases": cases,
                "errors": len(errors),
                "warnings": len(warnings),
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        _say_group("error", errors)
        _say_group("warning", warnings)
        if cases is not None:
            say(f"no {'error' if warnings else 'fault'} found in {_cases(cases)}")
    return bool(errors)


def _count(dataset: Path) -> int:
    from scantly.data.dataset import Dataset

    opened = Dataset.open(dataset)
    return len(opened.train) + len(opened.test)


def _say_group(level: str, findings: list[Finding]) -> None:
    if not findings:
        return
    say(f"{len(findings)} {level}{'s' if len(findings) > 1 else ''}:")
    for finding in findings:
        place = "" if finding.file in finding.message else f"{finding.file}: "
        say(f"  {place}{finding.message}")


def _cases(number: int) -> str:
    return f"{number} case{'' if number == 1 else 's'}"
