"""How the masks of ``sdf.json`` and the pairs of ``metrics.json`` are compared with our code."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from golden_values import Compared, apart, array, entries, list_apart, numbers_of
from numpy.typing import NDArray

from scantly.evaluation import asd, assd, dice, hd95, jaccard, score_case, surface_distances
from scantly.losses import signed_distance

__all__ = ["METRIC_NAMES", "compared_distance_map", "compared_metrics"]

METRIC_NAMES = ("dice", "jaccard", "hd95", "hd", "asd", "asd_reversed", "assd")


def compared_distance_map(name: str) -> Iterator[Compared]:
    """The signed distance map of a mask, where an empty one gives 0, as an absolute difference."""
    entry = entries("sdf")[name]
    mask = torch.zeros(entry["shape"], dtype=torch.bool)
    mask.view(-1)[entry["inside"]] = True
    ours = numbers_of(signed_distance(mask[None], empty="zero"))
    theirs = entry["values"]
    difference = math.inf if theirs is None else list_apart(ours, theirs, scale=1.0)
    yield Compared("map", "values", difference, ours)


def compared_metrics(name: str) -> Iterator[Compared]:
    """Metrics of a pair of masks, by our functions and by the table of a case, in voxels or, with a spacing, in mm."""
    entry = entries("metrics")[name]
    prediction, reference = (array({"shape": entry["shape"], **entry[mask]}) for mask in ("prediction", "reference"))
    assert [int(mask.sum()) for mask in (prediction, reference)] == entry["voxels"]
    assert entry["values"].keys() == set(METRIC_NAMES)
    for metric, value in _by_functions(prediction, reference, entry["spacing"]).items():
        yield Compared(metric, "function", apart(value, entry["values"][metric]), (value,))
    unit = "voxels" if entry["spacing"] is None else "mm"
    (row,) = score_case(
        prediction, reference, classes=("background", "x"), spacing=entry["spacing"], case=name, convention="literature"
    )
    for metric, column in (
        ("dice", "dice"),
        ("jaccard", "jaccard"),
        ("hd95", f"hd95_{unit}"),
        ("asd", f"asd_{unit}"),
        ("assd", f"assd_{unit}"),
    ):
        value = float(row[column])
        yield Compared(metric, "table", apart(value, entry["values"][metric]), (value,))


def _by_functions(
    prediction: NDArray[np.int64], reference: NDArray[np.int64], spacing: list[float] | None
) -> dict[str, float]:
    distances = surface_distances(prediction, reference, spacing)
    return {
        "dice": dice(prediction, reference),
        "jaccard": jaccard(prediction, reference),
        "hd95": hd95(prediction, reference, spacing),
        "hd": float(max(distances.to_reference.max(), distances.to_prediction.max())),
        "asd": asd(prediction, reference, spacing),
        "asd_reversed": asd(reference, prediction, spacing),
        "assd": assd(prediction, reference, spacing),
    }
