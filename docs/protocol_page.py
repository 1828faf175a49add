"""Writes ``docs/protocols.md``: a section per recipe, from the recipes.

    python docs/protocol_page.py

A test holds the page to what this writes. Run it after a change to a recipe; ``docs/method_pages.py`` runs it too.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from scantly.files import write_text
from scantly.methods import catalogue
from scantly.settings import merge
from scantly.training.config import TrainingSection
from scantly.training.recipes import METHOD_SECTIONS, Cohort, known_recipes, read_cohort, read_recipe, section_layer

PAGE = Path(__file__).with_name("protocols.md")
KINDS = {
    "clean": "no test label is looked at before the end; a flaw named below is repeated only where a deviation says so",
    "literature": "the published procedure, with its flaws; for comparison with published tables, nothing else",
}
INTRODUCTION = (
    "A recipe fixes how a data set is prepared, split, trained on and tested, and the published settings of the "
    "methods for it ([Configuration](configuration.md#recipes)). This page is made from the recipes by "
    "`python docs/protocol_page.py`. Numbers of different protocols, kinds or lineages do not belong in one table.",
    "Each protocol comes in two kinds ([Configuration](configuration.md#protocol-kinds)). In `clean`, the default, all "
    "methods train equally long, on the same batches, with one network and one optimizer unless optimizers or batches "
    "are part of the method; their weights and ramps are the published ones. In `literature` each trains as it was "
    "published, where that is known. `--steps N` shortens any of them: ramps, stages, schedules and the intervals of "
    "validations and checkpoints keep their proportions; averages over time (EMA) and queues keep their length. The "
    "run's `config.yaml` has the length of the recipe as `training.published_steps`.",
    "Empty masks are scored by the kind ([Evaluation](evaluation.md#empty-masks)): a class in neither prediction nor "
    "reference is left out and counted in `clean`, and counts 0 in every metric in `literature`, as in public scripts.",
    "What a paper does not say had to be chosen; such choices are among the deviations. What a method does otherwise "
    "than its public code whatever the data, and its settings in every recipe, is on [its page](methods/index.md).",
)


def page() -> str:
    """The page, Markdown."""
    recipes = {name: read_recipe(name) for name in known_recipes()}
    blocks = ["# Protocols", *map(_wrapped, INTRODUCTION), _overview(recipes)]
    for name, recipe in recipes.items():
        blocks += _section(name, recipe)
    return "\n\n".join(blocks) + "\n"


def _overview(recipes: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, recipe in recipes.items():
        cohort = read_cohort(recipe)
        labeled = "" if cohort is None else f"{', '.join(map(str, cohort.labeled))} {cohort.unit}s"
        rows.append((f"[`{name}`](#{name})", f"{recipe['plan']['spatial_dims']}D", labeled, _kinds(recipe)))
    return _table(("recipe", "", "labeled", "kinds"), rows)


def _section(name: str, recipe: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {name}"
    yield _wrapped(f"**{recipe['title']}.** {recipe['description']}")
    cohort = read_cohort(recipe)
    if cohort is not None:
        yield _data(cohort)
    yield _table(("", "trained with"), _training(recipe))
    for kind in recipe.get("protocols", {}):
        yield from _kind(kind, recipe)
    deviations = recipe.get("deviations", [])
    if deviations:
        yield "\n".join(["Deviations from what is published:", "", *map(_item, deviations)])
    yield f"```console\n{_commands(name, recipe)}\n```"


def _data(cohort: Cohort) -> str:
    rows = [
        ("source", cohort.source),
        ("dataset folder", cohort.folder),
        ("split", cohort.split),
        *((f"`--labeled {count}`", which) for count, which in cohort.labeled.items()),
        ("published metrics", cohort.metrics),
    ]
    return _table(("", "data"), rows)


def _training(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    plan, network = recipe["plan"], recipe.get("network", {})
    training = TrainingSection(**recipe["training"])
    arguments = ", ".join(f"{key} {_plain(value)}" for key, value in network.get("arguments", {}).items())
    rate = {"poly": f"poly, power {training.power:g}", "step": f"times {training.gamma:g} after each milestone"}
    optimizer = {"sgd": f"SGD, momentum {training.momentum:g}", "adam": "Adam", "adamw": "AdamW"}[training.optimizer]
    unit = "pixels (y, x)" if _flat(plan) else "voxels (z, y, x)"
    yield "patch", f"{' x '.join(map(str, plan['patch_size']))} {unit}"
    yield "rows", f"{plan['labeled_batch_size']} labeled and {plan['unlabeled_batch_size']} unlabeled per step"
    yield "network", f"`{network.get('name', 'unet' if _flat(plan) else 'vnet')}`" + (arguments and f", {arguments}")
    yield "optimizer", f"{optimizer}, weight decay {training.weight_decay:g}"
    yield "learning rate", f"{training.lr:g}, {rate.get(training.schedule, training.schedule)}"
    yield "length", f"{training.steps:,} iterations"


def _flat(plan: Mapping[str, Any]) -> bool:
    return bool(plan["spatial_dims"] == 2)


def _kind(kind: str, recipe: Mapping[str, Any]) -> Iterator[str]:
    variant = recipe["protocols"][kind]
    own = {key: value for key, value in variant.items() if key != "methods"}
    flaws = section_layer(recipe, kind).get("evaluation", {}).get("flaws", [])
    settings = [text for text in _settings(own) if not text.startswith("`evaluation.flaws")]
    changed = f" Beside what is above: {', '.join(settings)}." if settings else ""
    yield _wrapped(f"`{kind}`: {KINDS[kind]}.{changed}")
    if flaws:
        yield "\n".join(["Flaws that it repeats:", "", *map(_item, flaws)])
    rows = []
    for method in catalogue.methods():
        entry = merge(*(source.get("methods", {}).get(method, {}) for source in (recipe, variant)))
        differs = [text for text in _settings(entry) if text[1:].split(".")[0] in (*METHOD_SECTIONS, "by_labeled")]
        if differs:
            rows.append((f"[`{method}`](methods/{method}.md)", ", ".join(differs)))
    if rows:
        yield _table(("method", f"its own in `{kind}`"), rows)


def _settings(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}={_plain(value)}`"


def _commands(name: str, recipe: Mapping[str, Any]) -> str:
    file = resources.files("scantly") / "recipes" / f"{name}.yaml"
    command = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    if not command.startswith("scantly train"):
        return "scantly demo"
    lines = [command, "scantly evaluate RUN --split test"]
    if "literature" in recipe["protocols"]:
        lines.append(command.replace(f" {name} ", f" {name} --protocol literature "))
    return "\n".join(lines)


def _kinds(recipe: Mapping[str, Any]) -> str:
    return ", ".join(f"`{kind}`" for kind in recipe.get("protocols", {}))


def _plain(value: object) -> str:
    return json.dumps(value, separators=(", ", ": ")).replace('"', "")


def _item(text: str) -> str:
    return _wrapped(text, "- ", "  ")


def _wrapped(text: str, first: str = "", further: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        120,
        initial_indent=first,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in [head, *rows]]
    cells.insert(1, ["---"] * len(head))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    write_text(PAGE, page())
