"""nnU-Net itself as a row of a benchmark: planned, trained and asked by its own commands, on the same labeled cases.

Isensee et al., "nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation", Nature
Methods 2021; package ``nnunetv2``. It gets the labeled cases alone, trains on all of them (fold ``all``), and its
predictions are scored as those of the other rows. It counts epochs of 250 iterations, of which it offers certain
numbers: the nearest to the iterations of the other rows is taken. It cannot be seeded, so cells of several seeds are
repetitions; and its augmentation, patch, batch and network are its own, so iterations are not equal work.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from scantly.data.dataset import Dataset
from scantly.errors import ConfigError, RunError
from scantly.evaluation import make_table, save_table, score_case, summarize
from scantly.files import write_json, write_text, write_yaml
from scantly.imaging import file_ending, read_label

if TYPE_CHECKING:
    from scantly.training.config import RunConfig

__all__ = ["EPOCHS", "epochs", "require_nnunet", "train_nnunet"]

#: Numbers of epochs for which nnU-Net has a trainer.
EPOCHS = (1, 5, 10, 20, 50, 100, 250, 500, 750, 1000, 2000, 4000, 8000)
_ITERATIONS = 250
_ID, _NAME = "1", "Dataset001_scantly"
_COMMANDS = ("nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict")


def require_nnunet() -> None:
    """Refuse where nnU-Net is not installed.

    Raises:
        ConfigError: naming the cure.
    """
    missing = [command for command in _COMMANDS if _which(command) is None]
    if missing:
        raise ConfigError(
            f"nnunetv2 is asked for, but {missing[0]} is not installed; pip install 'scantly[bench]', or leave it out."
        )


def _which(command: str) -> str | None:
    """A command beside this interpreter, or on the path."""
    return shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)


def epochs(steps: int) -> int:
    """The number of epochs on offer that is nearest to so many iterations.

    Example:
        >>> epochs(1500), epochs(30_000)
        (5, 100)
    """
    wanted = steps / _ITERATIONS
    return min(EPOCHS, key=lambda count: (abs(count - wanted), count))


def train_nnunet(folder: Path, config: RunConfig, split: str, *, device: str) -> dict[str, Any]:
    """Prepare, train, predict and score, each step only where it is not done; the folder then reads as a run.

    Args:
        folder: The cell's folder.
        config: The configuration of the supervised row with the same labels: its split, dimensions and length count.
        split: ``val`` or ``test``.
        device: ``cpu`` or ``cuda``.

    Returns:
        What it cost, see :class:`~scantly.benchmark.work.Outcome`.

    Raises:
        RunError: if one of its commands fails, with the last line that it said.
    """
    begun = time.monotonic()
    dataset = Dataset.open(Path(config.data.dataset))
    own = folder / "nnunet"
    _write_raw(own / "raw" / _NAME, dataset, config.split["labeled"])
    kind = "2d" if config.plan.spatial_dims == 2 else "3d_fullres"
    count = epochs(config.training.steps)
    trainer = "nnUNetTrainer" if count == 1000 else f"nnUNetTrainer_{count}epoch{'' if count == 1 else 's'}"
    names = ("raw", "preprocessed", "results")
    environment = {**os.environ, **{f"nnUNet_{name}": str(own / name) for name in names}}
    if not (own / "preprocessed" / _NAME / "nnUNetPlans.json").is_file():
        _call([_COMMANDS[0], "-d", _ID, "-c", kind, "-np", "1"], environment)
    trained = own / "results" / _NAME / f"{trainer}__nnUNetPlans__{kind}" / "fold_all"
    if not (trained / "checkpoint_final.pth").is_file():
        words = [_COMMANDS[1], _ID, kind, "all", "-tr", trainer, "-device", device]
        _call([*words, *(["--c"] if (trained / "checkpoint_latest.pth").is_file() else [])], environment)
    predictions = folder / "predictions" / split
    cases = config.split[split]
    if any(not (predictions / f"{name}{dataset.file_ending}").is_file() for name in cases):
        _write_images(own / "asked", dataset, cases)
        words = [_COMMANDS[2], "-i", str(own / "asked"), "-o", str(predictions), "-d", _ID, "-c", kind, "-f", "all"]
        _call([*words, "-tr", trainer, "-device", device], environment)
    _write_run(folder, dataset, config, split, count=count, seconds=time.monotonic() - begun)
    spent = time.monotonic() - begun
    return {
        "seconds": round(spent, 1),
        "seconds_per_iteration": spent / (count * _ITERATIONS),
        "parameters": None,  # only its pickled checkpoint knows
        "predicting": None,
        "model_bytes": (trained / "checkpoint_final.pth").stat().st_size,
    }


def _write_raw(folder: Path, dataset: Dataset, labeled: Sequence[str]) -> None:
    """The labeled cases in nnU-Net's layout, as links."""
    _write_images(folder / "imagesTr", dataset, labeled)
    (folder / "labelsTr").mkdir(parents=True, exist_ok=True)
    for name in labeled:
        label = dataset.case(name).label
        assert label is not None
        _link(label, folder / "labelsTr" / f"{name}{file_ending(label)}")
    write_json(
        folder / "dataset.json",
        {
            "channel_names": {str(number): name for number, name in enumerate(dataset.channels)},
            "labels": {name: value for value, name in enumerate(dataset.classes)},
            "numTraining": len(labeled),
            "file_ending": dataset.file_ending,
        },
    )


def _write_images(folder: Path, dataset: Dataset, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for channel, image in enumerate(dataset.case(name).images):
            _link(image, folder / f"{name}_{channel:04d}{file_ending(image)}")


def _link(source: Path, target: Path) -> None:
    if not target.exists():
        target.symlink_to(source.resolve())


def _call(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """One of its commands; it ends when this process is asked to end.

    Raises:
        RunError: if it fails.
    """
    program = _which(words[0])
    process = subprocess.Popen([str(program), *words[1:]], env=dict(environment), stdout=sys.stderr)

    def forward(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        process.terminate()
        process.wait()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, forward)
    try:
        status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise RunError(f"{words[0]} ended with status {status}; the cell's log has what it said.")


def _write_run(folder: Path, dataset: Dataset, config: RunConfig, split: str, *, count: int, seconds: float) -> None:
    """Configuration, environment, log and scores, so that report and tables read the folder as any other."""
    values = config.model_dump(mode="json")
    values |= {"recipe": None, "method": {"name": "nnunetv2", "epochs": count}}
    values["training"] = {**values["training"], "steps": count * _ITERATIONS, "published_steps": None}
    values["evaluation"] = {**values["evaluation"], "selection": "last"}
    write_yaml(folder / "config.yaml", values)
    version = metadata.version("nnunetv2") if util.find_spec("nnunetv2") else "unknown"
    write_json(folder / "environment.json", {"device_name": "", "threads": 0, "packages": {"nnunetv2": version}})
    last = count * _ITERATIONS
    lines = [f"{last},train,time/seconds_per_iteration,{seconds / last:.6g}", f"{last},train,time/data_wait,0"]
    write_text(folder / "log" / "metrics.csv", "\n".join(["iteration,stage,name,value", *lines]) + "\n")
    rows: list[dict[str, Any]] = []
    for name in config.split[split]:
        predicted = read_label(folder / "predictions" / split / f"{name}{dataset.file_ending}")
        reference = dataset.read_label(name)
        rows += score_case(
            predicted.array,
            reference.array,
            classes=dataset.classes,
            spacing=reference.geometry.spacing if reference.geometry.has_spacing else None,
            convention=config.evaluation.protocol,
            case=name,
        )
    table, kind = make_table(rows), config.evaluation.protocol
    summary = {"split": split, "name": split, "method": "nnunetv2", "seed": config.training.seed}
    save_table(table, folder / "evaluation" / f"{split}.csv")
    write_json(folder / "evaluation" / f"{split}.json", {**summary, **summarize(table, protocol=kind, convention=kind)})
