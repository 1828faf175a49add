"""Which runs are seeds of one method, which methods share a table, and what they are called there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scantly.errors import RunError
from scantly.evaluation import DEFINITIONS, TOLERANCE_MM, Labeled, check_convention, mean_table
from scantly.files import digest
from scantly.methods import catalogue
from scantly.report.configs import differing_keys, flatten

if TYPE_CHECKING:
    import pandas as pd

    from scantly.training.run import Run

__all__ = ["BOUNDS", "Bound", "Method", "Result", "Section", "collect"]

Bound = Literal["lower bound", "upper bound", ""]
BOUNDS: dict[Bound, str] = {
    "lower bound": "supervised training on the labeled cases that another method here has too",
    "upper bound": "supervised training with every training case labeled",
}

# What may differ between seeds of one method: the seed, where things are, and what the seed decides.
_NOT_THE_METHOD = (
    "training.seed",
    "training.device",
    "training.log_every",
    "data.dataset",
    "data.store",
    "data.workers",
    "data.seed_labeled",
    "plan.fingerprint",
    "plan.reasons",
    "split",
)
_NAMED_DIFFERENCES = 3


@dataclass(frozen=True, eq=False)
class Result:
    """One evaluated run.

    Attributes:
        run: The run.
        name: Its folder's name, with as many parents as make it unique.
        seed: Its training seed.
        table: Per-case table of the split compared.
        summary: The summary written with it.
    """

    run: Run
    name: str
    seed: int
    table: pd.DataFrame
    summary: Mapping[str, Any]

    @property
    def anchor(self) -> str:
        """Id of the run on the page."""
        return f"run-{digest(self.name)}"


@dataclass(frozen=True, eq=False)
class Method:
    """Runs that differ in their seed only.

    Attributes:
        label: Method and number of labeled subjects, and what else tells it from the others.
        row: The same without the number: what runs with different numbers share.
        labeled: Number of labeled subjects; ``"all"`` where no training case was left unlabeled.
        bound: Whether it bounds the others from below or above.
        results: Its runs, by seed.
        table: Per-case table, each value the mean over the runs.
    """

    label: str
    row: str
    labeled: Labeled
    bound: Bound
    results: tuple[Result, ...]
    table: pd.DataFrame

    @property
    def anchor(self) -> str:
        """Id of its first run on the page."""
        return self.results[0].anchor

    @property
    def title(self) -> str:
        """The label with the bound in words."""
        return f"{self.label} ({self.bound})" if self.bound else self.label


@dataclass(frozen=True, eq=False)
class Section:
    """Methods that may share a table: one protocol kind, the same cases.

    Attributes:
        protocol: ``"clean"`` or ``"literature"``.
        split: ``"test"`` or ``"val"``.
        methods: In the order in which the runs were given.
        cases: Names of the cases, in the tables' order.
        classes: Names of the foreground classes.
        groups: Case to subject.
        unit: What a subject is called.
        flaws: Known flaws of the published procedure, literature protocol only.
        tolerance_mm: Tolerance of the normalized surface Dice in mm.
    """

    protocol: str
    split: str
    methods: tuple[Method, ...]
    cases: tuple[str, ...]
    classes: tuple[str, ...]
    groups: Mapping[str, str]
    unit: str
    flaws: tuple[str, ...]
    tolerance_mm: float

    @property
    def results(self) -> list[Result]:
        """All runs of the section."""
        return [result for method in self.methods for result in method.results]

    @property
    def subjects(self) -> int:
        """Number of independent units: subjects, whose cases belong together."""
        return len({self.groups.get(case, case) for case in self.cases})

    @property
    def has_mm(self) -> bool:
        """Whether distances in mm are known."""
        return any(bool(result.table["hd95_mm"].notna().any()) for result in self.results)


def collect(runs: Sequence[Run], split: str | None = None, *, rows: Mapping[Path, str] | None = None) -> list[Section]:
    """Sort runs into sections and methods.

    Args:
        runs: Evaluated runs, each once.
        split: ``"test"`` or ``"val"``; ``None``: test if all runs were evaluated on it, else val.
        rows: Run folder to what its method is to be called; ``None``: as method and settings say.

    Returns:
        One section per protocol kind, in the order of the runs.

    Raises:
        RunError: if there is no run, one comes twice or was not evaluated, or runs of one protocol kind were
            evaluated on different cases or classes, or a table was scored by another convention for empty masks.
    """
    if not runs:
        raise RunError("there is nothing to compare; give at least one run folder.")
    folders = [run.folder.resolve() for run in runs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise RunError(f"{folder} is given twice; give every run once.")
    chosen = _choose_split(runs, split)
    names = _unique_names(folders)
    results = [_read(run, name, chosen) for run, name in zip(runs, names, strict=True)]
    by_protocol: dict[str, list[Result]] = {}
    for result in results:
        by_protocol.setdefault(_protocol(result.run), []).append(result)
    named = {folder.resolve(): row for folder, row in (rows or {}).items()}
    return [_section(protocol, chosen, members, named) for protocol, members in by_protocol.items()]


def _choose_split(runs: Sequence[Run], split: str | None) -> str:
    if split is not None and split not in ("test", "val"):
        raise RunError(f"unknown split '{split}'; choose test or val.")
    candidates = ("test", "val") if split is None else (split,)
    lacking = {name: [run for run in runs if run.evaluation(name) is None] for name in candidates}
    for name in candidates:
        if not lacking[name]:
            return name
    wanted = min(candidates, key=lambda name: len(lacking[name]))  # the one that most runs have
    folder = lacking[wanted][0].folder
    option = f" --split {wanted}" if split or len(lacking[wanted]) < len(runs) else ""
    where = f" on '{wanted}'" if option else ""
    raise RunError(f"{folder} has not been evaluated{where}; run scantly evaluate {folder}{option} first.")


def _unique_names(folders: Sequence[Path]) -> list[str]:
    depth = 1
    longest = max(len(folder.parts) for folder in folders)
    while depth < longest:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1
    return [str(folder) for folder in folders]


def _protocol(run: Run) -> str:
    return str(run.config.get("evaluation", {}).get("protocol", "clean"))


def _read(run: Run, name: str, split: str) -> Result:
    table = run.evaluation(split)
    if table is None or table.empty:
        raise RunError(f"{run.folder} has no evaluated cases; run scantly evaluate {run.folder} first.")
    missing = [column for column in ("case", "class", "status", *DEFINITIONS) if column not in table.columns]
    if missing:
        raise RunError(
            f"the table of {run.folder} lacks the columns {', '.join(missing)}; run scantly evaluate "
            f"{run.folder} again."
        )
    check_convention(table, "literature" if _protocol(run) == "literature" else "clean", f"{run.folder}, {split} cases")
    seed = int(run.config.get("training", {}).get("seed", 0))
    return Result(run=run, name=name, seed=seed, table=table, summary=run.summary(split))


def _section(protocol: str, split: str, results: Sequence[Result], rows: Mapping[Path, str]) -> Section:
    first = results[0]
    for other in results[1:]:
        _refuse_other_cases(first, other)
    flaws = [flaw for result in results for flaw in result.run.config.get("evaluation", {}).get("flaws", ())]
    described = first.run.config.get("split", {})
    tolerances = {float(result.summary.get("tolerance_mm", TOLERANCE_MM)) for result in results}
    if len(tolerances) > 1:
        listed = ", ".join(f"{value:g}" for value in sorted(tolerances))
        raise RunError(f"the runs were evaluated with different surface tolerances ({listed} mm); evaluate again.")
    return Section(
        protocol=protocol,
        split=split,
        methods=_methods(results, rows),
        cases=tuple(dict.fromkeys(first.table["case"])),
        classes=tuple(dict.fromkeys(first.table["class"])),
        groups=described.get("groups", {}),
        unit=str(described.get("unit", "subject")),
        flaws=tuple(dict.fromkeys(flaws)) if protocol == "literature" else (),
        tolerance_mm=tolerances.pop(),
    )


def _refuse_other_cases(first: Result, other: Result) -> None:
    ours, theirs = (set(zip(result.table["case"], result.table["class"], strict=True)) for result in (first, other))
    for here, there, rows in ((first, other, ours - theirs), (other, first, theirs - ours)):
        if rows:
            case, name = min(rows)
            raise RunError(
                f"{here.run.folder} and {there.run.folder} were evaluated on different cases: {case} "
                f"({name}) is only in the first, one of {len(rows)} such rows; compare runs that share them."
            )


def _methods(results: Sequence[Result], rows: Mapping[Path, str]) -> tuple[Method, ...]:
    members: dict[str, list[Result]] = {}
    for result in results:
        row = rows.get(result.run.folder.resolve(), "")
        members.setdefault(digest([row, _identity(result.run.config)]), []).append(result)
    groups = list(members.values())
    configs = [group[0].run.config for group in groups]
    named = [rows.get(group[0].run.folder.resolve()) for group in groups]
    titles = [row or title for row, title in zip(named, _rows(configs), strict=True)]
    if all(named):
        labels = [f"{row}, {_count(config)} labeled" for row, config in zip(titles, configs, strict=True)]
    else:
        labels = _labels(configs, [group[0].name for group in groups])
    bounds = _bounds([group[0].run.config for group in groups])
    return tuple(
        Method(
            label=label,
            row=row,
            labeled=_labeled(group[0].run.config) if group[0].run.config.get("split", {}).get("unlabeled") else "all",
            bound=bound,
            results=tuple(sorted(group, key=lambda result: result.seed)),
            table=group[0].table if len(group) == 1 else mean_table([result.table for result in group]),
        )
        for label, row, bound, group in zip(labels, titles, bounds, groups, strict=True)
    )


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(config)
    kept = {
        key: value
        for key, value in flat.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _NOT_THE_METHOD)
    }
    return kept | {"labeled subjects": _labeled(config)}


def _labeled(config: Mapping[str, Any]) -> int:
    split = config.get("split", {})
    groups = split.get("groups", {})
    return len({groups.get(case, case) for case in split.get("labeled", ())})


def _count(config: Mapping[str, Any]) -> str:
    return str(_labeled(config)) if config.get("split", {}).get("unlabeled") else f"all {_labeled(config)}"


def _rows(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Titles of methods, followed by settings where methods of one title differ in more than their labeled count."""
    titles = [_title(config) for config in configs]
    rows = list(titles)
    for title in set(titles):
        alike = [index for index, other in enumerate(titles) if other == title]
        identities = [_identity(configs[index]) for index in alike]
        keys = [key for key in differing_keys(identities) if not key.startswith(("labeled ", "data.labeled"))]
        for index, identity in zip(alike, identities, strict=True):
            said = [f"{key.rpartition('.')[2]} {identity.get(key, 'unset')}" for key in keys[:_NAMED_DIFFERENCES]]
            rows[index] = ", ".join([title, *said])
    return rows


def _title(config: Mapping[str, Any]) -> str:
    method, known = str(config["method"]["name"]), catalogue.methods()
    return known[method].title if method in known else method


def _labels(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    bases = [f"{_title(config)}, {_count(config)} labeled" for config in configs]
    labels = list(bases)
    for base in set(bases):
        alike = [index for index, other in enumerate(bases) if other == base]
        if len(alike) == 1:
            continue
        keys = differing_keys([_identity(configs[index]) for index in alike])[:_NAMED_DIFFERENCES]
        for index in alike:
            values = _identity(configs[index])
            said = ", ".join(f"{key.rpartition('.')[2]} {values.get(key, 'unset')}" for key in keys)
            labels[index] = f"{base}, {said}"
    for index, label in enumerate(labels):  # values too long or too alike to tell them apart
        if labels.count(label) > 1:
            labels[index] = f"{label} ({names[index]})"
    return labels


def _bounds(configs: Sequence[Mapping[str, Any]]) -> list[Bound]:
    others = {
        frozenset(config.get("split", {}).get("labeled", ()))
        for config in configs
        if config["method"]["name"] != "supervised"
    }
    bounds: list[Bound] = []
    for config in configs:
        split = config.get("split", {})
        if config["method"]["name"] != "supervised":
            bounds.append("")
        elif frozenset(split.get("labeled", ())) in others:
            bounds.append("lower bound")
        else:
            bounds.append("" if split.get("unlabeled") else "upper bound")
    return bounds
