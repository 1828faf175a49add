"""ARCO (You et al., NeurIPS 2023)."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import (
    confident_cross_entropy,
    cross_entropy_dice,
    masked_divergence,
    nearest_neighbor_loss,
    unit,
)
from scantly.methods.base import Batch, Method, OptimizerSpec, Progress, Stage, Task
from scantly.methods.parts.arco_contrast import ContrastConfig, Seen, VoxelContrast
from scantly.methods.parts.arco_instance import InstanceConfig, InstanceDiscrimination, instance_terms
from scantly.methods.parts.ema import make_teacher, update_teacher
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.networks import EncoderDecoder
from scantly.networks.heads import pointwise_head
from scantly.networks.pyramid import PyramidHead
from scantly.ranks import true_on_all_ranks
from scantly.views import (
    StrongConfig,
    apply_cutmix,
    apply_thin_plate,
    sample_half_area,
    sample_thin_plate,
    strong,
)

__all__ = ["ARCO"]

_DENSE_CHANNELS = {2: 496, 3: 16}
_CELLS = {2: 32, 3: 16}
_MIXED_JITTER = {2: 0.25, 3: 0.0}


class ARCO(Method):
    """Stratified draws of voxels make the contrast between structures less noisy.

    You et al., "Rethinking Semi-Supervised Medical Image Segmentation: A Variance-Reduction Perspective", NeurIPS 2023,
    and its public code; the terms are those of MONA (You et al., "Mine Your Own Anatomy", 2022). In the stage
    ``pretraining`` the student learns from the labeled images and reproduces the similarities that its moving average,
    the teacher, finds between an image, whole and in overlapping crops, and stored ones. In the stage ``contrast`` the
    teacher's pseudo-labels supervise mixed images, voxels are drawn to the teacher's mean of their class and away from
    voxels of other classes, and feature maps to their nearest stored neighbors. The sampler decides which voxels take
    part: ``naive`` is MONA, ``sg`` and ``sag`` are ARCO. The student predicts; heads serve training only.

    Deviations from the public code, where it differs from the paper or defeats it:

    * Samplers are exactly unbiased, and strata are regions of the image (``ordering="scan"``: runs of the list of
      candidates, as released). Everything is indexed by class; an absent class is left out.
    * Negatives are confident voxels of other classes (equation E.3). ``negatives="rank"`` is what U2PL, which the code
      follows, means by a bank: of class c, voxels of other classes that may be mistaken for c.
      ``negatives="released"`` is what the code does: of class c, unlabeled voxels that are pseudo-labeled c although
      the teacher ranks c fourth or lower on the mixed image. With fewer than four classes there are none, with more
      hardly any, and a single vector of zeros (2D) or noise (3D) is left to be repelled.
    * The nearest-neighbor term is off: as released it has no gradient. With a weight above 0 it is the paper's: the
      teacher chooses the neighbors, the distance is the student's. Feature maps are averaged to ``nn_pool`` cells per
      axis first. At the paper's weight of 1 it makes all features alike within 300 iterations of recipe ``acdc-cpu``:
      anchors have cosines of 0.94 with positives and 0.73 with negatives, without the term 0.15 and 0.09.
    * Crops are compared with stored crops of the same place; released reshapes mix them. The heads' teachers are
      copies that follow by average, and the heads have a ReLU between their layers, as the paper says.
    * Temperatures 0.1 (student) and 0.01 (teacher) in the first stage, as the paper says; both 0.1 in the scripts.
    * Views are drawn apart for student and teacher and keep the images' precision (8 bits there); brightness and
      contrast act on each image's own range. No random diffeomorphism: it moves images and not their labels.
    * Averages are updated after each step, which equals the published order. The share of low entropy falls over the
      stage in ``published_epochs`` steps, however long it is; an epoch has no other meaning here.
    * The default ``unet`` goes up by linear interpolation, the public 2D code by transposed convolutions
      (``network.arguments.upsampling=transposed``). The learning rate is set one step late, as there and for every
      method here; the paper divides it by 10 every 2500 iterations instead.
    """

    class Config(InstanceConfig, ContrastConfig):
        """Settings of ARCO; defaults are the paper's, or its public code's where it says nothing."""

        pretraining_share: float = Field(
            0.5, ge=0, lt=1, description="Share of the iterations of the first stage; 0: without it."
        )
        supervised_weight: float = Field(
            1.0, gt=0, description="Weight of Dice plus cross-entropy (public 3D code, first stage: 0.5)."
        )
        unsupervised_weight: float = Field(1.0, ge=0, description="Weight of the pseudo-label term; 0: off.")
        nearest_neighbor_weight: float = Field(
            0.0,
            ge=0,
            description="Weight of the nearest-neighbor term; 0: off, as in the released code, whose term has no "
            "gradient; paper: 1.",
        )
        equivariance_weight: float = Field(
            0.0, ge=0, description="Weight of MONA's equivariance term; 0 (paper): off; 1 in the public 2D code."
        )
        dense_channels: int | None = Field(
            None, ge=1, description="Channels of the dense features; none: 496 in 2D, 16 in 3D (code; paper: 512)."
        )
        nn_pool: int | None = Field(
            None, ge=1, description="Cells per axis of pooled features, at most the side; none: 32 in 2D, 16 in 3D."
        )
        neighbors: int = Field(5, ge=1, description="Nearest stored neighbors, at most `queue_length`.")
        confidence_threshold: float = Field(
            0.97, ge=0, le=1, description="From which a pseudo-label counts in its image's weight."
        )
        mixing: Literal["cutmix", "none"] = Field(
            "cutmix", description="Second stage: half of each unlabeled image is another's."
        )
        student_jitter: float = Field(
            0.0, ge=0, description="First stage: brightness and contrast change by this share; with blur if above 0."
        )
        teacher_jitter: float = Field(0.2, ge=0, description="The same of the teacher's view.")
        mixed_jitter: float | None = Field(
            None, ge=0, description="The same of mixed images, second stage; none: 0.25 in 2D, 0 in 3D."
        )
        jitter_probability: float = Field(0.5, ge=0, le=1, description="Of jitter, and of blur, per image.")
        blur_sigma: tuple[float, float] = Field((0.15, 1.15), description="Bounds of the blur's sigma, voxels.")
        ema_decay: float = Field(0.99, ge=0, lt=1, description="Decay of the teacher's average.")
        teacher_mode: Literal["train", "eval"] = Field(
            "train",
            description="train: batch statistics and dropout in the teacher's passes; eval: neither, with the "
            "student's running statistics.",
        )
        nesterov: bool = Field(True, description="Nesterov momentum in the second stage; needs SGD with momentum.")

        @field_validator("neighbors")
        @classmethod
        def _neighbors_are_stored(cls, value: int, info: ValidationInfo) -> int:
            if value > info.data.get("queue_length", value):
                raise ValueError(f"queue_length is {info.data['queue_length']}; ask for at most so many")
            return value

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.student = task.encoder_decoder()
        if self.student.deep_supervision:
            raise ConfigError("arco trains one resolution; remove deep_supervision from network.arguments.")
        self._teacher_buffers: Literal["own", "student"] = "own" if config.teacher_mode == "train" else "student"
        self.teacher = cast(EncoderDecoder, make_teacher(self.student, buffers=self._teacher_buffers))
        widths = self.student.pyramid_widths
        self.instance = instance_terms(config, task, widths[0]) if config.pretraining_share > 0 else nn.ModuleDict()
        channels = config.dense_channels or _DENSE_CHANNELS[task.spatial_dims]
        self.dense = PyramidHead(task.spatial_dims, widths, channels)
        self.teacher_dense = cast(PyramidHead, make_teacher(self.dense))
        self.dense_predictor = pointwise_head(0, (channels, channels, channels), activation=False, bias=False)
        self.voxel_contrast = VoxelContrast(config, task, channels)
        self.cells = tuple(min(config.nn_pool or _CELLS[task.spatial_dims], side) for side in task.patch_size)
        if config.nearest_neighbor_weight > 0:
            shape = (config.queue_length, channels * math.prod(self.cells))
            self.pool = MemoryBank(shape[0], shape[1:], initial=unit(torch.randn(shape)))
        self._arrived: Tensor | None = None
        for term in ("unsupervised", "contrast", "equivariance"):
            self.register_buffer(f"{term}_empty", torch.tensor(0))

    def stages(self) -> list[Stage]:
        """``pretraining``, unless its share is 0, and ``contrast``."""
        share = self.config.pretraining_share
        first = [Stage("pretraining", share=share)] if share > 0 else []
        return [*first, Stage("contrast", share=1 - share)]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        """Only the student and the stage's heads are trained; the second stage begins with the student as teacher."""
        self.requires_grad_(False)
        for parameter in self._trained(stage):
            parameter.requires_grad_(True)
        if first and stage.name == "contrast":
            update_teacher(self.teacher, self.student, 0.0, buffers="student")

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:
        """One, on the student and the stage's heads."""
        nesterov = self.config.nesterov and stage.name == "contrast"
        return {"main": OptimizerSpec(self._trained(stage), nesterov=nesterov)}

    def _trained(self, stage: Stage) -> list[nn.Parameter]:
        modules: list[nn.Module] = [self.student]
        if stage.name == "pretraining":
            for term in self._instance_terms():
                modules.extend([term.head, term.predictor])
        elif self.config.contrast_weight > 0 or self.config.nearest_neighbor_weight > 0:
            modules.extend([self.dense, self.dense_predictor])
        return [parameter for module in modules for parameter in module.parameters()]

    def _instance_terms(self) -> list[InstanceDiscrimination]:
        return [cast(InstanceDiscrimination, term) for term in self.instance.values()]

    def train(self, mode: bool = True) -> ARCO:
        """Set the mode; with ``teacher_mode="eval"`` the teacher stays in evaluation mode."""
        super().train(mode)
        if self.config.teacher_mode == "eval":
            self.teacher.eval()
        return self

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The stage's terms, weighted; those of weight 0 are left out.

        ``supervised``, then in the first stage ``instance_global`` and ``instance_local``, in the second
        ``unsupervised``, ``contrast``, ``nearest_neighbor`` and ``equivariance``.

        Raises:
            ConfigError: if the batch has no unlabeled rows.
        """
        if not len(batch.unlabeled):
            raise ConfigError("method 'arco' needs unlabeled rows; set plan.unlabeled_batch_size to 1 or more.")
        return self._pretraining(batch) if progress.stage == "pretraining" else self._contrast(batch, progress)

    def _pretraining(self, batch: Batch) -> dict[str, Tensor]:
        config = self.config
        maps, logits = _pass(self.student, self._jittered(batch.images, config.student_jitter))
        terms = {"supervised": self._supervised(logits[: len(batch.labeled)], batch.labels)}
        if not self.instance:
            return terms
        with torch.no_grad():
            target_maps, target_logits = _pass(self.teacher, self._jittered(batch.images, config.teacher_jitter))
        inputs = {
            "global": (config.instance_global_weight, maps[0], target_maps[0]),
            "local": (config.instance_local_weight, logits, target_logits),
        }
        for name, term in self.instance.items():
            weight, seen, target = inputs[name]
            divergence, agreement = term(
                seen,
                target,
                student_temperature=config.student_temperature,
                teacher_temperature=config.teacher_temperature,
            )
            terms[f"instance_{name}"] = weight * divergence
            self.log(f"same_neighbor_{name}", agreement)
        return terms

    def _contrast(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        config, labeled = self.config, len(batch.labeled)
        mixed, pseudo_labels, confidence = self._mixed(batch.unlabeled)
        views = self._jittered(mixed, self._mixed_jitter)
        maps, logits = _pass(self.student, batch.labeled)
        mixed_maps, mixed_logits = _pass(self.student, views)
        terms = {"supervised": self._supervised(logits, batch.labels)}
        if config.unsupervised_weight > 0:
            loss, weights = confident_cross_entropy(
                mixed_logits, pseudo_labels, confidence, threshold=config.confidence_threshold
            )
            terms["unsupervised"] = config.unsupervised_weight * loss
            self.log("confident", weights.mean())
            self._count_empty("unsupervised", (weights == 0).all())
        labels = torch.cat([batch.labels, pseudo_labels])
        trusted = torch.cat([batch.labels >= 0, confidence >= config.negative_confidence])
        self.log("trusted", trusted[labeled:].float().mean())
        targets: list[Tensor] = []
        if config.contrast_weight > 0 or config.nearest_neighbor_weight > 0:
            with torch.no_grad():
                targets, target_logits = _pass(self.teacher, views)
        if config.nearest_neighbor_weight > 0:
            terms["nearest_neighbor"] = config.nearest_neighbor_weight * self._nearest_neighbors(mixed_maps, targets)
        if config.contrast_weight > 0:
            with torch.no_grad():
                labeled_targets, labeled_logits = _pass(self.teacher, batch.labeled)
                seen = Seen(
                    labels,
                    trusted,
                    probs=mixed_logits.float().softmax(1),
                    teacher_probs=torch.cat([labeled_logits, target_logits]).float().softmax(1),
                    teacher_features=self.teacher_dense(_joined(labeled_targets, targets)),
                )
            terms["contrast"] = config.contrast_weight * self._voxels(_joined(maps, mixed_maps), seen, progress)
        if config.equivariance_weight > 0:
            mask = (labels > 0) & trusted
            images = torch.cat([batch.labeled, self._jittered(mixed, self._mixed_jitter)])
            term = self._equivariance(images, torch.cat([logits, mixed_logits]), mask)
            terms["equivariance"] = config.equivariance_weight * term
        return terms

    @torch.no_grad()
    def _mixed(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unlabeled images, their pseudo-labels and confidences after CutMix."""
        confidence, pseudo_labels = self.teacher(images).float().softmax(1).max(1)
        if self.config.mixing == "none":
            return images, pseudo_labels, confidence
        box = sample_half_area(len(images), images.shape[2:], generator=self.generator)
        return apply_cutmix(images, box), apply_cutmix(pseudo_labels, box), apply_cutmix(confidence, box)

    def _nearest_neighbors(self, maps: list[Tensor], targets: list[Tensor]) -> Tensor:
        # The predictor is linear without bias, so averages may pass it in place of voxels.
        pooled = self.dense_predictor(self.dense.pooled(maps, self.cells).movedim(1, -1))
        with torch.no_grad():
            target = self.teacher_dense.pooled(targets, self.cells).movedim(1, -1).flatten(1)
        self._arrived = unit(target)
        return nearest_neighbor_loss(pooled.flatten(1), target, self.pool.values, neighbors=self.config.neighbors)

    def _voxels(self, maps: list[Tensor], seen: Seen, progress: Progress) -> Tensor:
        share = self.entropy_share(progress)

        def features_at(index: Tensor) -> Tensor:
            features: Tensor = self.dense_predictor(self.dense.at(maps, index))
            return features

        term, watched = self.voxel_contrast(features_at, seen, share, self.generator)
        for name in ("anchors", "negatives"):
            for label, count in zip(self.task.classes, watched.pop(name), strict=True):
                self.log(f"{name}/{label}", count)
        for name, value in watched.items():
            self.log(name, value)
        self.log("entropy_share", torch.full((), share))
        self._count_empty("contrast", watched["contrast_classes"] == 0)
        return cast(Tensor, term)

    def _equivariance(self, images: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        """The prediction of a warped view follows the warp of the prediction."""
        warp = sample_thin_plate(len(images), images.shape[2:], generator=self.generator)
        self._count_empty("equivariance", ~mask.any())
        return masked_divergence(
            self.student(apply_thin_plate(images, warp)),
            apply_thin_plate(logits.detach().float(), warp),
            apply_thin_plate(mask.float(), warp),
        )

    def entropy_share(self, progress: Progress) -> float:
        """Share of unlabeled voxels of low entropy: ``entropy_percent (1 - e / E)``, e of E epochs, in [0, 1]."""
        epochs = self.config.published_epochs
        return self.config.entropy_percent / 100 * (1 - math.floor(progress.scaled(epochs)) / epochs)

    def _supervised(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Dice plus cross-entropy, equally weighted; the background counts."""
        return 2 * self.config.supervised_weight * cross_entropy_dice(logits, labels)

    def _jittered(self, images: Tensor, jitter: float) -> Tensor:
        if jitter == 0:
            return images
        p, sigma = self.config.jitter_probability, self.config.blur_sigma
        changes = StrongConfig(p_jitter=p, brightness=jitter, contrast=jitter, p_blur=p, blur_sigma=sigma)
        return strong(changes, images, generator=self.generator)

    @property
    def _mixed_jitter(self) -> float:
        given = self.config.mixed_jitter
        return _MIXED_JITTER[self.task.spatial_dims] if given is None else given

    def _count_empty(self, term: str, empty: Tensor) -> None:
        counter: Tensor = getattr(self, f"{term}_empty")
        counter += true_on_all_ranks(empty)
        self.log(f"{term}_empty", counter.clone())

    def after_step(self, progress: Progress) -> None:
        """Update the teacher's averages, and store what the gradient no longer needs to find unchanged."""
        decay = self.config.ema_decay
        update_teacher(self.teacher, self.student, decay, buffers=self._teacher_buffers)
        if progress.stage == "pretraining":
            for term in self._instance_terms():
                term.after_step(decay)
            return
        update_teacher(self.teacher_dense, self.dense, decay)
        if self._arrived is not None:
            self.pool.push(self._arrived)
            self._arrived = None

    @property
    def predictor(self) -> nn.Module:
        """The student."""
        return self.student


def _pass(network: EncoderDecoder, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features of every decoder level, coarsest first, and logits."""
    maps = network.pyramid(network.encode(images))
    return maps, network.head(maps[-1])


def _joined(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    return [torch.cat(pair) for pair in zip(first, second, strict=True)]
