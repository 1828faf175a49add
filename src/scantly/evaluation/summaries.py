"""What a benchmark says of many runs: methods by labeled counts by seeds, summarized and compared.

Two spreads that must not be mixed up: over **seeds**, how far another training of the same method may end elsewhere;
over **cases**, how far the method does better on one patient than on another. Averages are taken over cases first, per
class, then over classes, then over seeds, as the literature does; standard deviations are those of a sample
(``n - 1``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Literal

from scantly.errors import ConfigError, RunError, unknown_name
from scantly.evaluation.statistics import RESAMPLES, check_same_rows, compare_methods
from scantly.evaluation.tables import COUNTS, DEFINITIONS

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "OVERALL",
    "Labeled",
    "ScoredRun",
    "compare_over_seeds",
    "mean_over_seeds",
    "mean_table",
    "summarize_runs",
]

Labeled = int | Literal["all"]

OVERALL = "mean over classes"
"""What stands in the column ``class`` of an average over the foreground classes."""

_STATUSES = tuple(COUNTS)[2:]


@dataclass(frozen=True, eq=False)
class ScoredRun:
    """Per-case table of one run, and what it is a run of.

    Attributes:
        method: Name of the method as it shall be shown.
        labeled: Number of labeled subjects, at least 1; ``"all"`` where no training case was left unlabeled.
        seed: Training seed.
        table: Per-case table (:func:`scantly.evaluation.make_table`).

    Raises:
        ValueError: if ``labeled`` is neither a positive number nor ``"all"``.
    """

    method: str
    labeled: Labeled
    seed: int
    table: pd.DataFrame

    def __post_init__(self) -> None:
        if self.labeled != "all" and not _is_count(self.labeled):
            raise ValueError(f"labeled is a number of subjects from 1 on, or 'all', got {self.labeled!r}.")

    @property
    def setting(self) -> tuple[str, Labeled]:
        """Method and labeled count: what the seeds of one thing share."""
        return self.method, self.labeled


def summarize_runs(
    runs: Sequence[ScoredRun],
    *,
    groups: Mapping[str, str] | None = None,
    metrics: Sequence[str] = tuple(DEFINITIONS),
) -> pd.DataFrame:
    """Means and spreads of many runs: one row per method, labeled count, class and metric.

    Args:
        runs: Any methods, labeled counts and seeds, all evaluated on the same cases by one protocol.
        groups: Case to subject. Cases of a subject are averaged first, so that means and ``std_over_cases`` are over
            subjects. None: every case stands for itself, as in published tables.
        metrics: Columns of :data:`scantly.evaluation.DEFINITIONS`.

    Returns:
        Methods in the order given, labeled counts ascending (``"all"`` last), classes in the tables' order and then
        :data:`OVERALL`, metrics in order. Columns:

        - ``method``, ``labeled``, ``class``, ``metric``;
        - ``mean``: over cases, for :data:`OVERALL` then over classes, then over seeds;
        - ``std_over_seeds``: of the seeds' means, NaN for one seed;
        - ``std_over_cases``: of the cases' means over seeds (:data:`OVERALL`: and over classes), NaN for one case;
        - ``seeds``: number of runs; ``cases``: number of cases; ``units``: of subjects, or cases without ``groups``;
        - ``averaged``: how many units have a value, in at least one seed;
        - ``scored``, ``missed``, ``spurious``, ``both_empty``: cases by status (:data:`scantly.evaluation.COUNTS`),
          added up over seeds, and for :data:`OVERALL` over classes.

        Values are in the unit of the metric. NaN (both masks empty, clean convention) is left out of each mean in turn.

    Raises:
        RunError: if there is no run, one has no rows, a method has a labeled count and seed twice, or runs have
            different cases or classes (the message names them).
        ConfigError: if a metric is unknown.
    """
    import pandas as pd

    stacked = stack_tables(runs, groups, metrics)
    keys, names = ["setting", "class"], list(dict.fromkeys(metrics))
    seeds = seed_means(stacked, names).groupby(keys, sort=False)[names]
    cases = _unit_values(stacked, names).groupby(keys, sort=False)[names]
    columns = {
        "mean": seeds.mean(),
        "std_over_seeds": seeds.std(),
        "std_over_cases": cases.std(),
        "averaged": cases.count(),
    }
    classes = [*dict.fromkeys(stacked["class"]), OVERALL]
    counts = _status_counts(stacked)
    settings = ordered_settings(runs)
    rows = []
    for number, (method, labeled) in enumerate(settings):
        described = {
            "seeds": sum(run.setting == (method, labeled) for run in runs),
            "cases": stacked["case"].nunique(),
            "units": stacked["unit"].nunique(),
        }
        for name in classes:
            place = (number, name)
            rows += [
                {"method": method, "labeled": labeled, "class": name, "metric": metric}
                | {column: wide.at[place, metric] for column, wide in columns.items()}
                | described
                | counts[place]
                for metric in names
            ]
    order = ["method", "labeled", "class", "metric", "mean", "std_over_seeds", "std_over_cases"]
    return pd.DataFrame(rows)[[*order, "seeds", "cases", "units", "averaged", *_STATUSES]]


def mean_over_seeds(runs: Sequence[ScoredRun]) -> dict[str, pd.DataFrame]:
    """Per-case tables of which each value is the mean over the seeds, for tests between methods.

    Args:
        runs: Any methods, labeled counts and seeds, all evaluated on the same cases.

    Returns:
        Name to table (``case``, ``class`` and the metrics). The name is the method's; where the runs differ in their
        labeled counts it is followed by the count. A value that some seeds lack (both masks empty, clean convention) is
        the mean of the others.

    Raises:
        RunError: as :func:`summarize_runs`.
    """
    _check_runs(runs)
    return {name: mean_table([run.table for run in members]) for name, members in _by_name(runs).items()}


def compare_over_seeds(
    runs: Sequence[ScoredRun],
    *,
    metric: str = "dice",
    groups: Mapping[str, str] | None = None,
    against: str | None = None,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Paired comparison of methods that have several seeds.

    Each case is averaged over the seeds first: runs of other seeds saw the same cases, so their values of one case are
    not independent samples of cases. Counting each would make intervals too narrow, by up to the square root of the
    number of seeds, and p values too small. What is compared is the mean over trainings of a method; the spread over
    seeds is told by :func:`summarize_runs`.

    Args:
        runs: Runs of at least two methods or labeled counts, all evaluated on the same cases.
        metric: Column of :data:`scantly.evaluation.DEFINITIONS`.
        groups: Case to subject; cases of a subject are averaged first. None: every case stands for itself.
        against: Name (:func:`mean_over_seeds`) that all others are compared with. None: every two.
        confidence: Coverage of the bootstrap interval, between 0 and 1.
        resamples: Bootstrap samples.
        seed: Of the bootstrap.

    Returns:
        The columns of :func:`scantly.evaluation.compare_methods`, then ``seeds_a`` and ``seeds_b`` (numbers of runs)
        and ``note``, a sentence where the two do not have the same seeds, else empty. Such a pair is compared all the
        same; with fewer seeds a mean is less certain, which neither interval nor p value covers.

    Raises:
        RunError: as :func:`summarize_runs` and :func:`scantly.evaluation.compare_methods`.
        ConfigError: if the metric or the name ``against`` is unknown.
    """
    result = compare_methods(
        mean_over_seeds(runs),
        metric=metric,
        groups=groups,
        against=against,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    seeds = {name: sorted(run.seed for run in members) for name, members in _by_name(runs).items()}
    result["seeds_a"] = [len(seeds[name]) for name in result["a"]]
    result["seeds_b"] = [len(seeds[name]) for name in result["b"]]
    result["note"] = [_seed_note(a, b, seeds) for a, b in zip(result["a"], result["b"], strict=True)]
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1  # NumPy's integers too, as tables yield them


def ordered_settings(runs: Sequence[ScoredRun]) -> list[tuple[str, Labeled]]:
    """Methods in the order given, each with its labeled counts: ascending, ``"all"`` last."""
    methods = list(dict.fromkeys(run.method for run in runs))

    def place(setting: tuple[str, Labeled]) -> tuple[int, float]:
        method, labeled = setting
        return methods.index(method), math.inf if labeled == "all" else labeled

    return sorted({run.setting for run in runs}, key=place)


def _by_name(runs: Sequence[ScoredRun]) -> dict[str, list[ScoredRun]]:
    one_count = len({run.labeled for run in runs}) == 1
    named: dict[str, list[ScoredRun]] = {}
    for method, labeled in ordered_settings(runs):
        name = method if one_count else f"{method}, {labeled} labeled"
        named[name] = [run for run in runs if run.setting == (method, labeled)]
    return named


def _check_runs(runs: Sequence[ScoredRun]) -> None:
    if not runs:
        raise RunError("there is no run to summarize; give at least one.")
    tables: dict[str, pd.DataFrame] = {}
    for run in runs:
        name = f"{run.method} with {run.labeled} labeled, seed {run.seed}"
        if name in tables:
            raise RunError(f"{name} is given twice; give every run once.")
        if run.table.empty:
            raise RunError(f"{name} has no rows; evaluate at least one case with a label.")
        tables[name] = run.table
    check_same_rows(tables)


def stack_tables(runs: Sequence[ScoredRun], groups: Mapping[str, str] | None, metrics: Sequence[str]) -> pd.DataFrame:
    """All tables below one another, with ``setting`` (position in :func:`ordered_settings`), ``seed`` and ``unit``."""
    import pandas as pd

    _check_runs(runs)
    for metric in metrics:
        if metric not in DEFINITIONS:
            raise ConfigError(unknown_name("metric", metric, DEFINITIONS))
    settings = ordered_settings(runs)
    tables = [
        run.table[["case", "class", "status", *dict.fromkeys(metrics)]].assign(
            setting=settings.index(run.setting), seed=run.seed
        )
        for run in runs
    ]
    stacked = pd.concat(tables, ignore_index=True)
    units = {case: case if groups is None else groups.get(str(case), str(case)) for case in set(stacked["case"])}
    stacked["unit"] = stacked["case"].map(units)
    return stacked


def seed_means(stacked: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Mean over units of each class, and over classes, of every run: ``setting``, ``seed``, ``class``, metrics."""
    import pandas as pd

    units = stacked.groupby(["setting", "seed", "class", "unit"], sort=False)[metrics].mean()
    classes = units.groupby(["setting", "seed", "class"], sort=False).mean()
    overall = classes.groupby(["setting", "seed"], sort=False).mean()
    return pd.concat([classes.reset_index(), overall.reset_index().assign(**{"class": OVERALL})], ignore_index=True)


def _unit_values(stacked: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """Mean over seeds of each unit, by class and over classes: ``setting``, ``class``, ``unit``, metrics."""
    import pandas as pd

    cases = stacked.groupby(["setting", "class", "unit", "case"], sort=False)[metrics].mean()
    classes = cases.groupby(["setting", "class", "unit"], sort=False).mean()
    over_classes = cases.groupby(["setting", "unit", "case"], sort=False).mean()
    overall = over_classes.groupby(["setting", "unit"], sort=False).mean()
    return pd.concat([classes.reset_index(), overall.reset_index().assign(**{"class": OVERALL})], ignore_index=True)


def _status_counts(stacked: pd.DataFrame) -> dict[tuple[int, str], dict[str, int]]:
    counts: dict[tuple[int, str], dict[str, int]] = {}
    for setting, rows in stacked.groupby("setting", sort=False):
        number = int(str(setting))
        counts[number, OVERALL] = _statuses(rows)
        for name, members in rows.groupby("class", sort=False):
            counts[number, str(name)] = _statuses(members)
    return counts


def _statuses(rows: pd.DataFrame) -> dict[str, int]:
    return {status: int((rows["status"] == status).sum()) for status in _STATUSES}


def mean_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Per-case means of the tables of several seeds; a value that some lack (NaN) is that of the others.

    Args:
        tables: Per-case tables of the same cases.

    Returns:
        Columns ``case``, ``class`` and the metrics.
    """
    import pandas as pd

    stacked = pd.concat(tables, ignore_index=True)
    return stacked.groupby(["case", "class"], sort=False, as_index=False)[list(DEFINITIONS)].mean()


def _seed_note(a: str, b: str, seeds: Mapping[str, list[int]]) -> str:
    if seeds[a] == seeds[b]:
        return ""
    said = [f"{name} has {_listed(seeds[name])}" for name in (a, b)]
    return " and ".join(said) + "."


def _listed(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(seed) for seed in seeds)}"
