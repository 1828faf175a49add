"""The log of a run: a CSV in long format and TensorBoard events, cut back on resume."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from scantly.files import atomic_path

__all__ = ["RunLog"]

COLUMNS = ("iteration", "stage", "name", "value")


class RunLog:
    """Append scalars to ``log/metrics.csv`` and TensorBoard.

    Args:
        folder: The run's ``log`` folder.
        resume_at: Iterations that the checkpoint has completed; later lines are removed. 0 starts anew.
    """

    def __init__(self, folder: Path, *, resume_at: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.csv"
        self._cut_back(resume_at)
        events = folder / "tensorboard"
        if resume_at == 0:
            shutil.rmtree(events, ignore_errors=True)
        self._board = SummaryWriter(str(events), purge_step=resume_at + 1)
        self._stream = self._path.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)

    def _cut_back(self, resume_at: int) -> None:
        kept: list[list[str]] = []
        if resume_at > 0 and self._path.exists():
            with self._path.open(newline="", encoding="utf-8", errors="replace") as stream:  # a kill cuts anywhere
                rows = [row for row in csv.reader(stream) if len(row) == len(COLUMNS)]
            # The last line may be cut by the kill; whatever follows the checkpoint is written again.
            kept = [row for row in rows[1:] if row[0].isdecimal() and int(row[0]) <= resume_at]
        with (
            atomic_path(self._path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows(kept)

    def write(self, iteration: int, stage: str, values: Mapping[str, float]) -> None:
        """Record named scalars.

        Args:
            iteration: Number of completed iterations of the run.
            stage: Name of the stage.
            values: For instance ``{"loss/supervised": 0.7}``.
        """
        for name, value in values.items():
            self._writer.writerow([iteration, stage, name, repr(float(value))])
            self._board.add_scalar(name, value, iteration)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._stream.flush()
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._stream.close()
        self._board.close()
