"""Losses of supervised training and of the consistency methods, each by the method's own ``losses``."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from golden_runs import (
    Answers,
    DecodedRows,
    Rows,
    Shift,
    arguments_of,
    batch_of,
    method_of,
    numbered,
    recorded,
    total,
)
from golden_values import Entry
from torch import Tensor, nn

from scantly.losses import consistency, cross_entropy, soft_dice
from scantly.methods import cps, fixmatch, ict, unimatch
from scantly.methods.base import Progress
from scantly.methods.parts import feature_perturbation
from scantly.methods.parts.strong_views import StrongViewConfig, WeakLabels
from scantly.methods.parts.supervision import SupervisionConfig

Inputs = dict[str, Tensor]
Ours = dict[str, Any]

STUDENT_ALONE: dict[str, Any] = {"teacher_buffers": "own"}  # no passes of the teacher that only gather statistics


def supervised(entry: Entry, x: Inputs) -> Ours:
    """Cross-entropy, Dice and their mean, the mean by the method ``supervised``."""
    background = "foreground" not in entry["name"]
    method = method_of("supervised", entry["settings"]["classes"], x["labels"].shape[1:], dice_background=background)
    method.network = Rows(x["logits"])
    probs = x["logits"].float().softmax(1)
    return {
        "cross_entropy": cross_entropy(x["logits"], x["labels"]),
        "dice": soft_dice(probs, x["labels"], include_background=background),
        "loss": method.losses(batch_of(x["labels"], 2, 0), Progress(0, 1))["supervised"],
    }


def mean_teacher(entry: Entry, x: Inputs) -> Ours:
    """Weights are those of the ramp, totals those of a run whose consistency starts at iteration 1000."""
    settings = {**STUDENT_ALONE, "noise_std": 0.0}
    start = entry["settings"]["start_iteration"]
    ramped = method_of("mean_teacher", 4, (12, 12), **settings)
    method = method_of("mean_teacher", 4, (12, 12), start_iteration=start, **settings)
    method.student, method.teacher = Rows(x["student"]), Rows(x["teacher"], x["teacher"])  # rows 2 and 3
    ours: Ours = {}
    for iteration in (0, 999, 1000, 20000):
        progress = Progress(iteration, entry["settings"]["iterations"])
        terms = method.losses(batch_of(x["labels"], 2, 2), progress)
        ours[f"total_at_{iteration}"] = total(terms)
        ours[f"weight_at_{iteration}"] = weight = ramped.config.consistency_weight(progress)
    return ours | {"supervised": terms["supervised"], "consistency": terms["consistency"] / weight}


def ua_mt(entry: Entry, x: Inputs) -> Ours:
    """With the public code's threshold and divisor (``official``)."""
    settings, (classes, *space) = entry["settings"], x["student"].shape[1:]
    own = {"rampup_iterations": 6000, "published_iterations": 6000, "dice_background": False}
    method = method_of(
        "ua_mt", classes, space, official=True, passes=8, **STUDENT_ALONE, **(own if len(space) == 3 else {})
    )
    method.student = Rows(x["student"])
    pairs = [torch.cat(list(x["passes"][first : first + 2])) for first in range(0, 8, 2)]
    method.teacher = Answers(*pairs)
    uncertainty = method.uncertainty(numbered(2, 2, space))
    ours: Ours = {"uncertainty_mean": uncertainty.mean(), "uncertainty_first": uncertainty.flatten()[:8]}
    for name in entry["terms"]:
        if not name.startswith("threshold_at_"):
            continue
        iteration = int(name.removeprefix("threshold_at_"))
        progress = Progress(iteration, settings["iterations"])
        method.teacher = Answers(x["teacher"], *pairs)
        terms = method.losses(batch_of(x["labels"], 2, 2), progress)
        weight = method.config.consistency_weight(progress)
        ours |= {
            f"threshold_at_{iteration}": method.threshold(progress),
            f"certain_voxels_at_{iteration}": (uncertainty < method.threshold(progress)).sum(),
            f"consistency_at_{iteration}": terms["consistency"] / weight,
            f"weight_at_{iteration}": weight,
            f"total_at_{iteration}": total(terms),
            "supervised": terms["supervised"],
        }
    return ours


def interpolation(entry: Entry, x: Inputs) -> Ours:
    """The factor given, in place of a draw; the target is what the method mixes."""
    method = method_of("ict", 4, (12, 12), **STUDENT_ALONE)
    method.student = Answers(x["student"])
    method.teacher = Answers(x["teacher_first"], x["teacher_second"])
    share = entry["settings"]["share_of_second"]
    progress = Progress(entry["settings"]["iteration"], 30000)
    method.shares = lambda images: torch.full((len(images), 1, 1, 1), share).to(x["student"].dtype)
    with recorded(ict.torch, "lerp") as mixtures:
        terms = method.losses(batch_of(x["labels"], 2, 2), progress)
    weight = method.config.consistency_weight(progress)
    return {
        "supervised": terms["supervised"],
        "consistency": terms["consistency"] / weight,
        "total": total(terms),
        "weight": weight,
        "target_mean_square": mixtures[0].square().mean(),
        "target_first": mixtures[0].flatten()[:8],
    }


def entropy_minimization(entry: Entry, x: Inputs) -> Ours:
    """The method as it is by default."""
    classes, *space = x["logits"].shape[1:]
    method = method_of("entropy_minimization", classes, space)
    method.network = Rows(x["logits"])
    progress = Progress(entry["settings"]["iteration"], 30000)
    terms = method.losses(batch_of(x["labels"], 2, 2), progress)
    weight = method.config.consistency_weight(progress)
    return {
        "supervised": terms["supervised"],
        "entropy": terms["entropy"] / weight,
        "total": total(terms),
        "weight": weight,
    }


def cross_pseudo(entry: Entry, x: Inputs) -> Ours:
    """Both networks' terms as the method computes them one by one."""
    method = method_of("cps", 4, (12, 12))
    method.first, method.second = Rows(x["first"]), Rows(x["second"])
    progress = Progress(entry["settings"]["iteration"], 30000)
    with recorded(cps, "cross_entropy") as cross, recorded(SupervisionConfig, "supervised_loss") as own:
        terms = method.losses(batch_of(x["labels"], 2, 2), progress)
    return {
        "supervised_first": own[0],
        "supervised_second": own[1],
        "cross_first": cross[0],
        "cross_second": cross[1],
        "total": total(terms),
        "weight": method.config.consistency_weight(progress),
    }


def cross_consistency(entry: Entry, x: Inputs) -> Ours:
    """With gradients both ways (``official``); logits in place of the decoders."""
    method = method_of("cct", 4, (12, 12), official=True)
    method.network = Rows(x["main"])
    method.perturbations = [nn.Identity()] * 3
    method.decoders = nn.ModuleList(DecodedRows(x[f"aux{number}"]) for number in (1, 2, 3))
    method.heads = nn.ModuleList(nn.Identity() for _ in method.decoders)
    return _with_weight(entry, method, x, "consistency")


def _with_weight(entry: Entry, method: Any, x: Inputs, name: str) -> Ours:
    progress = Progress(entry["settings"]["iteration"], method.config.published_iterations)
    terms = method.losses(batch_of(x["labels"], 2, 2), progress)
    weight = method.config.consistency_weight(progress)
    return {
        "supervised": terms["supervised"],
        name: terms[name] / weight,
        "total": total(terms),
        "weight": weight,
    }


def perturbations(entry: Entry, x: Inputs) -> Ours:
    """Of features, with bounds between which nothing is left to draw, and with the noise given."""
    share, generator = entry["settings"]["share"], torch.Generator()
    dropped = feature_perturbation.drop_voxels(x["features"], (share, share), generator)
    with mock.patch.object(feature_perturbation, "_uniform", lambda *_: x["noise"][None]):
        noisy = feature_perturbation.proportional_noise(x["features"], 0.3, generator)
    return {
        "drop_voxels": (dropped * x["weights"]).sum(),
        "drop_voxels kept_voxels": (dropped[:, 0] != 0).sum(),
        "noise": (noisy * x["weights"]).sum(),
    }


def pyramid(entry: Entry, x: Inputs) -> Ours:
    """The terms of single scales are those whose mean the loss takes."""
    method = method_of("urpc", 4, (12, 12))
    scales = [x[f"scale{number}"] for number in (1, 2, 3, 4)]
    method._scales = lambda images: scales
    with arguments_of(consistency.torch, "stack") as stacked:
        ours = _with_weight(entry, method, x, "consistency")
    probs, per_scale, divergences = stacked[:3]
    assert [len(each) for each in (probs, per_scale, divergences)] == [4, 4, 4]
    for number, (loss, divergence) in enumerate(zip(per_scale, divergences, strict=True), start=1):
        ours |= {f"consistency_scale{number}": loss, f"divergence_scale{number}": divergence.detach()}
    return ours


def mutual(entry: Entry, x: Inputs) -> Ours:
    """MC-Net and MC-Net+; the Dice is the sum over decoders before the weight that the public code has."""
    decoders, (classes, *space) = list(x.values())[:-1], x["first"].shape[1:]
    own = {"rampup_iterations": 6000, "published_iterations": 6000, "consistency": 1.0}
    name = "mc_net" if len(decoders) == 2 else "mc_net_plus"
    method = method_of(name, classes, space, **(own if len(space) == 3 else {}))
    method.network = Rows(decoders[0])
    method.decoders = nn.ModuleList(DecodedRows(logits) for logits in decoders[1:])
    method.heads = nn.ModuleList(nn.Identity() for _ in decoders[1:])
    ours = _with_weight(entry, method, x, "consistency")
    return {**ours, "dice_sum": ours.pop("supervised") / entry["settings"]["supervised_weight"]}


class _View:
    """A strong view that shows, inside the box, what lies under the partner's labels."""

    def __init__(self, images: Tensor, box: Tensor, partner: Tensor, threshold: float) -> None:
        confidence, labels = partner.softmax(1).max(1)
        self.images, self.box, self.partner = images, box.bool(), WeakLabels(labels, confidence >= threshold)

    def paste(self, labels: WeakLabels) -> WeakLabels:
        pairs = ((self.partner.targets, labels.targets), (self.partner.mask, labels.mask))
        return WeakLabels(*(torch.where(self.box, theirs, own) for theirs, own in pairs))


def weak_to_strong(entry: Entry, x: Inputs) -> Ours:
    """UniMatch; boxes and partners given."""
    threshold = entry["settings"]["threshold"]
    method = method_of("unimatch", 4, (12, 12), confidence_threshold=threshold)
    method.network = Rows(x["labeled_and_weak"], x["weak_perturbed"], x["strong1"], x["strong2"])
    method.perturb = Shift(4)
    views = [
        _View(numbered(first, 2, (12, 12)), x[box], x["partner_weak"], threshold)
        for first, box in ((8, "box1"), (10, "box2"))
    ]
    with (
        mock.patch.object(StrongViewConfig, "strong_view", lambda *_: views.pop(0)),
        recorded(unimatch, "_masked_dice") as dice,
        recorded(_View, "paste") as shown,
    ):
        terms = method.losses(batch_of(x["labels"], 2, 2), Progress(0, 1))
    config = method.config
    return {
        "confident_share_weak": method.pop_logged()["confident"],
        "confident_share_strong1": shown[0].mask.to(x["strong1"].dtype).mean(),
        "supervised": terms["supervised"] / config.supervised_weight,
        "strong1": dice[0],
        "strong2": dice[1],
        "features": terms["features"] / config.feature_weight,
        "total": total(terms),
    }


def confident_labels(entry: Entry, x: Inputs) -> Ours:
    """FixMatch's loss on strong views; the cross-entropy on labels is the function alone (the method adds Dice)."""
    threshold = entry["settings"]["threshold"]
    method = method_of("fixmatch", 4, (12, 12), confidence_threshold=threshold)
    method.network = Rows(x["labeled_and_weak"], x["strong"])
    view = _View(numbered(4, 2, (12, 12)), x["box"], x["partner_weak"], threshold)
    with (
        mock.patch.object(StrongViewConfig, "strong_view", lambda *_: view),
        recorded(fixmatch, "masked_cross_entropy") as masked,
    ):
        method.losses(batch_of(x["labels"], 2, 2), Progress(0, 1))
    return {
        "cross_entropy_labeled": cross_entropy(x["labeled_and_weak"][:2], x["labels"]),
        "masked_cross_entropy": masked[0],
    }
