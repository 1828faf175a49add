"""Writes ``docs/methods``: a page per method, from its docstring, the catalogue, the recipes and the recorded results.

    python docs/method_pages.py

A test holds the pages to what this writes. Run it after a change to a method, a recipe, or a table of results.
"""

from __future__ import annotations

import functools
import json
import re
import runpy
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scantly.benchmark.published import LINEAGES, MEAN, METRICS, PublishedResult, published_results
from scantly.files import write_text
from scantly.methods import catalogue
from scantly.training.recipes import METHOD_SECTIONS, known_recipes, method_settings, read_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
BASELINE = "supervised"
_read = functools.cache(read_recipe)


def pages() -> dict[str, str]:
    """File name -> text of every page, the index first."""
    return {"index.md": _index(), **{f"{entry.name}.md": page(entry.name) for entry in catalogue.CATALOGUE}}


def page(name: str) -> str:
    """The page of one method, Markdown."""
    told = catalogue.describe(name)
    blocks = [
        f"# {told['title']}",
        f"`{name}` · {told['paper']}",
        _markdown(told["description"]),
        f"```console\nscantly train DATASET --method {name} --labeled 7 --out RUN\nscantly methods {name}\n```",
        *_settings(told["settings"]),
        *_recipes(name),
        *_measured(name),
        *_published(name),
        "[All methods](index.md)",
    ]
    return "\n\n".join(blocks) + "\n"


def _index() -> str:
    rows = [
        (f"[{entry.title}]({entry.name}.md)", f"`{entry.name}`", entry.paper, entry.summary)
        for entry in catalogue.CATALOGUE
    ]
    intro = (
        "One page per method, made from its docstring, the recipes and the recorded results by "
        "`python docs/method_pages.py`. What the families share: [consistency](../consistency.md), "
        "[contrast](../contrastive.md), [GapMatch](../gapmatch.md), [Diff-CL](../diffcl.md); a method of your own: "
        "[A new method](../new-method.md)."
    )
    return "\n\n".join(["# Methods", _wrapped(intro), _table(("method", "name", "paper", "idea"), rows)]) + "\n"


def _markdown(docstring: str) -> str:
    """Markdown of a docstring."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", docstring)
    return text.replace("``", "`")


def _settings(settings: dict[str, dict[str, Any]]) -> list[str]:
    if not settings:
        return ["## Settings", "None."]
    rows = [
        (f"`method.{key}`", _code(told["default"]), _cell(told["description"], told["type"]))
        for key, told in settings.items()
    ]
    return ["## Settings", _table(("setting", "default", "meaning"), rows)]


def _cell(description: str, kind: str) -> str:
    choices = [choice.strip() for choice in kind.split("|")] if "|" in kind else []
    return description + (f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else "")


def _code(value: object) -> str:
    return "none" if value is None else f"`{json.dumps(value).strip(chr(34))}`"


def _recipes(name: str) -> list[str]:
    rows = []
    for recipe in known_recipes():
        values = _read(recipe)
        kinds = {"": values, **{f", protocol {kind}": layer for kind, layer in values.get("protocols", {}).items()}}
        for kind, layer in kinds.items():
            own = layer.get("methods", {}).get(name, {})
            if own:
                rows.append((f"`{recipe}`{kind}", ", ".join(_entry(own))))
    return ["## In the recipes", _table(("recipe", "sets"), rows)] if rows else []


def _entry(values: dict[str, Any]) -> Iterator[str]:
    """An entry of ``methods``: the method's settings, then what it trains with, then what depends on the labeled."""
    for key, value in method_settings(values).items():
        yield f"`{key}={_plain(value)}`"
    for section in METHOD_SECTIONS:
        yield from (f"`{key}={_plain(value)}`" for key, value in _flat(values.get(section, {}), f"{section}."))
    for count, own in values.get("by_labeled", {}).items():
        yield f"with {count} labeled {' and '.join(_entry(own))}"


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str:
    return json.dumps(value, separators=(", ", ": ")).replace('"', "")


def _measured(name: str) -> list[str]:
    rows = [row for path in sorted(RESULTS.glob("*.json")) for row in _measured_rows(path, name)]
    if not rows:
        return ["## Measured", "Not yet in a recorded table."]
    note = (
        "Mean Dice over classes and validation cases, last iteration, mean over the seeds; beside it the baseline of "
        "the same table, since figures of two processors do not compare. What a number means: "
        "[Evaluation](../evaluation.md)."
    )
    head = ("table", "settings", "labeled", "seeds", "Dice", "supervised")
    return ["## Measured", _wrapped(note), _table(head, rows)]


def _measured_rows(path: Path, name: str) -> Iterator[tuple[str, ...]]:
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = table.get("over_seeds", [])
    baselines = {row["labeled"]: row["dice"] for row in rows if row["method"] == BASELINE}
    for row in rows:
        method, _, own = row["method"].partition(":")
        if method == name:
            form = " (before its correction)" if name in table.get("earlier_form", ()) else ""
            base = baselines.get(row["labeled"])
            yield (
                f"[{path.stem}](../../benchmarks/results/{path.name})",
                (", ".join(f"`{setting}`" for setting in own.split(",") if setting) or "the recipe's") + form,
                str(row["labeled"]),
                str(row["seeds"]),
                f"{row['dice']:.3f}",
                "" if base is None else f"{base:.3f}",
            )


def _published(name: str) -> list[str]:
    means = [row for row in published_results(name) if row.class_name == MEAN]
    if not means:
        return ["## Published", "None in the tables we ship."]
    blocks = ["## Published", _wrapped("Means over the classes. Numbers of different lineages do not compare.")]
    groups: dict[tuple[str, str], list[PublishedResult]] = {}
    for row in sorted(means, key=lambda row: row.dataset):
        groups.setdefault((row.dataset, row.lineage), []).append(row)
    for (dataset, lineage), found in groups.items():
        sources = {row.source for row in found}
        told = f"**`{dataset}`**, lineage `{lineage}`: {LINEAGES[lineage]}."
        blocks.append(_wrapped(f"{told} From {sources.pop()}." if len(sources) == 1 else told))
        blocks.append(_published_table(found, sources=len(sources) > 1))
    return blocks


def _published_table(results: Sequence[PublishedResult], *, sources: bool) -> str:
    metrics = [metric for metric in METRICS if any(row.metric == metric for row in results)]
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    notes: dict[tuple[str, str, str], list[str]] = {}
    for row in results:
        counted = row.labeled_unit[: -1 if row.labeled == 1 else None]
        labeled = f"{row.labeled:g} {'%' if row.labeled_unit == 'percent' else counted}"
        key = (labeled, row.variant, row.source)
        unit = {"%": "", "not stated": " (unit not stated)"}.get(row.unit, f" {row.unit}")
        spread = "" if row.spread is None else f" ± {row.spread:g}"
        lines.setdefault(key, {})[row.metric] = f"{row.value:.{row.decimals}f}{spread}{unit}"
        found = notes.setdefault(key, [])
        found += [note for note in row.note.split("; ") if note and note not in found]
    rows = []
    for key, cells in lines.items():
        labeled, variant, source = key
        numbers = [cells.get(metric, "") for metric in metrics]
        rows.append((labeled, variant, *numbers, source if sources else "", "; ".join(notes[key])))
    return _table(("labeled", "variant", *(METRICS[metric][0] for metric in metrics), "source", "note"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns without any entry are left out."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [index for index in range(len(head)) if any(row[index] for row in rows)]
    lines = [[head[index] for index in kept], ["---"] * len(kept), *([row[index] for index in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the pages and remove those of methods that are gone; then the pages of protocols and of agreement."""
    made = pages()
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        write_text(FOLDER / name, text)
    for script in ("protocol_page.py", "agreement_page.py"):
        runpy.run_path(str(ROOT / "docs" / script), run_name="__main__")


if __name__ == "__main__":
    main()
