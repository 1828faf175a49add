"""``scantly demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scantly.cli.output import say
from scantly.cli.results import say_comparison

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for cohort, runs and report.")] = Path(
        "scantly-demo"
    ),
) -> None:
    """See what unlabeled scans are worth.

    Minutes on a CPU, no data needed: generates a cohort of heart-like scans, trains with 2 labeled subjects,
    once without and once with the unlabeled ones, evaluates both on test subjects and writes a report.
    """
    from scantly.demo import METHODS
    from scantly.demo import demo as run_demo

    report = run_demo(out)
    say_comparison([out / "runs" / method for method in METHODS])
    say(f"report: {report}")
