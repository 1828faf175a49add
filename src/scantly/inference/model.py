"""The model file: weights and everything needed to predict with them, without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from scantly.data.plan import Plan
from scantly.errors import ConfigError, RunError, unknown_name
from scantly.files import atomic_path
from scantly.inference.settings import DEFAULT_INFERENCE, InferenceSettings
from scantly.methods import catalogue
from scantly.methods.base import Method, MethodConfig, Task
from scantly.settings import parse

__all__ = ["FORMAT_VERSION", "Model", "load_model", "model_file", "save_model"]

FORMAT_VERSION = 1
_KEY = "scantly"


@dataclass(frozen=True)
class Model:
    """A predictor and how its inputs are prepared.

    Attributes:
        network: Images ``(B, C, *spatial)`` -> logits ``(B, classes, *spatial)``, in evaluation mode.
        task: Classes, channels, dimensions, patch.
        plan: How scans are prepared.
        method: Catalogue name of the method that trained it.
        configuration: The method's settings.
        inference: How whole scans are predicted unless asked otherwise.
        changed: Those of the method's settings that differ from the file's, see :func:`load_model`.
    """

    network: nn.Module
    task: Task
    plan: Plan
    method: str
    configuration: Mapping[str, Any]
    inference: InferenceSettings = DEFAULT_INFERENCE
    changed: Mapping[str, Any] = field(default_factory=dict)


def save_model(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    task: Task,
    plan: Plan,
    method: str,
    configuration: Mapping[str, Any],
    inference: InferenceSettings | None = None,
) -> None:
    """Write ``model.safetensors``, atomically.

    The metadata is one JSON text under one key, without time or path, so equal runs give equal bytes.

    Args:
        path: File to write.
        weights: ``state_dict`` of the predictor.
        task: The task.
        plan: The plan.
        method: Catalogue name.
        configuration: The method's settings.
        inference: How whole scans are predicted; ``batch`` is the machine's matter and not kept. ``None``: as the
            reader's defaults say.
    """
    from safetensors.torch import save

    content = {
        "format": FORMAT_VERSION,
        "task": task.to_dict(),
        "plan": plan.model_dump(mode="json"),
        "method": method,
        "configuration": dict(configuration),
        **({} if inference is None else {"inference": inference.to_dict()}),
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    data = save(tensors, metadata={_KEY: json.dumps(content, sort_keys=True)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def model_file(path: Path) -> Path:
    """The file itself, or the one in a run folder."""
    return path / "model.safetensors" if path.is_dir() else path


def _missing(path: Path, file: Path) -> str:
    """Sentence for a model that is not there; it speaks of a training or a checkpoint only where there is one."""
    if not (path / "config.yaml").is_file():
        return f"{file} does not exist; give the run folder of a finished training, or a model.safetensors."
    there = (path / "checkpoints" / "last.ckpt").is_file()
    how = "continue it with --resume" if there else "it left no checkpoint, give the same scantly train again"
    return f"{file} does not exist: the training has not finished; {how}."


def load_model(path: Path, *, method: Mapping[str, Any] | None = None) -> Model:
    """Read ``model.safetensors``; nothing else of the run folder is needed.

    Args:
        path: The file, or the run folder that holds it.
        method: Settings of the method to be changed, by name: those of :attr:`Method.prediction_settings`, for
            instance ``{"infer": "ds"}`` for Diff-CL.

    Raises:
        RunError: if it is missing, damaged, of a newer format, or does not fit the network it names.
        ConfigError: for a setting that a finished model cannot change, or a bad value.
    """
    from safetensors import SafetensorError, safe_open

    file = model_file(path)
    if not file.is_file():
        raise RunError(_missing(path, file))
    try:
        with safe_open(str(file), framework="pt") as stream:
            content = json.loads((stream.metadata() or {})[_KEY])
            weights = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise RunError(f"{file} is damaged or was not written by Scantly ({error}); train or copy it again.") from error
    if content["format"] > FORMAT_VERSION:
        raise RunError(
            f"{file} has format {content['format']}, this Scantly reads up to {FORMAT_VERSION}; update Scantly."
        )
    task = Task.from_dict(content["task"])
    plan = parse(Plan, content["plan"], where=f"{file}: plan")
    if content["method"] not in catalogue.methods():
        raise RunError(
            f"{file} was trained by method '{content['method']}', which no installed package has; install the package "
            "that it came from."
        )
    kind = catalogue.load(content["method"])
    original = parse(kind.Config, content["configuration"], where=f"{file}: method")
    settings = _changed(kind, content["method"], content["configuration"], method or {})
    network = kind(task, settings).predictor
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise RunError(f"{file} does not fit its own network description ({error}).") from error
    network.requires_grad_(False).eval()
    inference = parse(InferenceSettings, content.get("inference", {}), where=f"{file}: inference")
    configuration, before = settings.model_dump(mode="json"), original.model_dump(mode="json")
    changed = {name: value for name, value in configuration.items() if value != before[name]}
    return Model(network, task, plan, content["method"], configuration, inference, changed)


def _changed(kind: type[Method], name: str, stored: Mapping[str, Any], values: Mapping[str, Any]) -> MethodConfig:
    """The stored settings with some values in place of theirs."""
    for key in values:
        if key not in kind.Config.model_fields:
            raise ConfigError(unknown_name(f"setting of method {name}", key, kind.Config.model_fields))
        if key not in kind.prediction_settings:
            free = " and ".join(f"method.{free}" for free in sorted(kind.prediction_settings)) or "nothing"
            raise ConfigError(
                f"setting 'method.{key}' belongs to the training of this {name} model; for a prediction {free} can be "
                "changed."
            )
    return parse(kind.Config, {**stored, **values}, where="method")
