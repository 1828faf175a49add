"""The page itself: gather, draw, fill the template, write one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from scantly._version import __version__
from scantly.arguments import HasFolder, checked
from scantly.evaluation import CONVENTIONS, DEFINITIONS
from scantly.files import write_text
from scantly.report.board import board, published_rows
from scantly.report.configs import as_yaml, differences
from scantly.report.groups import BOUNDS, Method, Section, collect
from scantly.report.plots import COLORS, DASHES, Plot, curves, distributions
from scantly.report.slices import examples
from scantly.report.tables import (
    Column,
    Row,
    case_table,
    class_tables,
    columns,
    gains,
    overview,
    statistics,
)

if TYPE_CHECKING:
    from scantly.training.run import Run

    AnyRun = Run
else:  # a run is known by its folder: importing the report does not import torch
    AnyRun = Annotated[HasFolder, "a run"]

__all__ = ["Extras", "compare", "open_run", "write_page"]

_CLASS_COLORS = ("#35c8f5", "#ffc93c", "#ff5d8f", "#7be07b", "#c39bff", "#ff9a4d", "#5ff0d0", "#e6e65a")

#: Above this number of runs configurations are shown once per method, pairs are not compared, examples are few.
_MANY_RUNS = 12

_FEW = 20  # independent units below which percentile intervals are known to be too narrow


@dataclass(frozen=True)
class _Legend:
    """How a method looks in the plots: its title, color number and line pattern."""

    title: str
    color: int
    dash: str


@checked(runs="['runs/a', 'runs/b']")
def compare(runs: Sequence[AnyRun | str | Path], out: str | Path = "report.html", *, split: str | None = None) -> Path:
    """Compare evaluated runs on one self-contained HTML page.

    Runs that differ in their seed only are aggregated; runs of different protocol kinds get separate sections
    and are never put in one table. The page needs no network and no other file, and equal runs give an equal
    page.

    Args:
        runs: Evaluated runs or their folders, each once.
        out: The HTML file to write.
        split: ``"test"`` or ``"val"``; ``None``: test if all runs were evaluated on it, else val.

    Returns:
        ``out``.

    Raises:
        RunError: if a run was not evaluated, runs of one protocol kind were evaluated on different cases, or
            the page cannot be written.
    """
    opened = [open_run(run) for run in runs]
    write_page(collect(opened, split), Path(out))
    return Path(out)


@dataclass(frozen=True)
class Extras:
    """What a benchmark knows beyond its runs.

    Attributes:
        title: Of the page; empty: from the methods.
        about: One sentence below it.
        names: Name of each section's dataset.
        costs: Rows of each section's table of costs.
        failed: Cells that failed, with their reasons.
        open_cells: Number of cells that are not done.
    """

    title: str = ""
    about: str = ""
    names: Sequence[str] = ()
    costs: Sequence[Sequence[Mapping[str, str]]] = ()
    failed: Sequence[tuple[str, str]] = ()
    open_cells: int = 0


def write_page(sections: Sequence[Section], out: Path, extras: Extras | None = None) -> None:
    """Write the page of some sections.

    Args:
        sections: From :func:`~scantly.report.groups.collect`.
        out: The HTML file.
        extras: What a benchmark adds.
    """
    more = extras or Extras()
    results = [result for section in sections for result in section.results]
    first = {method.results[0] for section in sections for method in section.methods}
    described = len(results) <= _MANY_RUNS
    page = (
        _environment()
        .get_template("template.html.j2")
        .render(
            title=more.title or _title(sections),
            about=more.about,
            failed=list(more.failed),
            open_cells=more.open_cells,
            version=__version__,
            kinds={section.protocol for section in sections},
            datasets=list(dict.fromkeys(str(r.run.config.get("data", {}).get("dataset", "?")) for r in results)),
            sections=[
                _section(section) | {key: _at(values, number) for key, values in _of_sections(more).items()}
                for number, section in enumerate(sections)
            ],
            differences=differences([result.run for result in results]) if 1 < len(results) <= _MANY_RUNS else [],
            differences_shown=described,
            results=[
                {
                    "name": result.name,
                    "anchor": result.anchor,
                    "folder": str(result.run.folder),
                    "link": _link(result.run.folder, out.parent),
                    "config": as_yaml(result.run.config) if described or result in first else "",
                    "environment": as_yaml(result.run.environment) if described or result in first else "",
                }
                for result in results
            ],
            class_color=_class_color,
        )
    )
    write_text(out, page)


def _of_sections(extras: Extras) -> dict[str, Sequence[Any]]:
    return {"name": extras.names, "costs": extras.costs}


def _at(values: Sequence[Any], number: int) -> Any:
    return values[number] if number < len(values) else None


def _link(folder: Path, page: Path) -> str:
    """The folder as seen from the page, where it lies below it; else nothing, since pages travel."""
    try:
        return quote(folder.resolve().relative_to(page.resolve()).as_posix())
    except ValueError:
        return ""


def open_run(run: Run | str | Path) -> Run:
    """A run by itself or by its folder."""
    if isinstance(run, str | Path):
        from scantly.training.run import Run as RunFolder

        return RunFolder.open(run)
    return run


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("scantly.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _class_color(number: int) -> str:
    """Color of a foreground class, counted from 0; bright enough for lines on a gray scan."""
    return _CLASS_COLORS[number % len(_CLASS_COLORS)]


def _title(sections: Sequence[Section]) -> str:
    names = list(dict.fromkeys(method.label.partition(",")[0] for section in sections for method in section.methods))
    if len(names) == 1:
        return names[0]
    if len(names) > 4:
        return f"{len(names)} methods compared"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _section(section: Section) -> dict[str, Any]:
    overview_columns, overview_rows = overview(section)
    class_columns, classes = class_tables(section)
    many = len(section.results) > _MANY_RUNS
    return {
        "protocol": section.protocol,
        "about": _protocol_sentence(section),
        "selection": _selection_sentence(section),
        "split": section.split,
        "cases": len(section.cases),
        "subjects": section.subjects,
        "unit": section.unit,
        "flaws": section.flaws,
        "bounds": {method.bound: BOUNDS[method.bound] for method in section.methods if method.bound},
        "no_lower_bound": _lacks_lower_bound(section),
        "labeled_differs": [method.title for method in section.methods if _labeled_differ(method)],
        "several_seeds": any(len(method.results) > 1 for method in section.methods),
        "legend": [
            _Legend(method.title, number % COLORS, DASHES[number % len(DASHES)])
            for number, method in enumerate(section.methods)
        ],
        "overview_columns": overview_columns,
        "overview": overview_rows,
        "gains": gains(section) if not many else [],
        "class_heads": _heads(class_columns),
        "class_columns": class_columns,
        "classes": classes,
        "best_marked": _any_best(overview_rows),
        "definitions": [(column, _definition(column, section)) for column in columns(section)],
        "has_mm": section.has_mm,
        "empty_masks": CONVENTIONS["literature" if section.protocol == "literature" else "clean"],
        "board": board(section),
        "published": published_rows(section),
        "statistics": statistics(section) if not many else [],
        "few": min(section.subjects, _FEW) < _FEW,
        "distributions": _by_subject(distributions(section)),
        "curves": [_drawn(plot) for plot in curves(section)],
        "examples": [_run_examples(section, number) for number in _shown_examples(section, many=many)],
        "class_names": section.classes,
        "case_rows": case_table(section),
        "case_heads": [method.title for method in section.methods],
    }


def _protocol_sentence(section: Section) -> str:
    if section.protocol == "literature":
        return (
            "This follows the procedure of the published code, its known flaws included, so that numbers can "
            "be held against published tables."
        )
    return (
        "Labels of the evaluated cases were not used before the end of training, neither to choose a "
        "checkpoint nor to crop."
    )


def _selection_sentence(section: Section) -> str:
    meant = {
        "last": "of the last iteration",
        "best": "of the iteration with the best Dice on validation cases",
    }
    rules = [str(result.run.config.get("evaluation", {}).get("selection", "last")) for result in section.results]
    said = [meant.get(rule, rule) for rule in dict.fromkeys(rules)]
    if len(said) == 1:
        return f"All weights are {said[0]}."
    return f"Weights are {' or '.join(said)}; the configurations below say which run has which."


def _lacks_lower_bound(section: Section) -> bool:
    bounds = {method.bound for method in section.methods}
    only_supervised = all(method.results[0].run.config["method"]["name"] == "supervised" for method in section.methods)
    return "lower bound" not in bounds and not only_supervised


def _labeled_differ(method: Method) -> bool:
    labeled = {frozenset(result.run.config.get("split", {}).get("labeled", ())) for result in method.results}
    return len(labeled) > 1


def _any_best(rows: Sequence[Row]) -> bool:
    return any(cell.best for row in rows for cell in row.cells)


def _heads(shown: Sequence[Column]) -> list[tuple[str, int]]:
    """Titles of the first head line, each with the number of unit columns below it."""
    titles = list(dict.fromkeys(column.title for column in shown))
    return [(title, sum(column.title == title for column in shown)) for title in titles]


def _definition(column: Column, section: Section) -> str:
    text = DEFINITIONS[column.metric].text
    return text.replace("the tolerance in mm named with the table", f"{section.tolerance_mm:g} mm")


def _by_subject(plots: Sequence[Plot]) -> list[list[dict[str, Any]]]:
    """Plots of one metric together, each metric in its own row of the page."""
    subjects = dict.fromkeys(plot.subject for plot in plots)
    return [[_drawn(plot) for plot in plots if plot.subject == subject] for subject in subjects]


def _drawn(plot: Plot) -> dict[str, Any]:
    return {"title": plot.title, "description": plot.description, "svg": Markup(plot.svg)}


def _shown_examples(section: Section, *, many: bool) -> list[int]:
    """Numbers of the runs whose slices are shown; of many runs the first of each method with the fewest labels."""
    if not many:
        return list(range(len(section.results)))
    fewest = min((method.labeled for method in section.methods if method.labeled != "all"), default="all")
    firsts = [method.results[0] for method in section.methods if method.labeled == fewest]
    return [number for number, result in enumerate(section.results) if result in firsts]


def _run_examples(section: Section, number: int) -> dict[str, Any]:
    result = section.results[number]
    shown, missing = examples(result, section.split)
    method = next(method for method in section.methods if result in method.results)
    return {
        "title": f"{method.title}, {result.name}",
        "open": method.results[0] is result and len(section.results) <= _MANY_RUNS,  # further seeds unfold
        "examples": shown,
        "missing": missing,
    }
