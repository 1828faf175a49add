"""``scantly methods`` and ``scantly plan``."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scantly.cli.output import say, say_json, say_table, say_wrapped

if TYPE_CHECKING:
    from scantly.data.plan import Plan

__all__ = ["methods", "plan", "plan_text"]

_WIDTH = 100


def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A method: paper, settings, results.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the methods, or describe one.

    With a name: paper, idea, settings with their meaning and default, published results.
    """
    from scantly.methods import catalogue

    if name is None:
        entries = list(catalogue.methods().values())
        if json:
            say_json([{k: v for k, v in asdict(entry).items() if k != "target"} for entry in entries])
        else:
            rows = [(entry.name, entry.paper, entry.summary) for entry in entries]
            say_table(("method", "paper", "idea"), rows, text_columns=3)
        return
    from scantly.benchmark.published import published_results
    from scantly.cli.published import say_published

    described = catalogue.describe(name)
    published = published_results(name)
    if json:
        say_json({**described, "published": [asdict(result) for result in published]})
        return
    say(f"{described['title']} ({described['name']})")
    say(f"{described['paper']}: {described['summary']}\n")
    say(described["description"])
    say("\nSettings (--set method.NAME=VALUE):" if described["settings"] else "\nNo settings.")
    for key, setting in described["settings"].items():
        kind = f" ({setting['type']})" if setting["type"] else ""
        say(f"  {key} = {_yaml(setting['default'])}{kind}")
        if setting["description"]:
            say_wrapped(setting["description"], indent=6)
    say_published(published)


def plan(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME", help="A recipe's name, or a YAML file of your own."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the plan there; never over an existing file."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show how scans would be prepared.

    Preparation and sampling, every choice with its reason. The output is YAML: edit it and give it to
    train with --config.
    """
    from scantly.errors import ConfigError
    from scantly.files import write_text
    from scantly.training.resolve import plan as make_plan

    if out is not None and out.exists():
        raise ConfigError(f"{out} exists and may have been edited; remove it or choose another --out.")
    made = make_plan(dataset, recipe=recipe)
    text = plan_text(made, dataset)
    if out is not None:
        write_text(out, text)
    if json:
        say_json(made.to_dict())
    elif out is None:
        say(text.rstrip("\n"))
    else:
        say(f"plan written to {out}; edit it and train with: scantly train {dataset} --config {out} ...")


def plan_text(plan: Plan, dataset: Path) -> str:
    """A plan as a configuration file of the section ``plan``, reasons and measured numbers as comments."""
    values = plan.to_dict()
    reasons, fingerprint = values.pop("reasons"), values.pop("fingerprint")
    lines = [f"# Plan for {dataset}. Sizes are (z, y, x) or (y, x). Edit, then: scantly train ... --config THIS"]
    if fingerprint:
        lines.append("# Measured on the training cases:")
        lines += [f"#   {key}: {_yaml(value)}" for key, value in fingerprint.items()]
    lines.append("plan:")
    for key, value in values.items():
        if key in reasons:
            lines += textwrap.wrap(reasons[key], _WIDTH, initial_indent="  # ", subsequent_indent="  # ")
        lines.append(f"  {key}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """One line of YAML."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()
