"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["ProgressLine"]

_LOGGER = logging.getLogger("scantly")
_PLAIN_SECONDS = 20.0


class ProgressLine:
    """Show how far a loop has come, on standard error.

    Args:
        title: What is being done.
        total: Number of steps.
        quiet: Show nothing (other ranks, tests).
    """

    def __init__(self, title: str, total: int, *, quiet: bool = False) -> None:
        self._title = title
        self._total = total
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()
        self._started = self._spoken = time.monotonic()
        self._first: int | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> ProgressLine:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(
        self, done: int, *, title: str | None = None, note: str = "", force: bool = False, left: float | None = None
    ) -> None:
        """Report that ``done`` steps are complete.

        Args:
            done: Completed steps.
            title: New description, for instance another stage.
            note: Short text behind the numbers, for instance the losses.
            force: Say it also where plain lines are due only every so often.
            left: Seconds left, where that is better known than by the steps; ``None``: by the steps.
        """
        self._title = title or self._title
        if self._first is None:
            self._first = done
        if self._live:
            known = note if left is None else f"{note}, about {_clock(left)} left"
            self._bar.update(self._task, completed=done, description=self._title, note=known)
            return
        now = time.monotonic()
        if self._quiet or not (force or done >= self._total or now - self._spoken >= _PLAIN_SECONDS):
            return
        self._spoken = now
        gained = max(done - self._first, 1)
        left = (now - self._started) / gained * (self._total - done) if left is None else left
        _LOGGER.info("%s %d/%d, %s left%s", self._title, done, self._total, _clock(left), note and "; " + note)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
