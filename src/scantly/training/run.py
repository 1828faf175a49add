"""The run folder: what is in it, who may write it, and how it is read."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scantly.arguments import checked
from scantly.data.splits import Split
from scantly.errors import ConfigError, RunError
from scantly.files import read_json, read_text, read_yaml, sole_writer, write_json, write_yaml
from scantly.settings import parse
from scantly.training.config import IRRELEVANT_KEYS, RunConfig

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run"]

_LOGGER = logging.getLogger("scantly")


class Run:
    """A trained or half-trained model with its configuration, log, weights and results.

    Args:
        folder: The run folder; use :meth:`open` for one that exists.
    """

    @checked()
    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @classmethod
    @checked()
    def open(cls, folder: str | Path) -> Run:
        """Open an existing run.

        Raises:
            RunError: if the folder is no run.
        """
        path = Path(folder)
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path} is not a run folder (it has no config.yaml); give the --out of a scantly train.")
        return cls(path)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain data."""
        return read_yaml(self.folder / "config.yaml")

    @property
    def settings(self) -> RunConfig:
        """The resolved configuration, typed."""
        return parse(RunConfig, self.config, where="")

    @property
    def split(self) -> Split:
        """The cases by role."""
        return Split.from_dict(self.config["split"])

    @cached_property
    def environment(self) -> dict[str, Any]:
        """What it was computed with."""
        return read_json(self.folder / "environment.json")

    @property
    def model_path(self) -> Path:
        """The weights that predict."""
        return self.folder / "model.safetensors"

    def stage_checkpoint(self, index: int) -> Path:
        """What a stage that begins with the best validation so far began with."""
        return self.folder / "checkpoints" / f"stage-{index}.ckpt"

    @property
    def last_checkpoint(self) -> Path:
        """The full state of the last checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        """The predictor's weights at the best validation."""
        return self.folder / "checkpoints" / "best.ckpt"

    def clear_leftovers(self) -> None:
        """Remove what a kill has left of checkpoints; without the last one the training begins anew, and none holds."""
        folder = self.last_checkpoint.parent
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)
        if not self.last_checkpoint.is_file():
            for later in (self.best_checkpoint, *folder.glob("stage-*.ckpt")):
                later.unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        """Whether the training has come to its end."""
        return self.model_path.is_file()

    def log(self) -> pd.DataFrame:
        """The log in long format: columns ``iteration``, ``stage``, ``name``, ``value``.

        Raises:
            RunError: if it is missing, damaged or empty.
        """
        import pandas as pd

        path = self.folder / "log" / "metrics.csv"
        try:
            return pd.read_csv(io.StringIO(read_text(path)))
        except ConfigError as error:
            raise RunError(str(error)) from error
        except pd.errors.EmptyDataError:
            raise RunError(f"{path} is empty; train the run again.") from None
        except pd.errors.ParserError as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{path} is not the log of a training ({reason}); train the run again.") from error

    def timing(self) -> tuple[float, float]:
        """Mean seconds per iteration, and the share of the training time (0 to 1) spent waiting for batches.

        Validation and writing checkpoints do not count.
        """
        log = self.log().pivot_table(index="iteration", columns="name", values="value")
        times = log[["time/seconds_per_iteration", "time/data_wait"]].dropna()
        steps = times.index.to_series().diff().fillna(times.index[0])  # each line covers those since the one before
        seconds = times["time/seconds_per_iteration"] * steps
        return float(seconds.sum() / steps.sum()), float((seconds * times["time/data_wait"]).sum() / seconds.sum())

    @checked()
    def evaluation(self, split: str) -> pd.DataFrame | None:
        """Per-case table of a split; ``None`` if it was not evaluated."""
        from scantly.evaluation import load_table

        path = self.folder / "evaluation" / f"{split}.csv"
        return load_table(path) if path.is_file() else None

    @checked()
    def summary(self, split: str) -> dict[str, Any]:
        """Means and counts of an evaluated split.

        Raises:
            RunError: if it was not evaluated.
        """
        path = self.folder / "evaluation" / f"{split}.json"
        if not path.is_file():
            raise RunError(f"{self.folder} has no evaluation of '{split}'; run scantly evaluate {self.folder} first.")
        return read_json(path)

    @checked()
    def predictions(self, split: str) -> Path:
        """Folder of the predictions of a split."""
        return self.folder / "predictions" / split

    @checked()
    def evaluate(self, split: str | None = None, *, device: str = "auto") -> Run:
        """Predict a split, write the per-case table and its summary; returns the run itself.

        Args:
            split: ``"val"`` or ``"test"``; ``None``: test where there are test cases with labels, else val.
            device: ``auto``, ``cpu`` or ``cuda``.
        """
        from scantly.training.evaluate import evaluate_run

        evaluate_run(self, split, device=device)
        return self

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder alone; the lock falls with the process, however it ends.

        Raises:
            RunError: if another process trains in this folder.
        """
        with sole_writer(self.folder, "training"):
            yield

    def claim(self, config: RunConfig, environment: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder this configuration's, or refuse it untouched.

        Args:
            config: The configuration to be trained.
            environment: From :func:`~scantly.training.environment.describe_environment`.
            resume: Whether an unfinished run may be continued.

        Raises:
            RunError: if the folder holds something else, another configuration, or an unfinished run and
                ``resume`` is not given.
        """
        path = self.folder / "config.yaml"
        values = config.model_dump(mode="json")
        started = (self.folder / "log").exists() or self.finished
        if path.is_file() and started:
            differences = _differences(read_yaml(path), values)
            if differences:
                listed = "\n".join(f"  {line}" for line in differences)
                raise RunError(
                    f"{self.folder} holds a run of another configuration; choose another --out. It differs in "
                    f"(there -> here):\n{listed}"
                )
            self._warn_of_another_environment(environment)
            if self.last_checkpoint.is_file() and not self.finished and not resume:
                raise RunError(
                    f"{self.folder} holds an unfinished run; continue it with --resume, or choose another --out."
                )
            return
        ours = (".lock", ".tmp-", "config.yaml", "environment.json")  # claimed, but nothing was trained
        strangers = [item.name for item in self.folder.iterdir() if not item.name.startswith(ours)]
        if strangers:
            raise RunError(
                f"{self.folder} is not empty (it holds {strangers[0]!r}) and is no run folder; choose another --out."
            )
        write_json(self.folder / "environment.json", dict(environment))
        write_yaml(path, values)

    def _warn_of_another_environment(self, environment: Mapping[str, Any]) -> None:
        """A resumed run is bit-identical only where it began."""
        before = self.environment
        for key in ("device_name", "threads", "packages"):
            if not self.finished and before.get(key) != environment.get(key):
                _LOGGER.warning(
                    "%s began with %s %s, this is %s; resuming will not be bit-identical",
                    self.folder,
                    key.replace("_", " "),
                    _short(before.get(key)),
                    _short(environment.get(key)),
                )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines: list[str] = []
    for key in sorted({*there, *here}):
        path = f"{prefix}{key}"
        if path in IRRELEVANT_KEYS:
            continue
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += _differences(old, new, f"{path}.")
        elif old != new:
            lines.append(f"{path}: {_short(old)} -> {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
