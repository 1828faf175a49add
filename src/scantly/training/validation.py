"""Validation by volume, on validation cases only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn

from scantly.data.dataset import Dataset
from scantly.data.plan import Plan
from scantly.data.store import Store
from scantly.evaluation import Convention, dice_per_class
from scantly.inference.original import label_on_original_grid
from scantly.inference.settings import DEFAULT_INFERENCE, InferenceSettings
from scantly.inference.windows import predict_array
from scantly.methods.parts.modes import evaluation_mode
from scantly.ranks import rank, sum_over_ranks, world_size

__all__ = ["validate"]


def validate(
    network: nn.Module,
    cases: Sequence[str],
    *,
    dataset: Dataset,
    store: Store,
    plan: Plan,
    device: torch.device,
    autocast: AbstractContextManager[object],
    inference: InferenceSettings = DEFAULT_INFERENCE,
    convention: Convention = "clean",
) -> dict[str, float]:
    """Mean Dice over validation cases, per class and over classes, on each scan's original grid.

    Draws nothing at random and leaves the network in the mode it was in. The cases are shared among the ranks; all get
    the same values.

    Args:
        network: The method's predictor.
        cases: Names of the validation cases.
        dataset: Where the reference labels are.
        store: Prepared images.
        plan: How they were prepared.
        device: Where the network is.
        autocast: Precision context of the training.
        inference: How whole scans are predicted, the same as after the training.
        convention: What a case counts in which a class is neither present nor predicted: nothing (``clean``), or 0
            (``literature``), as in the scores after the training.

    Returns:
        ``{"val/dice": ..., "val/dice/<class>": ...}`` in [0, 1]; by ``clean`` a class that is in no case is left out,
        and ``val/dice`` is NaN if none is in any.
    """
    table = np.zeros((len(cases), len(dataset.classes) - 1))
    with evaluation_mode(network):
        for index in range(rank(), len(cases), world_size()):
            case = cases[index]
            image = store.read_image(case, (slice(None), slice(None), slice(None)))
            with autocast:
                probs = predict_array(
                    network,
                    image,
                    spatial_dims=plan.spatial_dims,
                    patch_size=plan.patch_size,
                    device=device,
                    settings=inference,
                )
            labels = label_on_original_grid(
                probs,
                store.record(case),
                plan,
                largest_component=inference.largest_component,
                resample=inference.resample,
            )
            reference = dataset.read_label(case).array
            table[index] = dice_per_class(labels, reference, len(dataset.classes), convention=convention)
    table = sum_over_ranks(torch.from_numpy(table)).numpy()
    counted = (~np.isnan(table)).any(axis=0)
    means = np.full(table.shape[1], np.nan)
    means[counted] = np.nanmean(table[:, counted], axis=0)
    values = {
        f"val/dice/{name}": float(mean)
        for name, mean in zip(dataset.classes[1:], means, strict=True)
        if not np.isnan(mean)
    }
    return {"val/dice": float(means[counted].mean()) if counted.any() else math.nan, **values}
