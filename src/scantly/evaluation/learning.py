"""Learning curves: how good methods are by the number of labeled subjects, against the supervised upper bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from scantly.errors import ConfigError, RunError, unknown_name
from scantly.evaluation.summaries import OVERALL, Labeled, ScoredRun, ordered_settings, seed_means, stack_tables

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CurvePoint", "LearningCurve", "learning_curve"]


@dataclass(frozen=True)
class CurvePoint:
    """One metric of one method at one labeled count.

    Attributes:
        labeled: Number of labeled subjects, or ``"all"``.
        mean: Mean over seeds, in the unit of the metric.
        std: Sample standard deviation over seeds; None for one seed.
        seeds: The seeds, ascending.
        values: Mean over cases (and classes) of each seed, in their order.
    """

    labeled: Labeled
    mean: float
    std: float | None
    seeds: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class LearningCurve:
    """One metric of several methods by the number of labeled subjects.

    Attributes:
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        class_name: The class, or :data:`OVERALL`.
        points: Method, in the order given, to its points by ascending labeled count.
        upper_bound: The method trained with all labels, None if there is none.
        upper_bound_method: Its name, empty if there is none.
    """

    metric: str
    class_name: str
    points: Mapping[str, tuple[CurvePoint, ...]]
    upper_bound: CurvePoint | None = None
    upper_bound_method: str = ""

    @property
    def counts(self) -> tuple[int, ...]:
        """All labeled counts, ascending; that of the upper bound is not among them."""
        return tuple(sorted({int(point.labeled) for points in self.points.values() for point in points}))

    def table(self) -> pd.DataFrame:
        """One row per point: ``method``, ``labeled``, ``mean``, ``std_over_seeds`` (NaN for one seed), ``seeds``."""
        import pandas as pd

        listed = [(method, point) for method, points in self.points.items() for point in points]
        if self.upper_bound is not None:
            listed.append((self.upper_bound_method, self.upper_bound))
        rows = [
            (method, point.labeled, point.mean, np.nan if point.std is None else point.std, len(point.seeds))
            for method, point in listed
        ]
        return pd.DataFrame(rows, columns=["method", "labeled", "mean", "std_over_seeds", "seeds"])


def learning_curve(
    runs: Sequence[ScoredRun],
    *,
    metric: str = "dice",
    class_name: str = OVERALL,
    groups: Mapping[str, str] | None = None,
) -> LearningCurve:
    """One metric by the number of labeled subjects, mean and spread over seeds, for each method.

    Args:
        runs: Any methods, labeled counts and seeds, all evaluated on the same cases by one protocol. Runs with
            ``labeled="all"`` are the upper bound and must be of one method.
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        class_name: A class of the tables, or :data:`OVERALL`.
        groups: Case to subject; cases of a subject are averaged first. None: every case stands for itself.

    Returns:
        The curve. Its numbers are ``mean`` and ``std_over_seeds`` of :func:`summarize_runs`; seeds without a value are
        left out, and so are points without any.

    Raises:
        RunError: as :func:`summarize_runs`, or if two methods were trained with all labels.
        ConfigError: if the metric or the class is unknown.
    """
    stacked = stack_tables(runs, groups, (metric,))
    classes = [*dict.fromkeys(stacked["class"]), OVERALL]
    if class_name not in classes:
        raise ConfigError(unknown_name("class", class_name, classes))
    settings = ordered_settings(runs)
    bounds = [method for method, labeled in settings if labeled == "all"]
    if len(bounds) > 1:
        raise RunError(f"{' and '.join(bounds)} were trained with all labels; keep one as the upper bound.")
    means = seed_means(stacked, [metric])
    means = means[means["class"] == class_name].dropna(subset=[metric])
    points: dict[str, list[CurvePoint]] = {method: [] for method, labeled in settings if labeled != "all"}
    upper_bound = None
    for number, (method, labeled) in enumerate(settings):
        rows = means[means["setting"] == number].sort_values("seed")
        if rows.empty:
            continue
        values = rows[metric].to_numpy(dtype=np.float64)
        std = float(values.std(ddof=1)) if values.size > 1 else None
        seeds = tuple(int(seed) for seed in rows["seed"])
        point = CurvePoint(labeled, float(values.mean()), std, seeds, tuple(values.tolist()))
        if labeled == "all":
            upper_bound = point
        else:
            points[method].append(point)
    curves = {method: tuple(members) for method, members in points.items()}
    return LearningCurve(metric, class_name, curves, upper_bound, bounds[0] if upper_bound else "")
