"""Optimizers, learning-rate schedules, and the handles that a method's step uses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.methods.base import Method, OptimizerSpec, Stage
from scantly.ranks import any_rank, average_over_ranks, world_size
from scantly.training.config import TrainingSection

__all__ = ["TrainingHandles", "learning_rate"]


def learning_rate(
    name: str, iteration: int, total: int, settings: TrainingSection, *, counted_first: bool = False
) -> float:
    """Factor on the initial learning rate at one step.

    As in the public code of the field the schedule is advanced after each step with the counter before its
    increment: steps 0 and 1 both run at the initial rate, step ``t >= 1`` at the value of ``t - 1``. The public code of
    CPS counts first.

    Args:
        name: ``poly``: ``(1 - t/T)^power``; ``step``: times ``gamma`` after each milestone; ``constant``.
        iteration: Step within the stage, from 0.
        total: Steps of the stage.
        settings: ``power``, ``milestones``, ``gamma``.
        counted_first: ``poly``: step ``t`` runs at the value of ``t``.

    Returns:
        Factor in (0, 1].
    """
    if name == "poly":
        return math.pow(1.0 - max(iteration if counted_first else iteration - 1, 0) / total, settings.power)
    if name == "step":
        passed = sum(iteration >= round(share * total) for share in settings.milestones)
        return math.pow(settings.gamma, passed)
    return 1.0


class TrainingHandles:
    """Named optimizers of a method with clipping, averaging over ranks and schedules inside.

    Args:
        method: Its optimizers for the stage are built.
        stage: The stage.
        settings: Section ``training``.
        total: Iterations of the learning-rate schedule: of the stage, and those that keep its optimizers.
    """

    def __init__(self, method: Method, stage: Stage, settings: TrainingSection, total: int) -> None:
        self._settings = settings
        self._total = total
        self._specs = method.optimizers(stage)
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._initial: dict[str, float] = {}
        for name, spec in self._specs.items():
            parameters = [p for p in spec.parameters or method.parameters() if p.requires_grad]
            if not parameters:
                raise ConfigError(f"optimizer '{name}' of {type(method).__name__} has no parameter to train.")
            self._initial[name] = settings.lr if spec.lr is None else spec.lr
            self._optimizers[name] = _build(spec, parameters, settings, self._initial[name])
        self.set_iteration(0)

    def set_iteration(self, iteration: int) -> None:
        """Set every learning rate for this step of the schedule, from 0."""
        for name, optimizer in self._optimizers.items():
            spec, settings = self._specs[name], self._settings
            if spec.power is not None:
                settings = settings.model_copy(update={"power": spec.power})
            schedule = spec.schedule or settings.schedule
            factor = learning_rate(schedule, iteration, self._total, settings, counted_first=spec.counted_first)
            for group in optimizer.param_groups:
                group["lr"] = spec.end_lr + (self._initial[name] - spec.end_lr) * factor

    def rates(self) -> dict[str, float]:
        """Current learning rate of each optimizer."""
        return {name: float(optimizer.param_groups[0]["lr"]) for name, optimizer in self._optimizers.items()}

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradient of ``loss``, to the parameters of one optimizer or to all leaves."""
        with torch.autocast(loss.device.type, enabled=False):  # backward runs in the precision of the forward
            torch.autograd.backward(loss, inputs=None if name is None else self._parameters(name))

    def average_gradients(self, name: str = "main") -> None:
        """Average the gradients of one optimizer over the ranks.

        What was averaged before stays as it is, so gradients may be added after it and averaged again. A parameter that
        has a gradient on no rank has none afterwards, so that its optimizer leaves it alone, as in one process.
        """
        if world_size() == 1:
            return
        parameters, gradients = self._parameters(name), []
        for parameter, held in zip(parameters, any_rank(*(p.grad is not None for p in parameters)), strict=True):
            if held:  # on any rank, and then every rank must take part
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        average_over_ranks(gradients)

    def update(self, name: str = "main") -> None:
        """Average, clip, step, clear."""
        self.average_gradients(name)
        largest = self._specs[name].gradient_clip or self._settings.gradient_clip
        if largest is not None:
            nn.utils.clip_grad_norm_(self._parameters(name), largest)
        self._optimizers[name].step()
        self._optimizers[name].zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State of all optimizers."""
        return {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state[name])

    def _parameters(self, name: str) -> list[nn.Parameter]:
        return [p for group in self._optimizers[name].param_groups for p in group["params"]]


def _build(
    spec: OptimizerSpec, parameters: list[nn.Parameter], settings: TrainingSection, lr: float
) -> torch.optim.Optimizer:
    weight_decay = settings.weight_decay if spec.weight_decay is None else spec.weight_decay
    spared = {id(p) for p in spec.undecayed}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in spared]}]
    if spared:
        groups.append({"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0})
    name = spec.name or settings.optimizer
    if name == "sgd":
        momentum = settings.momentum if spec.momentum is None else spec.momentum
        if spec.nesterov and not momentum:
            raise ConfigError(
                "training.momentum is 0, but this method's SGD has Nesterov momentum; set training.momentum=0.9 or "
                "method.nesterov=false."
            )
        return torch.optim.SGD(
            groups,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=spec.nesterov,
            foreach=True,
        )
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr, betas=spec.betas, weight_decay=weight_decay, foreach=True)
