"""Local contrastive loss with pseudo-label self-training (Chaitanya et al., Medical Image Analysis 2023)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import soft_dice_per_image, weighted_cross_entropy
from scantly.losses.local_contrastive import (
    LocalContrast,
    Normalization,
    Variant,
    class_masks,
    class_means,
    local_contrastive_loss,
    pick_voxels,
)
from scantly.methods.base import Batch, Method, MethodConfig, OptimizerSpec, Progress, Rows, Stage, Task
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.image_pairs import pair_table
from scantly.methods.parts.label_smoothing import smooth_labels
from scantly.methods.parts.samplers import SamplerKind, sample
from scantly.networks.heads import pointwise_head
from scantly.networks.lclpl_unet import as_published
from scantly.ranks import of_first_rank, true_on_all_ranks
from scantly.views import apply_elastic, apply_jitter, sample_elastic, sample_jitter

__all__ = ["LCLPL"]

#: Side of the slices for which the lengths in pixels were published.
PUBLISHED_SIDE = 192
#: Upper end of the contrastive views' intensities, in units of the image's range above its minimum.
BRIGHTEST = 1.5


class LCLPL(Method):
    """Voxel embeddings are drawn to the mean of their class, which a pseudo-label names where there is no label.

    Chaitanya, Erdil, Karani and Konukoglu, "Local contrastive loss with pseudo-label based self-training for
    semi-supervised medical image segmentation", Medical Image Analysis 87 (2023) 102792. A baseline is trained on the
    labeled images and labels the others. Then Dice on labeled images and the contrastive loss on labeled and
    unlabeled ones are minimized together, in rounds that each begin with the best model so far and its new
    pseudo-labels. These never enter the segmentation loss. Both groups pass the network in one batch; labels of the
    unlabeled pool are smoothed by a conditional random field (2D).

    The paper's network is ``unet6``; any network with features will do. Its first augmentation of labeled images is
    the run's shared one (section ``data.augmentation``).

    Deviations from the public code (TensorFlow) and choices where neither it nor the paper says enough:

    * Its division by the number of anchors acts on the running sum over the pairs, so the last pair counts for
      nearly all (``normalization="released"``, with ``contrast_weight=0.1``); the default is the mean over pairs that
      was meant, with the weight that keeps the size of the released gradient: for equal pairs of ACDC the released
      value is 0.212 where the mean is 2.
    * Absent classes are left out of every denominator, and anchors that face a single class are dropped; there every
      slice of a pair holds every class.
    * The views of the contrastive images are drawn per image, there once for all images of a set. Their intensities
      are relative to each image's minimum and maximum, there to the scan's percentiles 1 and 99 (normalization
      ``percentile`` of the plan).
    * Lengths in pixels (deformation, smoothing) hold for slices of 192 x 192 and are scaled with the patch.
    * Displacements are interpolated with the grid's points at the corners, sides and center of the slice.
    * Batch-norm statistics of the baseline's encoder and decoder are kept in round 1, there reset.
    * Background voxels take part where there is one foreground class; the loss would not exist otherwise.
    * The slices of the segmentation loss hold at least 3 classes (background counted), at least 2 where there are 3;
      in the baseline any. Where fewer than five slices hold as many classes as asked for, here or in the pairs, those
      with fewer are drawn, and :class:`~scantly.data.batches.BatchSource` says so in a message; there the step is
      skipped.
    * The pool is what the split leaves unlabeled; the public lists, in which it contains nearly all labeled cases and
      some for validation, are not offered.
    * The pool is predicted in float32, also where training runs in bf16.
    * 3D: patches instead of slices, the batch size of the plan, 4 pairs, no random field; the paper is 2D.
    * Left out: the gate that accepts a scan's pseudo-labels by the agreement of two augmented predictions, which is
      off in the public code, and its variant without gradient through the means, which was never released.

    ``contrast_empty`` counts the steps without any pair within the history of the weights: a round that begins with
    the best validation takes the counter back with them.
    """

    class Config(MethodConfig):
        """Settings; defaults are those of the public code for ACDC unless said otherwise."""

        rounds: int = Field(3, ge=1, description="Rounds of joint training, each with new pseudo-labels.")
        seg_rows: Annotated[int, Field(ge=1)] | Literal["plan"] | None = Field(
            None,
            description="Labeled images per step of the segmentation loss; None: 20 in 2D, the plan's in 3D; plan: "
            "the plan's.",
        )
        pairs: Annotated[int, Field(ge=4)] | None = Field(
            None,
            description="Image pairs per step of the contrastive loss, half of the images unlabeled; None: 10 in 2D, "
            "4 in 3D.",
        )
        variant: Variant = Field(
            "inter",
            description="Class means of both images of a pair (inter), or of the image itself (intra; a pair is then "
            "two views of one image).",
        )
        batches: Literal["joint", "apart"] = Field(
            "joint",
            description="Labeled images and contrastive views pass the network in one batch, as published, or apart, "
            "where the views leave the batch-norm statistics alone.",
        )
        labeled_pairs: Literal["same", "different"] = Field(
            "same",
            description="inter: pairs of labeled images alone are two views of one, or two images (not in the paper).",
        )
        contrast_weight: float = Field(
            0.0106,
            ge=0,
            description="Weight of the contrastive loss; 0: without it. The published 0.1 was tuned beside "
            "normalization=released, whose values are 9.4 times smaller on ACDC.",
        )
        temperature: float = Field(0.1, gt=0, description="Temperature of the contrastive loss.")
        pixels: int = Field(3, ge=1, description="Voxels drawn per class and image, with replacement.")
        sampler: SamplerKind = Field(
            "naive",
            description="How they are drawn: uniformly (naive), or by ARCO's stratified samplers (sg, sag) with as "
            "many groups as voxels.",
        )
        include_background: Literal["auto"] | bool = Field(
            "auto", description="Background takes part in the contrastive loss; auto: where there is one other class."
        )
        normalization: Normalization = Field(
            "correct", description="correct: mean over pairs; released: the public code's running division."
        )
        segmentation_loss: Literal["dice", "foreground_dice", "cross_entropy"] = Field(
            "dice",
            description="Soft Dice per image and class; of the foreground alone; or cross-entropy with weight 0.1 for "
            "the background, the other classes sharing 0.9.",
        )
        elastic_sigma: float = Field(
            5.0,
            ge=0,
            description="Deviation of the elastic displacements of labeled images, pixels of a slice of 192 x 192; 0: "
            "none.",
        )
        seg_intensity_aug: bool = Field(
            False,
            description="Contrast of U[0.8, 1.2) in half of the labeled images, shift of U[-0.1, 0.1) of the range in "
            "the others; the public code means to do it, but never does.",
        )
        brightness: float = Field(
            0.3, ge=0, description="Contrastive views: shift from U[-b, b), share of the image's range."
        )
        contrast: float = Field(
            0.3, ge=0, description="Contrastive views: factor about the mean from U[1 - c, 1 + c), not below 0."
        )
        crf: Literal["released", "none"] = Field(
            "released", description="Smoothing of pseudo-labels by the random field (2D alone), or none."
        )
        crf_sigma: float = Field(
            10.0,
            gt=0,
            description="Deviation of its Gaussian, pixels of a slice of 192 x 192 (ACDC, MMWHS: 10, Prostate: 5).",
        )
        optimizer: Literal["published", "recipe"] = Field(
            "published", description="Adam with a constant rate of 1e-3 and no decay, or the recipe's optimizer."
        )

    contrast_empty: Tensor
    members: Tensor

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.encoder_decoder()
        if self.network.deep_supervision:
            raise ConfigError("lclpl trains the finest resolution alone; leave network.arguments.deep_supervision out.")
        width = self.network.widths[0]
        self.contrast_head = pointwise_head(task.spatial_dims, (width, width, width), norm=True, bias=False)
        as_published(self.contrast_head)
        with_background = task.num_classes == 2 if config.include_background == "auto" else config.include_background
        self.classes = range(0 if with_background else 1, task.num_classes)
        pairs = config.pairs or (10 if task.spatial_dims == 2 else 4)
        self.pairs = pair_table(pairs, config.variant, labeled_pairs=config.labeled_pairs)
        self.register_buffer("members", torch.tensor(self.pairs.first + self.pairs.second), persistent=False)
        self.register_buffer("contrast_empty", torch.tensor(0))

    def stages(self) -> list[Stage]:
        """The baseline, then the rounds, all of the same length; without the contrastive loss no pool is needed."""
        rows = self.config.seg_rows or (20 if self.task.spatial_dims == 2 else "plan")
        count = None if rows == "plan" else rows
        every_class = self.task.num_classes
        labeled, unlabeled = (self.pairs.labeled, self.pairs.unlabeled) if self._contrasts else (0, 0)
        some_classes = max(2, min(3, self.task.num_classes - 1))
        joint = Stage(
            labeled=Rows(count, some_classes),
            extra=Rows(labeled, every_class),
            unlabeled=Rows(unlabeled, every_class),
            from_best=True,
            relabel=self._contrasts,
        )
        return [
            Stage("baseline", labeled=Rows(count), unlabeled=Rows(0)),
            *(
                replace(joint, name=f"round{number}", restart_optimizers=number == 1)
                for number in range(1, self.config.rounds + 1)
            ),
        ]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        """Joint training begins with a new segmentation head on the baseline's encoder and decoder."""
        self.contrast_head.requires_grad_(self._contrasts and stage.name != "baseline")
        if first and stage.name == "round1":
            self.network.head.load_state_dict(self.task.encoder_decoder().head.state_dict())
            with torch.no_grad():  # each rank has drawn its own
                for parameter in self.network.head.parameters():
                    parameter.copy_(of_first_rank(parameter))

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:
        """The contrastive head is trained in the rounds alone."""
        parameters = list(self.network.parameters())
        if self._contrasts and stage.name != "baseline":
            parameters += self.contrast_head.parameters()
        if self.config.optimizer == "recipe":
            return {"main": OptimizerSpec(parameters)}
        return {"main": OptimizerSpec(parameters, name="adam", lr=1e-3, weight_decay=0.0, schedule="constant")}

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` on labeled images; in the rounds ``contrast`` on pairs of both kinds, weighted."""
        images, target = self._segmentation_view(batch)
        if progress.stage == "baseline" or not self._contrasts:
            return {"supervised": self._segmentation_loss(self.network(images), target)}
        views, labels = self._contrastive_views(batch)
        if self.config.batches == "joint":
            features = self.network.decode_features(self.network.encode(torch.cat([images, views])))
            # All rows, so that batch norm inside the head sees them, as in the public code.
            logits, of_views = self.network.head(features).split([len(images), len(views)])
            features = features[len(images) :]
        else:
            logits = self.network(images)
            with without_statistics(self.network):
                features = self.network.decode_features(self.network.encode(views))
                with torch.no_grad():
                    of_views = self.network.head(features)
        contrast = self._contrast(self.contrast_head(features), labels)
        self._watch(contrast, of_views, labels)
        return {
            "supervised": self._segmentation_loss(logits, target),
            "contrast": self.config.contrast_weight * contrast.loss,
        }

    def pseudo_labels(self, probs: Tensor) -> Tensor:
        """Every voxel keeps its label, whatever its confidence; in 2D the random field smooths them."""
        if self.task.spatial_dims == 3 or self.config.crf == "none":
            return super().pseudo_labels(probs)
        return smooth_labels(probs, sigma=self._in_pixels(self.config.crf_sigma))

    @property
    def predictor(self) -> nn.Module:
        """Encoder, decoder and segmentation head."""
        return self.network

    @property
    def _contrasts(self) -> bool:
        return self.config.contrast_weight > 0

    def _in_pixels(self, published: float) -> float:
        return published * min(self.task.patch_size[-2:]) / PUBLISHED_SIDE

    def _segmentation_view(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labeled images and one-hot labels; the rows from a random one on are deformed, and their labels soft."""
        config, images, classes = self.config, batch.labeled, self.task.num_classes
        count, rows = len(images), torch.arange(len(images), device=images.device)
        target = class_masks(batch.labels, range(classes)).view(count, classes, *images.shape[2:]).float()
        if config.elastic_sigma > 0:
            draw = torch.rand((), generator=self.generator, device=images.device)
            deforms = rows >= 1 + (draw * max(count - 2, 1)).floor()
            sigma = self._in_pixels(config.elastic_sigma)
            field = sample_elastic(count, sigma=sigma, active=deforms, generator=self.generator)
            deformed = apply_elastic(torch.cat([images, target], dim=1), field)
            images, target = torch.split(deformed, [images.shape[1], classes], dim=1)
        if config.seg_intensity_aug:
            drawn = sample_jitter(count, brightness=0.0, contrast=0.2, shift=0.1, clip=False, generator=self.generator)
            first = rows < count // 2
            contrast, shift = torch.where(first, drawn.contrast, 1.0), torch.where(first, 0.0, drawn.shift)
            images = apply_jitter(images, replace(drawn, contrast=contrast, shift=shift))
        return images, target

    def _contrastive_views(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The first images of all pairs, then the second ones, with (pseudo-)labels; intensities drawn for each."""
        assert batch.extra is not None and batch.extra_labels is not None and batch.pseudo_labels_raw is not None
        images = torch.cat([batch.extra, batch.unlabeled_raw]).index_select(0, self.members)
        labels = torch.cat([batch.extra_labels, batch.pseudo_labels_raw]).index_select(0, self.members)
        params = sample_jitter(
            len(images),
            brightness=0.0,
            contrast=self.config.contrast,
            shift=self.config.brightness,
            clip=False,
            generator=self.generator,
        )
        lowest, highest = torch.aminmax(images.flatten(2), dim=2)
        brightest = lowest + BRIGHTEST * (highest - lowest)
        lower, upper = (end.view(*end.shape, *[1] * self.task.spatial_dims) for end in (lowest, brightest))
        return apply_jitter(images, params).clamp(lower, upper), labels

    def _contrast(self, embeddings: Tensor, labels: Tensor) -> LocalContrast:
        """The loss of views and labels as :meth:`_contrastive_views` orders them."""
        config = self.config
        masks = class_masks(labels, self.classes)
        means, present = class_means(embeddings, masks)
        indices, _ = sample(config.sampler, masks.flatten(0, 1), config.pixels, config.pixels, self.generator)
        anchors = pick_voxels(embeddings, indices.view(*masks.shape[:2], -1))
        pairs = [x.view(2, -1, *x.shape[1:]).transpose(0, 1) for x in (anchors, means, present)]
        return local_contrastive_loss(
            *pairs,
            temperature=config.temperature,
            variant=config.variant,
            normalization=config.normalization,
        )

    @torch.no_grad()
    def _watch(self, contrast: LocalContrast, logits: Tensor, labels: Tensor) -> None:
        """Log what shows whether the method works; the agreement with pseudo-labels is a foreground Dice."""
        self.contrast_empty += true_on_all_ranks(~contrast.used.any())
        self.log("contrast_empty", self.contrast_empty.clone())
        self.log("pairs_used", contrast.used.sum())
        self.log("positive_similarity", contrast.positive)
        self.log("negative_similarity", contrast.negative)
        for index, value in zip(self.classes, contrast.anchors.unbind(), strict=True):
            self.log(f"anchors/{self.task.classes[index]}", value)
        unlabeled = self.members >= self.pairs.labeled
        predicted = logits.argmax(1)
        hit = ((predicted == labels) & (labels > 0)).flatten(1).sum(1)
        size = (predicted > 0).flatten(1).sum(1) + (labels > 0).flatten(1).sum(1)
        self.log("pseudo_agreement", 2 * (hit * unlabeled).sum() / (size * unlabeled).sum().clamp(min=1))

    def _segmentation_loss(self, logits: Tensor, target: Tensor) -> Tensor:
        kind = self.config.segmentation_loss
        if kind == "cross_entropy":
            weights = torch.full((self.task.num_classes,), 0.9 / (self.task.num_classes - 1), device=logits.device)
            weights[0] = 0.1
            return weighted_cross_entropy(logits, target, weights)
        return soft_dice_per_image(logits.float().softmax(1), target, include_background=kind == "dice")
