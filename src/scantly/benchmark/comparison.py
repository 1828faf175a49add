"""Published numbers beside measured ones, where they are of the same thing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scantly.benchmark.published import MEAN, METRICS, PublishedResult, published_results
from scantly.evaluation import OVERALL

__all__ = ["LINEAGE_OF", "TOLERANCE", "beside_published"]

#: Recipe -> dataset of the published tables, and the lineages that its literature protocol follows.
LINEAGE_OF: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "acdc": ("acdc", ("ssl4mis",)),
    "la": ("la", ("uamt",)),
    "pancreas-ct": ("pancreas_ct", ("62/20",)),
    "pancreas-ct-coranet": ("pancreas_ct", ("coranet",)),
}
#: Differences beyond these are marked: percentage points for shares, voxels for distances. The author of DTC reports
#: about 0.8 points of Dice from seeds and library versions alone.
TOLERANCE: Mapping[str, float] = {"dice": 2.0, "jaccard": 2.5, "hd95": 3.0, "asd": 1.0}
_COLUMNS = {"dice": "dice", "jaccard": "jaccard", "hd95": "hd95_voxels", "asd": "asd_voxels"}


def beside_published(recipe: str, rows: Sequence[Mapping[str, Any]], protocol: str) -> list[dict[str, Any]]:
    """Rows of a table of measured and published numbers.

    Args:
        recipe: Name of the recipe that was followed; others than those of :data:`LINEAGE_OF` have no published
            counterpart.
        rows: One per method and labeled count: ``row`` (what it is called), ``method``, ``labeled``, ``subjects``
            (number labeled), ``complete`` (whether trained for the recipe's full length), ``split`` and ``means``:
            (class, metric) -> mean.
        protocol: ``clean`` or ``literature``.

    Returns:
        ``method``, ``labeled``, ``metric``, ``measured``, ``published``, ``difference``, ``flag`` (beyond
        :data:`TOLERANCE`) and ``source``. Empty where protocol, length or cases are not those of the tables: the
        published numbers are of test cases under the literature protocol.
    """
    if protocol != "literature" or recipe not in LINEAGE_OF:
        return []
    dataset, lineages = LINEAGE_OF[recipe]
    found = []
    for row in rows:
        if not row["complete"] or row["split"] != "test":
            continue
        for result in published_results(str(row["method"]), dataset, class_name=MEAN):
            if result.lineage not in lineages or result.variant or result.labeled_unit == "percent":
                continue
            if result.labeled != row["subjects"] or result.metric not in _COLUMNS or result.unit not in {"%", "voxel"}:
                continue
            mean = row["means"].get((OVERALL, _COLUMNS[result.metric]), math.nan)
            if not math.isnan(mean):
                found.append(_row(row, result, mean))
    return found


def _row(row: Mapping[str, Any], result: PublishedResult, mean: float) -> dict[str, Any]:
    measured = 100 * mean if result.unit == "%" else mean
    difference = measured - result.value
    title = METRICS[result.metric][0]
    return {
        "method": row["row"],
        "labeled": str(row["labeled"]),
        "metric": f"{title} ({result.unit})",
        "measured": f"{measured:.2f}",
        "published": f"{result.value:.{result.decimals}f}",
        "difference": f"{difference:+.2f}",
        "flag": abs(difference) > TOLERANCE[result.metric],
        "source": result.source + (f"; {result.note}" if result.note else ""),
    }
