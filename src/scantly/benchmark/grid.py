"""The grid: which cells are done, which are to be done, and what came of each."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from scantly.benchmark.cells import NNUNET, Cell
from scantly.benchmark.local import Pool
from scantly.benchmark.spec import BenchmarkSpec
from scantly.benchmark.work import Job, Outcome
from scantly.errors import ConfigError, RunError
from scantly.files import digest, read_json, write_json
from scantly.training.config import IRRELEVANT_KEYS
from scantly.training.progress import ProgressLine

__all__ = ["SPEC_FILE", "Grid", "GridState", "duration"]

_LOGGER = logging.getLogger("scantly")
T = TypeVar("T")
SPEC_FILE = "benchmark.json"
#: What a start leaves that was killed before it had written anything.
_NOTHING_YET = (".lock", ".tmp-")
#: Free space below which a benchmark does not go on, in bytes.
_LEAST_FREE = 200 * 2**20


@dataclass(frozen=True)
class GridState:
    """How far a benchmark has come: cells by state, in their order."""

    done: tuple[Cell, ...]
    failed: Mapping[str, Outcome]
    open: tuple[Cell, ...]


class Grid:
    """A folder of results, the cells that belong in it, and what is known of them.

    Layout: ``benchmark.json`` (the benchmark and a digest of every cell's configuration), ``cells/DATASET/CELL`` (run
    folders), ``outcomes/DATASET/CELL.json``, ``logs/DATASET/CELL.log``.

    Args:
        folder: The results folder, new, or one of the same benchmark.
        spec: The benchmark.
        cells: Its cells, resolved.
    """

    def __init__(self, folder: Path, spec: BenchmarkSpec, cells: Sequence[Cell]) -> None:
        self.folder, self.spec, self.cells = folder, spec, tuple(cells)
        self._lock = FileLock(folder / ".lock")

    def run_folder(self, cell: Cell) -> Path:
        """Where a cell is trained."""
        return self.folder / "cells" / cell.name

    def outcome(self, cell: Cell) -> Outcome | None:
        """What came of a cell; ``None`` where nothing is recorded.

        Raises:
            ConfigError: if the file that says so is damaged.
        """
        path = self._outcome_path(cell.name)
        return _read(path, Outcome.from_dict) if path.is_file() else None

    def _outcome_path(self, name: str) -> Path:
        return self.folder / "outcomes" / f"{name}.json"

    def _finished(self, cell: Cell) -> bool:
        """Whether the results are there too: somebody may have removed the run folder to have it anew."""
        return (self.run_folder(cell) / "evaluation" / f"{cell.split}.json").is_file()

    def state(self, *, retry_failed: bool = False) -> GridState:
        """Cells by state.

        Args:
            retry_failed: Whether failed cells are to be done again.
        """
        done, todo, failed = [], [], {}
        for cell in self.cells:
            outcome = self.outcome(cell)
            if outcome is not None and outcome.state == "done" and self._finished(cell):
                done.append(cell)
            elif outcome is not None and outcome.state == "failed" and not retry_failed:
                failed[cell.name] = outcome
            else:
                todo.append(cell)
        return GridState(tuple(done), failed, tuple(todo))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder alone and make it this benchmark's; may be nested.

        A benchmark may grow: cells that are there keep their configuration, others come to them.

        Raises:
            RunError: if another process works in it, or it holds something else or other cells.
        """
        self.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise RunError(
                f"another process works on the benchmark in {self.folder}; wait for it or choose another --out."
            ) from None
        try:
            self.check()  # again: another process may have begun in it a moment ago
            write_json(
                self.folder / SPEC_FILE, {"benchmark": self.spec.model_dump(mode="json"), "cells": self._digests()}
            )
            yield
        finally:
            self._lock.release()

    def check(self) -> None:
        """Refuse a folder that holds something else; nothing is written.

        Raises:
            RunError: see :meth:`claimed`.
        """
        if not self.folder.exists():
            return
        path = self.folder / SPEC_FILE
        if not path.is_file():
            strangers = [item.name for item in self.folder.iterdir() if not item.name.startswith(_NOTHING_YET)]
            if strangers:
                raise RunError(
                    f"{self.folder} is not empty (it holds {strangers[0]!r}) and holds no benchmark; choose another "
                    "--out."
                )
            return
        there, here = _read(path, lambda values: dict(values["cells"])), self._digests()
        begun = {name for name in there if self._begun(name)}
        gone = sorted(name for name in begun if name not in here)
        changed = sorted(name for name in begun if name in here and here[name] != there[name])
        if gone or changed:
            what = f"{changed[0]} has another configuration there" if changed else f"{gone[0]} is not in this one"
            more = len(gone) + len(changed) - 1
            raise RunError(
                f"{self.folder} holds another benchmark: cell {what}{f' ({more} more)' if more else ''}; choose "
                "another --out. A benchmark may grow by methods, seeds and counts, but not change."
            )

    def _begun(self, name: str) -> bool:
        files = (path for path in (self.folder / "cells" / name).rglob("*") if path.is_file())
        return self._outcome_path(name).is_file() or any(not path.name.startswith(_NOTHING_YET) for path in files)

    def _digests(self) -> dict[str, str]:
        return {cell.name: _digest(cell) for cell in self.cells}

    def work(
        self, pool: Pool, *, threads: int, retry_failed: bool = False, remote: str | None = None, quiet: bool = False
    ) -> GridState:
        """Do what is to be done.

        Args:
            pool: Where.
            threads: PyTorch threads of a cell; 0: as PyTorch chooses.
            retry_failed: Whether failed cells are done again.
            remote: Address under which run folders are kept, ``None``: here.
            quiet: Show no progress.

        Returns:
            The state afterwards.

        Raises:
            RunError: if the disk is full, or nearly; what was done stays, the same command goes on.
        """
        with self.claimed():
            todo = self.state(retry_failed=retry_failed).open
            jobs = [self._job(cell, threads, remote) for cell in todo]
            clock = _Clock({cell.name: (cell.dataset, cell.row) for cell in self.cells}, self.known_seconds())
            done, left = len(self.cells) - len(todo), [job.name for job in jobs]
            if left:
                self._require_space()
            with ProgressLine("cells", len(self.cells), quiet=quiet) as line, closing(pool.run(jobs)) as outcomes:
                for outcome in outcomes:
                    self._record(outcome)
                    left.remove(outcome.name)
                    done += 1
                    clock.note(outcome)
                    self._tell(outcome, line, done, clock.left(left, pool.processes))
                    if outcome.kind == "disk":
                        raise RunError(
                            f"the disk is full: {outcome.reason.rstrip('.')}. When there is space, the same command "
                            "goes on from what was saved."
                        )
                    if left:
                        self._require_space()
        return self.state()

    def _job(self, cell: Cell, threads: int, remote: str | None) -> Job:
        assert cell.config is not None
        assert cell.split is not None
        return Job(
            name=cell.name,
            folder=str(self.run_folder(cell).absolute()),  # a worker of Ray has another working folder
            config=cell.config.model_dump(mode="json"),
            split=cell.split,
            threads=threads,
            kind="nnunetv2" if cell.row == NNUNET else "train",
            remote=None if remote is None else f"{remote.rstrip('/')}/cells/{cell.name}",
            log=str((self.folder / "logs" / f"{cell.name}.log").absolute()),
        )

    def _require_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < _LEAST_FREE:
            raise RunError(
                f"{self.folder} has {free // 2**20} MB left on its disk; free {_LEAST_FREE // 2**20} MB or more, or "
                "choose another --out. The same command goes on."
            )

    def _record(self, outcome: Outcome) -> None:
        """Write an outcome, with the attempts of earlier starts."""
        if outcome.kind == "disk":
            return
        path = self._outcome_path(outcome.name)
        earlier = _read(path, lambda values: list(values["attempts"])) if path.is_file() else []
        write_json(path, {**outcome.to_dict(), "attempts": [*earlier, *outcome.to_dict()["attempts"]]})

    def _tell(self, outcome: Outcome, line: ProgressLine, done: int, left: float | None) -> None:
        if outcome.state == "failed" and outcome.kind != "disk":
            _LOGGER.warning("%s failed: %s", outcome.name, outcome.reason)
        line.update(done, note=f"{outcome.name} {outcome.state}", force=True, left=left)

    def known_seconds(self) -> dict[tuple[str, str], float]:
        """Mean seconds of the cells that are done, by dataset and row."""
        found: dict[tuple[str, str], list[float]] = {}
        for cell in self.cells:
            outcome = self.outcome(cell)
            if outcome is not None and outcome.state == "done":
                found.setdefault((cell.dataset, cell.row), []).append(_seconds(outcome))
        return {row: sum(seconds) / len(seconds) for row, seconds in found.items()}


def _read(path: Path, take: Callable[[Any], T]) -> T:
    try:
        return take(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} was not written by a benchmark ({error!r}); mend or remove it.") from error


def _seconds(outcome: Outcome) -> float:
    spent = sum(attempt.get("seconds", 0.0) for attempt in outcome.attempts)
    return float(max(outcome.cost.get("seconds", 0.0), spent))


def _digest(cell: Cell) -> str:
    """Of what decides a cell's result."""
    assert cell.config is not None
    values: dict[str, Any] = cell.config.model_dump(mode="json")
    for key in IRRELEVANT_KEYS:
        section, *path = key.split(".")
        place = values[section]
        for part in path[:-1]:
            place = place[part]
        place.pop(path[-1], None)
    return digest({**values, "reported on": cell.split})


class _Clock:
    """Time left, from cells of the same row, else of the same dataset, else of all."""

    def __init__(self, about: Mapping[str, tuple[str, str]], known: Mapping[tuple[str, str], float]) -> None:
        self._about = about
        self._seconds = {row: [seconds] for row, seconds in known.items()}

    def note(self, outcome: Outcome) -> None:
        """A cell is done."""
        if outcome.state == "done":
            self._seconds.setdefault(self._about[outcome.name], []).append(_seconds(outcome))

    def left(self, names: Sequence[str], processes: int) -> float | None:
        """Seconds, ``None`` while nothing is known."""
        if not self._seconds:
            return None
        return sum(self._of(*self._about[name]) for name in names) / max(1, processes)

    def _of(self, dataset: str, row: str) -> float:
        known = self._seconds
        alike = known.get((dataset, row)) or [s for (d, _), all_ in known.items() if d == dataset for s in all_]
        found = alike or [s for all_ in known.values() for s in all_]
        return sum(found) / len(found)


def duration(seconds: float) -> str:
    """In words.

    Example:
        >>> duration(3 * 3600 + 14 * 60 + 5)
        '3 h 14 min'
        >>> duration(41.3)
        '41 s'
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{rest} s"
