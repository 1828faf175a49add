"""Terms of the contrastive methods: the functions and modules of which ARCO, PLGCL and LCLPL are built."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from consistency_comparisons import Inputs, Ours
from golden_values import Entry, fill
from torch import Tensor

from scantly.losses import (
    confident_cross_entropy,
    cosine_similarities,
    info_nce,
    nearest_neighbor_loss,
    sampled_similarities,
    similarity_divergence,
    soft_dice_per_image,
    unit,
)
from scantly.losses.local_contrastive import class_masks, class_means, local_contrastive_loss, pick_voxels
from scantly.losses.patch_contrastive import closed_form_contrast
from scantly.methods.parts.arco_sets import VoxelSets, class_sets, released_negatives, released_rank_bounds
from scantly.methods.parts.class_queues import ClassQueues
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.networks import PyramidHead


def instance_divergence(entry: Entry, x: Inputs) -> Ours:
    """Relational distillation of ARCO's first stage."""
    settings, stored = entry["settings"], unit(x["queue"])
    divergence = similarity_divergence(
        cosine_similarities(x["student"], stored),
        cosine_similarities(x["teacher"], stored),
        student_temperature=settings["student_temperature"],
        teacher_temperature=settings["teacher_temperature"],
    )
    return {"divergence": divergence}


def nearest_neighbor(entry: Entry, x: Inputs) -> Ours:
    """The teacher chooses, the student moves."""
    return {
        "loss": nearest_neighbor_loss(x["moved"], x["chooser"], x["pool"], neighbors=entry["settings"]["neighbors"])
    }


def unsupervised(entry: Entry, x: Inputs) -> Ours:
    """Confidence-weighted cross-entropy with pseudo-labels."""
    threshold = entry["settings"]["threshold"]
    return {"loss": confident_cross_entropy(x["logits"], x["labels"], x["confidence"], threshold=threshold)[0]}


def dense_head(entry: Entry, x: Inputs) -> Ours:
    """The head on all levels of a decoder."""
    settings = entry["settings"]
    head = fill(PyramidHead(2, settings["widths"], settings["out_channels"]))
    dense = head([x[f"map{level}"] for level in range(5)])
    return {
        "weighted_sum": (dense * x["weights"]).sum(),
        "mean": dense.mean(),
        "std": dense.std(correction=0),
        "first": dense.flatten()[:8],
    }


def anatomical_contrast(entry: Entry, x: Inputs) -> Ours:
    """Anchors, prototypes and banks by our sets (``negatives="released"``), with the draws given."""
    settings = entry["settings"]
    sets = class_sets(
        x["labels"], x["low_entropy"].bool(), x["teacher_probs"], anchor_probability=settings["anchor_probability"]
    )
    students, teachers = (x[name].movedim(1, -1).flatten(0, 2) for name in ("features", "teacher_features"))
    banks, losses, counts = _banks(sets, teachers, entry, x), [], []
    for label, bank in enumerate(banks):
        candidates = sets.anchors[label].nonzero()[:, 0]
        shape = (settings["queries"], settings["negatives"])
        anchors = students[candidates[_draws(2 * label, shape[0], len(candidates))]]
        places = _draws(2 * label + 1, shape[0] * shape[1], int(bank.filled)).view(shape)
        prototype = unit(teachers[sets.valid[label]].mean(0, keepdim=True))
        near = cosine_similarities(anchors, prototype)[:, 0]
        far = sampled_similarities(anchors, unit(bank.values), places)
        losses.append(info_nce(near, far, temperature=settings["temperature"]))
        counts += [[len(candidates), shape[0]], [int(bank.filled), shape[0] * shape[1]]]
    return {
        "loss": torch.stack(losses).mean(),
        "candidates_and_draws": counts,
        "bank_rows_after": [int(bank.filled) for bank in banks],
        "bank_sums_after": [float(bank.values.sum()) for bank in banks],
    }


def _banks(sets: VoxelSets, teachers: Tensor, entry: Entry, x: Inputs) -> list[MemoryBank]:
    """Those given, and what this step appends."""
    low, high = released_rank_bounds(None, None)
    assert low == entry["settings"]["rank"]
    admitted = released_negatives(
        sets,
        x["labels"],
        x["teacher_probs"],
        x["high_entropy"].bool(),
        2,
        low=low,
        high=high,
        largest_probability=entry["settings"]["negative_probability"],
    )
    banks = [MemoryBank(300, (6,)) for _ in admitted]
    for label, (bank, mask) in enumerate(zip(banks, admitted, strict=True)):
        bank.push(x[f"bank{label}"])
        bank.push(teachers, mask)
    return banks


def _draws(number: int, size: int, below: int) -> Tensor:
    drawn = np.random.default_rng(1000 + number).integers(0, 2**31 - 1, size)
    return torch.from_numpy(drawn % below)


def closed_form(entry: Entry, x: Inputs) -> Ours:
    """PLGCL's loss on the statistics of our queues; a class without anchors takes no part."""
    settings, present = entry["settings"], (0, 1, 3)
    queues = ClassQueues(4, 64, 12)
    for label in range(4):
        queues.push([label], x[f"queue{label}"])
    means, covariances = queues.statistics(present)
    anchors = [x[f"anchors{label}"] for label in present]
    groups = torch.cat([torch.full((len(rows),), index) for index, rows in enumerate(anchors)])
    loss = closed_form_contrast(
        torch.cat(anchors),
        groups,
        means,
        covariances,
        temperature=settings["temperature"],
        covariance_weight=settings["covariance_weight"],
        negative_weight=settings["negative_weight"],
    )
    return {"loss": loss}


def local_contrast(entry: Entry, x: Inputs) -> Ours:
    """LCLPL's loss in both variants and both normalizations."""
    embeddings = x["embeddings"].movedim(-1, 1)
    means, present = class_means(embeddings, class_masks(x["labels"], range(1, 4)))
    anchors = pick_voxels(embeddings, x["positions"])
    paired = [torch.stack([rows[:3], rows[3:]], dim=1) for rows in (anchors, means, present)]
    return {
        f"{variant}_{theirs}": local_contrastive_loss(
            *paired, temperature=entry["settings"]["temperature"], variant=variant, normalization=ours
        ).loss
        for variant in ("inter", "intra")
        for theirs, ours in (("released", "released"), ("divided_once", "correct"))
    }


def dice_per_image(entry: Entry, x: Inputs) -> Ours:
    """LCLPL's supervised loss."""
    target = F.one_hot(x["labels"], 4).movedim(-1, 1).to(x["logits"].dtype)
    probs = x["logits"].softmax(1)
    return {
        "with_background": soft_dice_per_image(probs, target),
        "without_background": soft_dice_per_image(probs, target, include_background=False),
    }
