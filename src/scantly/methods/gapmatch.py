"""GapMatch (Huang et al., AAAI 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from scantly.losses import masked_cross_entropy, soft_dice
from scantly.methods.base import Batch, Handles, Method, Progress, Task
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.ema import make_teacher, update_teacher
from scantly.methods.parts.modes import evaluation_mode
from scantly.methods.parts.ramps import gaussian_rampup
from scantly.methods.parts.strong_views import StrongView, StrongViewConfig, WeakLabels
from scantly.methods.parts.supervision import SupervisionConfig, outputs
from scantly.methods.parts.weight_perturbation import (
    RandomState,
    agreement,
    ascend,
    displaced,
    joint_norm,
    plus,
    random_state,
    replayed_random,
    take_gradients,
)

__all__ = ["GapMatch"]

_THRESHOLD = {2: 0.95, 3: 0.7}


@dataclass(frozen=True)
class _Again:
    """What a pass at other weights repeats."""

    images: Tensor
    labels: WeakLabels
    views: list[StrongView]
    dropped: RandomState


class GapMatch(Method):
    """Perturb the image, then the weights along the gradient that this gives.

    Huang, Zhang, Wang and Wang, "GapMatch: Bridging Instance and Model Perturbations for Enhanced Semi-Supervised
    Medical Image Segmentation", AAAI 2025. *Instance perturbation*: the network's confident labels of the weak view
    supervise its strong view, as in FixMatch; the gradient g1 of that loss L_u moves the decision boundary. *Model
    perturbation*: at weights moved by a small step up g1, the same loss on the same view with the same labels gives the
    gradient g2. Both update the weights where they were: ``grad L_s + lambda (g1 + alpha g2)``, to first order a
    penalty on the norm of L_u's gradient. One network, no teacher.

    From the paper's abstract: the two perturbations, one after the other, each driving the other on. Nothing was
    released, and the text of the method was not available. From papers and re-implementations that describe it: hard
    labels with a confidence threshold, the perturbation along the normalized gradient over all weights together, the
    sum of both gradients (``epsilon``, ``alpha``, ``update=joint``). Everything else is a choice, and a setting: the
    form and normalization of the losses, the ramp of lambda, batch norm and dropout in the perturbed pass, views
    (UniMatch's in 2D; brightness, contrast, blur and noise in 3D, as a later paper of the same group), CutMix,
    thresholds (0.95 in 2D after UniMatch, 0.7 in 3D after that paper), and ``update=sequential``, the other reading of
    the abstract.

    Deviations from what is described: no attack on the image besides the weights', which one re-implementation has. A
    gradient that is not finite does not skip the iteration; the run ends with a sentence at the next line of the log or
    checkpoint, since there is no loss scaling here that would make one harmless. Ranks share the perturbation: g1 is
    averaged over them before the step.
    """

    class Config(StrongViewConfig, SupervisionConfig):
        """Settings of GapMatch; where the paper's value is not known the description says whose it is."""

        epsilon: float = Field(
            0.01, ge=0, description="Size of the weights' perturbation (re-implementations: 0.01, 0.0001); 0: g2 = g1."
        )
        alpha: float = Field(1.0, ge=0, description="Weight of the second gradient; 0: FixMatch, without model term.")
        alpha_rampup_share: float = Field(
            0.0, ge=0, le=1, description="Share of the iterations until the full alpha; 0: constant."
        )
        unsupervised_weight: float = Field(1.0, ge=0, description="Lambda, weight of both gradients (our choice).")
        rampup_share: float = Field(
            0.2, ge=0, le=1, description="Share of the iterations until the full lambda (our choice)."
        )
        perturbation_start: float = Field(
            0.0, ge=0, le=1, description="Share of the iterations without model perturbation at first."
        )
        update: Literal["joint", "sequential"] = Field(
            "joint", description="joint: one update by the sum; sequential: by g1, then by g2 at the new weights."
        )
        confidence_threshold: float | None = Field(
            None, ge=0, description="From which a pseudo-label counts; none: 0.95 in 2D, 0.7 in 3D. Above 1: never."
        )
        consistency_loss: Literal["ce_dice", "ce", "dice"] = Field(
            "ce_dice", description="ce_dice: (CE + dice_weight Dice) / 2; ce, dice: that alone. Masked (our choice)."
        )
        dice_weight: float = Field(1.0, ge=0, description="Weight of Dice beside cross-entropy in ce_dice.")
        mask_normalization: Literal["all", "masked"] = Field(
            "all", description="Cross-entropy is divided by all voxels (FixMatch) or by the trusted ones."
        )
        hard_labels: bool = Field(True, description="False: probabilities sharpened by `sharpening_temperature`.")
        sharpening_temperature: float = Field(
            0.5, gt=0, description="Temperature of soft targets, below 1 sharper (a re-implementation)."
        )
        pseudo_label_mode: Literal["train", "eval"] = Field(
            "train", description="Batch statistics and dropout in the pass on the weak view, or neither (our choice)."
        )
        ema_decay: float | None = Field(
            None, ge=0, lt=1, description="Pseudo-labels of a moving average with this decay; none: of the network."
        )
        strong_views: int = Field(1, ge=1, description="Strong views per image; their losses are averaged.")
        perturbation: Literal["global_l2", "layer_relative", "adaptive", "random"] = Field(
            "global_l2",
            description="One step of norm epsilon over all weights; each tensor's by its own norm (AWP); each weight's "
            "by its size (ASAM); a random direction of norm epsilon (a control).",
        )
        perturbed: Literal["all", "weights"] = Field(
            "all", description="weights: neither biases nor the factors of normalizations are perturbed."
        )
        perturbation_source: Literal["unsupervised", "total"] = Field(
            "unsupervised", description="Whose gradient is followed: L_u's, or that of L_s + lambda L_u."
        )
        ascent_steps: int = Field(1, ge=1, description="Steps of epsilon / so many each, with fresh gradients.")
        second_targets: Literal["same", "recomputed"] = Field(
            "same",
            description="recomputed: the perturbed network labels anew, with the strong pass's dropout.",
        )
        second_view: Literal["same", "new"] = Field("same", description="new: another strong view for g2.")
        second_statistics: Literal["unchanged", "updated"] = Field(
            "unchanged", description="Whether perturbed passes update running batch-norm statistics (our choice)."
        )
        replay_dropout: bool = Field(
            True, description="Perturbed passes drop what the first pass dropped (our choice)."
        )

        @model_validator(mode="after")
        def _combinations(self) -> Self:
            if self.perturbation_source == "total" and (
                self.ascent_steps > 1 or self.update == "sequential" or self.perturbation == "random"
            ):
                raise ValueError(
                    "perturbation_source=total goes with update=joint, ascent_steps=1 and no random perturbation"
                )
            if self.second_targets == "recomputed" and self.ema_decay is not None:
                raise ValueError("second_targets=recomputed needs labels of the network itself; leave out ema_decay")
            return self

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()
        if config.ema_decay is not None:
            self.teacher = make_teacher(self.network)
        given = config.confidence_threshold
        self.threshold = _THRESHOLD[task.spatial_dims] if given is None else given

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` and ``unsupervised``: the instance perturbation alone. :meth:`step` has both."""
        views, labels = self._views(batch.unlabeled), self._label(batch.unlabeled)
        loss = self._consistency(views, labels)
        return {"supervised": self._supervised(batch), "unsupervised": self._weights(progress)[0] * loss}

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """One iteration: g1, the supervised gradient, g2 at perturbed weights, then one or two updates."""
        weight, alpha = self._weights(progress)
        weights = [p for p in self.network.parameters() if p.requires_grad]
        views, labels = self._views(batch.unlabeled), self._label(batch.unlabeled)
        dropped = random_state(batch.unlabeled.device)
        unsupervised = self._consistency(views, labels)
        first = _gradients(unsupervised, weights, handles, average=True)
        supervised = self._supervised(batch)
        by_total = self.config.perturbation_source == "total"
        own = _gradients(supervised, weights, handles, average=by_total)
        again = _Again(batch.unlabeled, labels, views, dropped)
        self.log("confident", labels.mask.float().mean())
        self.log("gradient_norm", joint_norm(first))
        self.log("loss_before", unsupervised)

        if self.config.update == "joint":
            if alpha > 0:
                source = plus(own, first, weight) if by_total else first
                first = plus(first, self._second(again, first, source, weights, handles), alpha)
            _update(weights, plus(own, first, weight), handles)
        else:
            _update(weights, plus(own, first, weight), handles)
            if alpha > 0:
                first = _gradients(self._again(views, labels, dropped), weights, handles, average=True)
                second = self._second(again, first, first, weights, handles)
                _update(weights, [weight * alpha * gradient for gradient in second], handles)
        return {"supervised": supervised, "unsupervised": weight * unsupervised}

    def _second(
        self,
        again: _Again,
        first: list[Tensor],
        direction: list[Tensor],
        weights: list[nn.Parameter],
        handles: Handles,
    ) -> list[Tensor]:
        """g2, the gradient of the consistency at weights moved along ``direction``; they end as they were."""
        config = self.config
        if config.epsilon == 0:
            return first
        if config.perturbation == "random":
            for p in weights:
                p.grad = torch.randn(p.shape, generator=self.generator, device=p.device, dtype=p.dtype)
            handles.average_gradients()
            direction = take_gradients(weights)
        scale = "global_l2" if config.perturbation == "random" else config.perturbation
        chosen = [i for i, p in enumerate(weights) if config.perturbed == "all" or p.ndim > 1]
        moved = [weights[i] for i in chosen]
        with displaced(moved) as kept:
            for step in range(1, config.ascent_steps + 1):
                ascend(moved, [direction[i] for i in chosen], config.epsilon / config.ascent_steps, scale)
                labels, views = again.labels, again.views
                if config.second_targets == "recomputed":
                    with self._repeating(again.dropped, again.images.device):
                        labels = self._label(again.images)
                if config.second_view == "new":
                    views = self._views(again.images)
                loss = self._again(views, labels, again.dropped)
                # The last gradient is averaged over the ranks with the others, by the update.
                second = _gradients(loss, weights, handles, average=step < config.ascent_steps)
                direction = direction if config.perturbation == "random" else second
            self.log("perturbation_norm", joint_norm([p.detach() - copy for p, copy in zip(moved, kept, strict=True)]))
        self.log("loss_after", loss)
        self.log("gradient_agreement", agreement(first, second))
        return second

    def _again(self, views: Sequence[StrongView], labels: WeakLabels, dropped: RandomState) -> Tensor:
        """L_u once more."""
        with self._repeating(dropped, labels.mask.device):
            return self._consistency(views, labels)

    @contextmanager
    def _repeating(self, dropped: RandomState, device: torch.device) -> Iterator[None]:
        """For one pass: no statistics are learned, and what the first pass dropped is dropped."""
        config = self.config
        quiet = without_statistics(self.network) if config.second_statistics == "unchanged" else nullcontext()
        with quiet, replayed_random(dropped, device) if config.replay_dropout else nullcontext():
            yield

    @torch.no_grad()
    def _label(self, images: Tensor) -> WeakLabels:
        """Pseudo-labels of the weak view, and which voxels are confident."""
        network = self.network if self.config.ema_decay is None else self.teacher
        with evaluation_mode(network) if self.config.pseudo_label_mode == "eval" else nullcontext():
            logits = _exact(network(images))
        confidence, targets = logits.softmax(1).max(1)
        if not self.config.hard_labels:
            targets = (logits / self.config.sharpening_temperature).softmax(1)
        return WeakLabels(targets, confidence >= self.threshold)

    def _views(self, images: Tensor) -> list[StrongView]:
        return [self.config.strong_view(images, self.generator) for _ in range(self.config.strong_views)]

    def _consistency(self, views: Sequence[StrongView], labels: WeakLabels) -> Tensor:
        """L_u: the strong views against the weak view's confident labels, not weighted."""
        config, terms = self.config, []
        for view in views:
            logits, shown = self.network(view.images), view.paste(labels)
            cross_entropy = masked_cross_entropy(logits, shown.targets, shown.mask, normalize=config.mask_normalization)
            if config.consistency_loss == "ce":
                terms.append(cross_entropy)
                continue
            dice = soft_dice(_exact(logits).softmax(1), shown.targets, mask=shown.mask)
            whole = 0.5 * (cross_entropy + config.dice_weight * dice)
            terms.append(whole if config.consistency_loss == "ce_dice" else dice)
        return torch.stack(terms).mean()

    def _supervised(self, batch: Batch) -> Tensor:
        return self.config.supervised_loss(outputs(self.network, batch.labeled), batch.labels)

    def _weights(self, progress: Progress) -> tuple[float, float]:
        """Lambda and alpha at this iteration; alpha is 0 before the model perturbation begins."""
        config, done, total = self.config, progress.iteration, progress.total
        weight = config.unsupervised_weight * gaussian_rampup(done, config.rampup_share * total)
        if done < config.perturbation_start * total:
            return weight, 0.0
        alpha = config.alpha * gaussian_rampup(done, config.alpha_rampup_share * total)
        return weight, alpha if weight > 0 else 0.0

    def after_step(self, progress: Progress) -> None:  # noqa: ARG002
        """Update the moving average, where there is one."""
        if self.config.ema_decay is not None:
            update_teacher(self.teacher, self.network, self.config.ema_decay)

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network


def _exact(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _gradients(loss: Tensor, weights: list[nn.Parameter], handles: Handles, *, average: bool) -> list[Tensor]:
    """The gradient of one loss alone."""
    handles.backward(loss)
    if average:
        handles.average_gradients()
    return take_gradients(weights)


def _update(weights: list[nn.Parameter], gradients: Sequence[Tensor], handles: Handles) -> None:
    for p, gradient in zip(weights, gradients, strict=True):
        p.grad = gradient
    handles.update()
