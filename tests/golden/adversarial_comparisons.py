"""Losses of the methods with discriminators and distances, each by its own ``losses`` and ``judgment``."""

from __future__ import annotations

from typing import Any

import torch
from consistency_comparisons import Inputs, Ours
from golden_runs import Answers, Rows, batch_of, method_of, total
from golden_values import Entry
from torch import Tensor

from scantly.methods.base import Progress


class _Both(Rows):
    """A network with masks and signed distances."""

    def __init__(self, logits: Tensor, distances: Tensor) -> None:
        super().__init__(torch.stack([logits, distances], dim=1))

    def both(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits, distances = self(images).unbind(1)
        return logits, distances


def dan(entry: Entry, x: Inputs) -> Ours:
    """The discriminator's answers given, first in the network's step, then in its own."""
    method = method_of("dan", 4, (16, 16))
    method.network = Rows(x["network"])
    return _with_answers(entry, method, x)


def sassnet(entry: Entry, x: Inputs) -> Ours:
    """With distances of 0 for empty patches (``empty_distance=zero``)."""
    method = method_of("sassnet", 2, (16, 16, 16), empty_distance="zero")
    method.network = _Both(x["logits"], x["distance"])
    ours = _with_answers(entry, method, x)
    return {"dice": ours.pop("supervised"), **ours}


def _with_answers(entry: Entry, method: Any, x: Inputs) -> Ours:
    method.judge = Answers(x["fooling"], x["judge"])
    progress = Progress(entry["settings"]["iteration"], method.config.published_iterations)
    batch = batch_of(x["labels"], 2, 2)
    terms = method.losses(batch, progress)
    weight = method.config.consistency_weight(progress)
    ours = {
        "supervised": terms["supervised"],
        "adversarial": terms["adversarial"] / weight,
        "judge": method.judgment(batch),
        "total": total(terms),
        "weight": weight,
    }
    return ours | _distance(terms, method)


def dtc(entry: Entry, x: Inputs) -> Ours:
    """With distances of 0 for empty patches (``empty_distance=zero``)."""
    method = method_of("dtc", 2, (16, 16, 16), empty_distance="zero")
    method.network = _Both(x["logits"], x["distance"])
    progress = Progress(entry["settings"]["iteration"], method.config.published_iterations)
    terms = method.losses(batch_of(x["labels"], 2, 2), progress)
    weight = method.config.consistency_weight(progress)
    return {
        "dice": terms["supervised"],
        "consistency": terms["consistency"] / weight,
        "total": total(terms),
        "weight": weight,
    } | _distance(terms, method)


def _distance(terms: dict[str, Tensor], method: Any) -> Ours:
    """The squared error of the distances without its weight."""
    return {"distance": terms["distance"] / method.config.distance_weight} if "distance" in terms else {}
