"""The configuration of a run: six sections, every field with its default here and nowhere else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from scantly.data.plan import Plan
from scantly.inference.settings import InferenceSettings
from scantly.settings import Settings
from scantly.views import WeakConfig

__all__ = ["DataSection", "EvaluationSection", "NetworkSection", "RunConfig", "TrainingSection"]


class DataSection(Settings):
    """Which cases, how they are loaded and augmented."""

    dataset: str = Field(description="Dataset folder.")
    labeled: int | str | None = Field(
        None, description="Labeled units: a number of subjects, a share such as '10%', or null for all."
    )
    seed_labeled: int | None = Field(None, description="Draw the labeled units at random with this seed.")
    seed_split: int = Field(
        0, ge=0, description="Draws the validation cases where no splits.json names them; not the training's seed."
    )
    store: str | None = Field(None, description="Folder for prepared cases; null: the user's cache folder.")
    workers: int | None = Field(
        None,
        ge=0,
        description="Loader processes; null: none on the CPU, up to 4 for a GPU. The result does not depend on it.",
    )
    augmentation: WeakConfig = Field(default_factory=WeakConfig, description="The shared weak augmentation.")

    @field_validator("labeled")
    @classmethod
    def _share(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        return value


class NetworkSection(Settings):
    """The backbone."""

    name: str = Field(
        "auto",
        description="One of Scantly's networks (unet, unet3d, vnet, dynunet) or the class name of one of MONAI's; "
        "auto: unet in 2D, vnet in 3D, dynunet in 3D where the plan has flat kernels.",
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of that network; dynunet takes kernel_sizes and strides from the plan.",
    )


class TrainingSection(Settings):
    """Length, optimizer, precision and bookkeeping of the training."""

    steps: int = Field(30_000, ge=1, description="Iterations, all stages together.")
    published_steps: int | None = Field(
        None, ge=1, description="Iterations of the recipe's training, which the user may shorten; null: no recipe."
    )
    seed: int = Field(1337, ge=0, lt=2**32, description="Seed of initialization, batches, views and dropout.")
    optimizer: Literal["sgd", "adam", "adamw"] = Field("sgd", description="Default optimizer of a method.")
    lr: float = Field(0.01, gt=0, description="Learning rate at the first step.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(1e-4, ge=0, description="L2 penalty.")
    schedule: Literal["poly", "step", "constant"] = Field("poly", description="Learning-rate schedule.")
    power: float = Field(0.9, gt=0, description="Exponent of the poly schedule: lr (1 - t/T)^power.")
    milestones: tuple[float, ...] = Field(
        (2500 / 6000, 5000 / 6000), description="Step schedule: shares of the stage after which lr is cut."
    )
    gamma: float = Field(0.1, gt=0, le=1, description="Step schedule: factor of each cut.")
    gradient_clip: float | None = Field(None, gt=0, description="Largest gradient norm per optimizer; null: none.")
    precision: Literal["32", "bf16"] = Field("32", description="bf16: mixed precision by autocast.")
    channels_last: bool = Field(
        True,
        description="Memory layout of 2D convolutions; measured 1.2 (fp32) and 1.4 (bf16) times faster on a CPU.",
    )
    compile: bool = Field(False, description="torch.compile the networks (needs a C++ compiler on the CPU).")
    validate_every: int | None = Field(
        None, ge=1, description="Iterations between validations; null: a twentieth of the run in 2D, a fifth in 3D."
    )
    checkpoint_every: int | None = Field(
        None, ge=1, description="Iterations between checkpoints; null: a twentieth of the run."
    )
    log_every: int = Field(10, ge=1, description="Iterations between lines of the log.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    devices: int = Field(1, ge=1, description="Devices per node; each has the plan's batch sizes.")
    nodes: int = Field(1, ge=1, description="Nodes.")

    @field_validator("precision", mode="before")
    @classmethod
    def _text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value  # YAML reads 32 as a number

    @model_validator(mode="after")
    def _compiles_on_one_device(self) -> TrainingSection:
        if self.compile and self.devices * self.nodes > 1:
            raise ValueError(
                "compile is for one device: what the ranks exchange within a step is not compiled; leave it out"
            )
        return self

    def validation_interval(self, spatial_dims: int) -> int:
        """Iterations between validations; predicting whole volumes takes far longer than slices."""
        return self.validate_every or max(1, self.steps // (20 if spatial_dims == 2 else 5))

    @property
    def checkpoint_interval(self) -> int:
        """Iterations between checkpoints."""
        return self.checkpoint_every or max(1, self.steps // 20)


class EvaluationSection(Settings):
    """How the model is chosen and judged."""

    protocol: Literal["clean", "literature"] = Field("clean", description="Kind of protocol, see the documentation.")
    selection: Literal["auto", "best", "last"] = Field(
        "auto",
        description="Which iteration predicts: best on validation cases, or last; auto: best where there are "
        "both validation and test cases, else last.",
    )
    inference: InferenceSettings = Field(
        default_factory=InferenceSettings,
        description="Windows, flips and post-processing of whole scans, in validation and after the training.",
    )
    flaws: tuple[str, ...] = Field((), description="Known flaws of the published procedure that this run repeats.")


class RunConfig(Settings):
    """A fully resolved configuration; ``config.yaml`` of the run folder holds exactly this."""

    recipe: str | None = Field(None, description="Name of the recipe it came from.")
    data: DataSection
    plan: Plan
    network: NetworkSection = Field(default_factory=NetworkSection)
    method: dict[str, Any] = Field(description="`name` and the method's settings, fully resolved.")
    training: TrainingSection = Field(default_factory=TrainingSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    split: dict[str, Any] = Field(description="Cases by role, groups, and where the split came from.")

    @model_validator(mode="after")
    def _inference_fits(self) -> RunConfig:
        self.evaluation.inference.check(self.plan.patch_size)
        return self

    @property
    def method_name(self) -> str:
        """Catalogue name of the method."""
        return str(self.method["name"])

    @property
    def method_settings(self) -> dict[str, Any]:
        """The method's settings without its name."""
        return {key: value for key, value in self.method.items() if key != "name"}


# What does not change the result, and may therefore differ when a run is resumed.
IRRELEVANT_KEYS = frozenset(
    {
        "data.workers",
        "data.store",
        "training.device",
        "training.log_every",
        "training.published_steps",
        "evaluation.inference.batch",
    }
)
