"""The contract of a method: what it is given, what it returns, what it may ask for.

A method is plain PyTorch and knows nothing of files, loops or devices, so that it can be used in anybody's training
loop. Of ranks it knows that a sum or an order over the batch is one over all of them (:mod:`scantly.ranks`).
Shapes: ``B`` batch (``Bl`` labeled, ``Bu`` unlabeled), ``C`` channels or classes, ``(B, C, *spatial)`` stands for
``(B, C, H, W)`` and ``(B, C, D, H, W)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from scantly import networks
from scantly.errors import ConfigError
from scantly.settings import Settings

__all__ = ["Batch", "Handles", "Method", "MethodConfig", "OptimizerSpec", "Progress", "Rows", "Stage", "Task"]


@dataclass(frozen=True)
class Task:
    """What is to be segmented, and with which backbone.

    Attributes:
        channels: Number of image channels.
        classes: Class names, background first; the index is the label value.
        spatial_dims: 2 or 3.
        patch_size: Size of a training patch in voxels, ``(H, W)`` or ``(D, H, W)``.
        network_name: Name in :func:`scantly.networks.known_networks`, ours or MONAI's.
        network_arguments: Keyword arguments of that network beyond channels, classes and dimensions.
    """

    channels: int
    classes: tuple[str, ...]
    spatial_dims: Literal[2, 3]
    patch_size: tuple[int, ...]
    network_name: str = "unet"
    network_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    def network(self, *, in_channels: int | None = None, out_channels: int | None = None) -> nn.Module:
        """Build one backbone, freshly initialized from torch's global generator.

        Args:
            in_channels: Channels of its input; ``None``: of the images.
            out_channels: Channels of its output; ``None``: the classes.
        """
        return networks.build(
            self.network_name,
            spatial_dims=self.spatial_dims,
            in_channels=self.channels if in_channels is None else in_channels,
            out_channels=self.num_classes if out_channels is None else out_channels,
            arguments=self.network_arguments,
        )

    def encoder_decoder(
        self, *, in_channels: int | None = None, out_channels: int | None = None
    ) -> networks.EncoderDecoder:
        """:meth:`network` for methods that use features, not logits alone.

        Args:
            in_channels: Channels of its input; ``None``: of the images.
            out_channels: Channels of its output; ``None``: the classes.

        Raises:
            ConfigError: if the backbone gives logits only, as MONAI's do.
        """
        network = self.network(in_channels=in_channels, out_channels=out_channels)
        if not isinstance(network, networks.EncoderDecoder):
            raise ConfigError(
                f"network {self.network_name} gives logits only, and this method needs its features; choose "
                "network.name unet, unet3d, vnet or dynunet."
            )
        return network

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which :meth:`from_dict` rebuilds the task."""
        return {
            "channels": self.channels,
            "classes": list(self.classes),
            "spatial_dims": self.spatial_dims,
            "patch_size": list(self.patch_size),
            "network_name": self.network_name,
            "network_arguments": dict(self.network_arguments),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "classes": tuple(values["classes"]), "patch_size": tuple(values["patch_size"])})


@dataclass
class Batch:
    """One step's data, on the training device. Labels of unlabeled cases never enter it.

    Attributes:
        labeled: Labeled images after the shared weak augmentation, ``(Bl, C, *spatial)``, float32.
        labels: Their labels under the same geometry, ``(Bl, *spatial)``, int64.
        unlabeled: Unlabeled images after the weak augmentation, ``(Bu, C, *spatial)``; ``Bu`` may be 0.
        labeled_raw: Labeled images before the weak augmentation.
        labels_raw: Labels before the weak augmentation.
        unlabeled_raw: Unlabeled images before the weak augmentation.
        labeled_cases: Case name of each labeled row.
        unlabeled_cases: Case name of each unlabeled row.
        pseudo_labels: Labels that an earlier stage wrote for the unlabeled rows, geometry as ``unlabeled``,
            ``(Bu, *spatial)``, int64; ``None`` before any stage has relabeled the pool.
        pseudo_labels_raw: The same before the weak augmentation.
        extra: A second group of labeled images, where the stage asks for one (:attr:`Stage.extra`), never augmented,
            ``(Be, C, *spatial)``; ``None`` elsewhere.
        extra_labels: Their labels, ``(Be, *spatial)``, int64.
    """

    labeled: Tensor
    labels: Tensor
    unlabeled: Tensor
    labeled_raw: Tensor
    labels_raw: Tensor
    unlabeled_raw: Tensor
    labeled_cases: tuple[str, ...] = ()
    unlabeled_cases: tuple[str, ...] = ()
    pseudo_labels: Tensor | None = None
    pseudo_labels_raw: Tensor | None = None
    extra: Tensor | None = None
    extra_labels: Tensor | None = None

    @property
    def images(self) -> Tensor:
        """Labeled rows first, then unlabeled ones, ``(Bl + Bu, C, *spatial)``."""
        return torch.cat([self.labeled, self.unlabeled])


@dataclass(frozen=True)
class Progress:
    """Where the training stands. All counts are calls of :meth:`Method.step`.

    Attributes:
        iteration: Iteration within the current stage, from 0.
        total: Iterations of the current stage.
        stage: Name of the current stage.
        run_iteration: Iteration within the run, all stages together, from 0.
        run_total: Iterations of the run.
    """

    iteration: int
    total: int
    stage: str = "train"
    run_iteration: int = 0
    run_total: int = 0

    def scaled(self, published_total: int) -> float:
        """This iteration on the clock of a paper that trained ``published_total`` iterations.

        A ramp published in iterations is evaluated at ``iteration * published_total / total``, so a
        shortened run keeps its proportions.
        """
        return self.iteration * published_total / self.total


@dataclass(frozen=True)
class Rows:
    """What one stream of a stage gives per step.

    Attributes:
        count: Rows; ``None``: as the plan says.
        classes: Only slices (in 2D), or cases and then patches (in 3D), with at least so many classes are drawn,
            background counted; 0: any. Where fewer than five (or all, if there are not five) have so many, one class
            less is asked for, and so on. Of unlabeled cases the pseudo-labels count, so a stage must have relabeled
            the pool.
    """

    count: int | None = None
    classes: int = 0


@dataclass(frozen=True)
class Stage:
    """A part of the training with its own losses, batches or optimizer state.

    Attributes:
        name: Shown in the progress and given to the method as ``progress.stage``.
        share: Share of the training budget; shares are normalized by their sum.
        labeled: Labeled rows per step.
        unlabeled: Unlabeled rows per step; ``Rows(0)`` loads none.
        extra: A second group of labeled rows, drawn apart from ``labeled`` and not augmented.
        restart_optimizers: Optimizers and learning-rate schedules start anew at the stage's first iteration;
            else both go on, the schedule over this stage and those before it that share the optimizers. The stages
            that share optimizers also share the search for the best validation, which begins anew with them.
        from_best: The stage begins with the weights, optimizers and memory of the best validation so far, where the
            run's model is chosen by validation; where it is the last iteration's, with what the last one left.
        relabel: Before the stage begins, and after ``from_best``, the engine predicts the unlabeled pool with
            ``method.predictor`` and gives the result as ``batch.pseudo_labels`` from then on.
    """

    name: str = "train"
    share: float = 1.0
    labeled: Rows = Rows()
    unlabeled: Rows = Rows()
    extra: Rows = Rows(0)
    restart_optimizers: bool = True
    from_best: bool = False
    relabel: bool = False


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer of a method. ``None`` takes the recipe's value (section ``training``).

    Attributes:
        parameters: What it trains; ``None``: every parameter of the method that requires a gradient.
        name: ``sgd``, ``adam`` or ``adamw``.
        lr: Learning rate at the first step.
        momentum: SGD's momentum.
        weight_decay: L2 penalty (``adamw``: decoupled).
        betas: Adam's decay rates.
        nesterov: Nesterov momentum, SGD only.
        schedule: ``poly``, ``step`` or ``constant``.
        power: Exponent of the poly schedule.
        counted_first: The poly schedule is advanced before the step: step ``t`` runs at ``t``'s rate, not ``t - 1``'s.
        end_lr: Learning rate that the poly schedule falls to.
        gradient_clip: Largest norm of this optimizer's gradients.
        undecayed: Those of the parameters that ``weight_decay`` leaves alone.
    """

    parameters: Iterable[nn.Parameter] | None = None
    name: Literal["sgd", "adam", "adamw"] | None = None
    lr: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    nesterov: bool = False
    schedule: Literal["poly", "step", "constant"] | None = None
    power: float | None = None
    counted_first: bool = False
    end_lr: float = 0.0
    gradient_clip: float | None = None
    undecayed: Iterable[nn.Parameter] = ()


class Handles(Protocol):
    """What the engine lends to :meth:`Method.step`; precision, clipping and ranks are handled inside."""

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradient of ``loss``.

        Args:
            loss: Scalar.
            name: Only the parameters of this optimizer receive the gradient; ``None``: all leaves do.
        """

    def average_gradients(self, name: str = "main") -> None:
        """Average the gradients over the ranks now, for methods that use them before :meth:`update`."""

    def update(self, name: str = "main") -> None:
        """Average over ranks, clip, take the optimizer's step, set its learning rate, clear its gradients."""


class MethodConfig(Settings):
    """Base of every method's settings; each field states unit, source and default."""


class Method(nn.Module, ABC):
    """Base of all methods.

    A subclass builds its networks in ``__init__`` with ``task.network()``, and implements :meth:`losses`
    and :attr:`predictor`; most need nothing else. Everything that must survive a kill (EMA weights, memory
    banks, counters) is a parameter or buffer, so that it is in ``state_dict``.

    In a training of several ranks each has its own rows and draws, and what the method holds must stay the same on all,
    bit by bit: the loss is the mean of theirs, gradients are averaged by the handles, ratios of sums over the batch and
    what enters a memory go through :mod:`scantly.ranks`, which all ranks must call equally often, whatever they find.

    Attributes:
        generator: Source of the method's random draws. The engine replaces, seeds and checkpoints it; it
            lives on the training device.
        prediction_settings: Names of settings that a finished model can be given another value of, since its predictor
            holds all that they need.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    uses_unlabeled: ClassVar[bool] = True
    prediction_settings: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, task: Task, config: MethodConfig) -> None:
        super().__init__()
        self.task = task
        self.generator = torch.Generator()
        self._logged: dict[str, Tensor] = {}
        if not isinstance(config, self.Config):
            raise ConfigError(f"{type(self).__name__} needs {self.Config.__qualname__}, not {type(config).__name__}.")

    @abstractmethod
    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Named scalar terms, already weighted; their sum is minimized."""

    @property
    @abstractmethod
    def predictor(self) -> nn.Module:
        """The network used for validation, inference and export: images -> logits."""

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """One iteration. Override for adversaries or several updates per batch; returns what is logged."""
        terms = self.losses(batch, progress)
        handles.backward(torch.stack(list(terms.values())).sum())
        handles.update()
        return terms

    def after_step(self, progress: Progress) -> None:
        """Called after each iteration: EMA, memory banks."""

    def stages(self) -> list[Stage]:
        """Stages in order; the default is one over the whole budget."""
        return [Stage(unlabeled=Rows() if self.uses_unlabeled else Rows(0))]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        """Called before a stage's first iteration, and again when a killed run is resumed inside it.

        Args:
            stage: The stage.
            first: Whether it begins. Draw or copy weights (student to teacher) only then; what is no part of
                ``state_dict`` (``requires_grad``, evaluation mode of a part) is set every time.
        """

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:  # noqa: ARG002
        """Named optimizers of a stage; the default is one, ``main``, as the recipe says.

        A stage that does not restart optimizers has those of the stage before.
        """
        return {"main": OptimizerSpec()}

    def pseudo_labels(self, probs: Tensor) -> Tensor:
        """What relabeling writes for one unlabeled case; the default is the most probable class.

        Args:
            probs: Class probabilities of the whole case on the prepared grid, ``(classes, D, H, W)``, float32, on the
                CPU; in 2D the D slices of a case.

        Returns:
            Class indices, ``(D, H, W)``, integers, or :data:`~scantly.losses.IGNORED` (-1) where a voxel has no label;
            the method's losses then leave it out.
        """
        return probs.argmax(0)

    def log(self, name: str, value: Tensor) -> None:
        """Record a scalar that is only watched. Nothing is synchronized until it is written."""
        self._logged[name] = value.detach()

    def pop_logged(self) -> dict[str, Tensor]:
        """The scalars recorded since the last call; the record is cleared."""
        logged, self._logged = self._logged, {}
        return logged
