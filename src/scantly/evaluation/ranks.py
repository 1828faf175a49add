"""Average ranks of methods over cases, the Friedman test, and Nemenyi's critical difference.

After Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006, section 3.2. What he
calls a data set is here a case (its mean over classes), or a subject where cases of one subject are grouped: the
tests say whether an order of methods would carry over to other cases of the same kind, not to other data sets.

Two deviations: the Friedman statistic is corrected for ties (his equation is the one without ties), and its p value
is that of the chi-square distribution rather than of the F distribution of Iman and Davenport.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scantly.errors import RunError
from scantly.evaluation.statistics import check_same_rows, unit_means
from scantly.evaluation.tables import DEFINITIONS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Ranking", "case_ranks", "cliques", "critical_difference", "friedman", "rank_methods"]


@dataclass(frozen=True)
class Ranking:
    """Average ranks of methods in one metric, the best method first.

    Attributes:
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        methods: Names by average rank; equal ranks in the order given.
        ranks: Average ranks of the methods, from 1 (best on every case) to their number.
        n: Cases or subjects ranked.
        excluded: Cases or subjects left out because a method has no value for them.
        statistic: Of the Friedman test, see :func:`friedman`.
        p: Its p value: the chance of ranks as unequal as these if all methods were alike.
        alpha: Level of the critical difference.
        critical_difference: Two methods differ at ``alpha`` if their average ranks differ by at least this.
        cliques: Largest groups of methods that do not differ, each with two or more, from best to worst. They
            may overlap; methods that share none differ.
    """

    metric: str
    methods: tuple[str, ...]
    ranks: tuple[float, ...]
    n: int
    excluded: int
    statistic: float
    p: float
    alpha: float
    critical_difference: float
    cliques: tuple[tuple[str, ...], ...]


def rank_methods(
    tables: Mapping[str, pd.DataFrame],
    *,
    metric: str = "dice",
    groups: Mapping[str, str] | None = None,
    alpha: float = 0.05,
) -> Ranking:
    """Average ranks over cases, with the Friedman test and groups of methods that Nemenyi's test cannot tell apart.

    Nemenyi's test is meant for methods of which the Friedman test says that they differ: where ``p`` is above
    ``alpha``, differences that the cliques show are not to be relied on.

    Args:
        tables: Method name to its per-case table, as :func:`scantly.evaluation.mean_over_seeds` makes it of the
            seeds. All must hold the same cases and classes, each once; keep the rows of one class to rank by it.
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        groups: Case to subject; cases of a subject are averaged first. None: every case stands for itself.
        alpha: Level of the critical difference, between 0 and 1.

    Returns:
        The ranking. Cases or subjects for which any method has no value are left out for all and counted: a rank
        among fewer methods is not comparable. (A missed structure does have a value, and a bad one.)

    Raises:
        RunError: if there are fewer than two methods, their cases or classes differ (the message names them), or
            there is no case that all methods have a value for.
        ConfigError: if the metric is unknown.
        ValueError: if ``alpha`` is not between 0 and 1.
    """
    scores = _scores(tables, metric, groups)
    ranks = _ranks(scores, metric)
    complete = ranks.dropna()
    if complete.empty:
        without = [str(name) for name in scores.columns if scores[name].isna().all()]
        blame = f"none at all for {', '.join(without)}" if without else "each method lacks another case"
        raise RunError(f"there is no case with a value of {metric} for every method ({blame}); rank by another metric.")
    values = complete.to_numpy(dtype=np.float64)
    n, k = values.shape
    statistic, p = friedman(values)
    averages = values.mean(axis=0)
    order = np.argsort(averages, kind="stable")
    names = tuple(str(ranks.columns[index]) for index in order)
    difference = critical_difference(k, n, alpha=alpha)
    ordered = tuple(float(averages[index]) for index in order)
    return Ranking(
        metric=metric,
        methods=names,
        ranks=ordered,
        n=n,
        excluded=len(ranks) - n,
        statistic=statistic,
        p=p,
        alpha=alpha,
        critical_difference=difference,
        cliques=tuple(tuple(names[first:last]) for first, last in cliques(ordered, difference)),
    )


def case_ranks(
    tables: Mapping[str, pd.DataFrame], *, metric: str = "dice", groups: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Rank of every method on every case.

    Values are rounded to 1e-12 first, so that the rounding errors of averaging do not break ties.

    Args:
        tables: As for :func:`rank_methods`.
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`; whether greater is better is said there.
        groups: Case to subject, or None.

    Returns:
        One row per case or subject, one column per method: 1 for the best, ties averaged. All are NaN where one
        method has no value.

    Raises:
        RunError: if there are fewer than two methods, or their cases or classes differ (the message names them).
        ConfigError: if the metric is unknown.
    """
    return _ranks(_scores(tables, metric, groups), metric)


def _scores(tables: Mapping[str, pd.DataFrame], metric: str, groups: Mapping[str, str] | None) -> pd.DataFrame:
    """Mean over classes: one row per case or subject, in the first table's order, one column per method."""
    import pandas as pd

    if len(tables) < 2:
        raise RunError(f"a ranking needs at least two methods, got {len(tables)}.")
    check_same_rows(tables)
    columns = {name: unit_means(table, metric, groups) for name, table in tables.items()}
    return pd.DataFrame(columns, index=next(iter(columns.values())).index)


def _ranks(scores: pd.DataFrame, metric: str) -> pd.DataFrame:
    import pandas as pd
    from scipy.stats import rankdata

    values = np.round(scores.to_numpy(dtype=np.float64), 12)
    signed = -values if DEFINITIONS[metric].higher_is_better else values
    ranks = rankdata(signed, axis=1, nan_policy="propagate")  # one NaN makes its whole row NaN
    return pd.DataFrame(ranks, index=scores.index, columns=scores.columns)


def friedman(ranks: NDArray[np.float64]) -> tuple[float, float]:
    """Friedman test that all methods are alike (Friedman, J. Am. Stat. Assoc. 32, 1937), corrected for ties.

    The p value is that of the chi-square distribution with ``k - 1`` degrees of freedom, which for few cases (below
    about 10) is too great. For two methods, where SciPy declines, the statistic is the square of the difference
    between wins and losses, divided by their sum, which is what the general one becomes: the sign test.

    Args:
        ranks: Ranks of ``k`` methods on ``n`` cases, ``(n, k)``, ``k`` at least 2, without NaN.

    Returns:
        Statistic and p value; 0 and 1 if all methods tie on every case.

    Raises:
        ValueError: if there is no case, or fewer than two methods.

    Example:
        >>> statistic, p = friedman(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]))
        >>> round(statistic, 3), round(p, 3)
        (4.667, 0.097)
    """
    from scipy.stats import chi2, friedmanchisquare

    if ranks.ndim != 2 or ranks.shape[0] == 0 or ranks.shape[1] < 2:
        raise ValueError(f"need ranks (cases, methods) of at least two methods, got shape {ranks.shape}.")
    if (ranks == ranks[:, :1]).all():
        return 0.0, 1.0
    if ranks.shape[1] == 2:
        signs = np.sign(ranks[:, 1] - ranks[:, 0])
        statistic = float(signs.sum() ** 2 / np.abs(signs).sum())
        return statistic, float(chi2.sf(statistic, 1))
    result = friedmanchisquare(*ranks.T)
    return float(result.statistic), float(result.pvalue)


def critical_difference(k: int, n: int, *, alpha: float = 0.05) -> float:
    """Nemenyi's critical difference of average ranks, ``q sqrt(k (k + 1) / (6 n))``.

    ``q`` is the upper ``alpha`` quantile of the studentized range of ``k`` values with infinitely many degrees of
    freedom, divided by the square root of 2 (Demšar 2006, section 3.2.2; his table 5 prints it for ``k`` to 10).

    Args:
        k: Methods, at least 2.
        n: Cases or subjects, at least 1.
        alpha: Chance of any false difference among all pairs, between 0 and 1.

    Returns:
        The difference from which on two average ranks differ at ``alpha``. It may exceed ``k - 1``; then there are
        too few cases to tell any two methods apart.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> round(critical_difference(4, 14), 2)
        1.25
    """
    from scipy.stats import studentized_range

    if k < 2 or n < 1 or not 0 < alpha < 1:
        raise ValueError(f"need k >= 2, n >= 1 and alpha in (0, 1), got {k}, {n} and {alpha}.")
    q = float(studentized_range.ppf(1 - alpha, k, np.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * n))


def cliques(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """Largest groups of neighbors in rank of which no two differ by the critical difference.

    Args:
        ranks: Average ranks in ascending order.
        difference: The critical difference; ranks that differ by exactly this do differ.

    Returns:
        First position and the one after the last, of each group with at least two members, in order. No group lies
        within another.

    Raises:
        ValueError: if the ranks are not ascending.

    Example:
        >>> cliques([1.2, 2.0, 2.6, 4.2], 1.0)
        [(0, 2), (1, 3)]
    """
    if any(after < before for before, after in pairwise(ranks)):
        raise ValueError("ranks must be in ascending order.")
    found: list[tuple[int, int]] = []
    for first, smallest in enumerate(ranks):
        last = first + sum(rank - smallest < difference for rank in ranks[first:])
        if last - first > 1 and (not found or last > found[-1][1]):
            found.append((first, last))
    return found
