"""Paired statistics between methods that were evaluated on the same cases.

The unit is the case (its mean over classes), or the subject where cases of one subject are grouped. The
statistics say how far a difference would carry over to other cases; they do not cover the spread over seeds.
Runs of several seeds are averaged first, by :func:`scantly.evaluation.compare_over_seeds`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scantly.errors import ConfigError, RunError, unknown_name
from scantly.evaluation.tables import case_means

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RESAMPLES", "bootstrap_interval", "compare_methods", "holm", "wilcoxon_p"]

RESAMPLES = 10_000
_DRAWS_AT_ONCE = 5_000_000  # 40 MB of indices, whatever the number of cases


def bootstrap_interval(
    differences: NDArray[np.float64],
    *,
    rng: np.random.Generator,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Percentile bootstrap confidence interval of the mean of paired differences.

    Args:
        differences: One difference per case, ``(n,)``, at least one.
        rng: Source of the resamples.
        confidence: Coverage aimed at, between 0 and 1.
        resamples: Number of samples of size ``n`` drawn with replacement.

    Returns:
        Lower and upper bound, in the unit of the differences. Percentile intervals are too narrow for few
        cases (below about 20).

    Raises:
        ValueError: if there is no difference, or the confidence is not between 0 and 1.
    """
    n = len(differences)
    if n == 0 or not 0 < confidence < 1:
        raise ValueError(f"need differences and a confidence in (0, 1), got {n} and {confidence}.")
    block = max(1, _DRAWS_AT_ONCE // n)
    means = [
        differences[rng.integers(0, n, size=(min(block, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, block)
    ]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def wilcoxon_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p value of the Wilcoxon signed-rank test that paired differences are symmetric about zero.

    Differences of zero say nothing about the sign and are dropped (Wilcoxon's own treatment); if all are
    zero, ``p = 1``. The null distribution is exact for up to 50 differences without ties and, by all
    permutations, for up to 13 with ties; otherwise it is the normal approximation. Differences are rounded to
    1e-12 first, so that the rounding errors of averaging make neither signs nor ranks.

    Args:
        differences: One difference per case, ``(n,)``.

    Returns:
        p value from 0 to 1.
    """
    from scipy.stats import wilcoxon

    rounded = np.round(differences, 12)
    signed = rounded[rounded != 0]
    return float(wilcoxon(signed).pvalue) if signed.size else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values of Holm's step-down procedure (Holm, Scand. J. Statist. 6, 1979).

    Rejecting where the adjusted value is at most alpha keeps the chance of any false rejection at alpha.

    Args:
        p_values: p values of all tests made together.

    Returns:
        Adjusted p values, in the same order.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare_methods(
    tables: Mapping[str, pd.DataFrame],
    *,
    metric: str = "dice",
    groups: Mapping[str, str] | None = None,
    against: str | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare every two methods on the same cases, or every method with one of them.

    Args:
        tables: Method name to its per-case table. All must hold the same cases and classes, each once.
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        groups: Case to subject. Cases of a subject (two frames of a heart) are not independent, so they are
            averaged first. None: every case stands for itself.
        against: Method that all others are compared with, and only they: fewer tests, and so a milder
            correction. None: every two methods.
        confidence: Coverage of the interval, between 0 and 1.
        resamples: Bootstrap samples.
        seed: Of the bootstrap. Each pair draws the same resamples.

    Returns:
        One row per pair ``a``, ``b`` in the order given (``b`` is ``against``, if that is given): ``metric``,
        ``n`` (cases or subjects compared), ``excluded`` (those without a value in one of the two), ``mean_a``,
        ``mean_b``, ``difference`` (mean of a - b), ``ci_low``, ``ci_high``, ``p`` (Wilcoxon signed-rank) and
        ``p_holm`` (corrected over all rows).

    Raises:
        RunError: if there are fewer than two methods, their cases or classes differ (the message names
            them), a case comes twice, or nothing can be compared.
        ConfigError: if the metric or the method ``against`` is unknown.
    """
    import pandas as pd

    if len(tables) < 2:
        raise RunError(f"a comparison needs at least two methods, got {len(tables)}.")
    if against is not None and against not in tables:
        raise ConfigError(unknown_name("method", against, tables))
    check_same_rows(tables)
    values = {name: unit_means(table, metric, groups) for name, table in tables.items()}
    pairs_of_names = combinations(values, 2) if against is None else ((a, against) for a in values if a != against)
    rows = []
    for a, b in pairs_of_names:
        pairs = pd.concat([values[a], values[b]], axis=1, join="inner", keys=["a", "b"])
        known = pairs.dropna()
        if known.empty:
            raise RunError(f"{a} and {b} have no case with a value of {metric}; compare another metric.")
        differences = (known["a"] - known["b"]).to_numpy(dtype=np.float64)
        low, high = bootstrap_interval(
            differences, rng=np.random.default_rng(seed), confidence=confidence, resamples=resamples
        )
        rows.append(
            {
                "a": a,
                "b": b,
                "metric": metric,
                "n": len(known),
                "excluded": len(pairs) - len(known),
                "mean_a": float(known["a"].mean()),
                "mean_b": float(known["b"].mean()),
                "difference": float(differences.mean()),
                "ci_low": low,
                "ci_high": high,
                "p": wilcoxon_p(differences),
            }
        )
    result = pd.DataFrame(rows)
    result["p_holm"] = holm(result["p"].tolist())
    return result


def unit_means(table: pd.DataFrame, metric: str, groups: Mapping[str, str] | None) -> pd.Series[float]:
    """Mean over classes of one metric per case, or per subject where cases are grouped; NaN if there is none."""
    means = case_means(table, metric)
    if groups is None:
        return means
    subjects = [groups.get(str(case), str(case)) for case in means.index]
    grouped: pd.Series[float] = means.groupby(subjects, sort=False).mean()
    return grouped


def check_same_rows(tables: Mapping[str, pd.DataFrame]) -> None:
    """Refuse tables that do not hold the same cases and classes, each once, with the names of those cases."""
    rows: dict[str, set[tuple[str, str]]] = {}
    for name, table in tables.items():
        listed = list(zip(table["case"], table["class"], strict=True))
        rows[name] = set(listed)
        if len(listed) != len(rows[name]):
            twice = next(row for row in listed if listed.count(row) > 1)
            raise RunError(f"{name}: case {twice[0]} has class {twice[1]} twice; give one run per method.")
    first_name, first = next(iter(rows.items()))
    for name, others in rows.items():
        unmatched = [(case, first_name, name) for case, _ in sorted(first - others)]
        unmatched += [(case, name, first_name) for case, _ in sorted(others - first)]
        if unmatched:
            listed_cases = list(dict.fromkeys(f"{case} (in {has}, not in {lacks})" for case, has, lacks in unmatched))
            more = f" and {len(listed_cases) - 5} more" if len(listed_cases) > 5 else ""
            raise RunError(
                f"methods must be evaluated on the same cases and classes, these do not match: "
                f"{', '.join(listed_cases[:5])}{more}; evaluate both on one split."
            )
