"""Recipes: the protocols of the literature as YAML files, and what one says of a method and a protocol kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from scantly.errors import ConfigError, unknown_name
from scantly.files import read_yaml
from scantly.methods import catalogue
from scantly.settings import Settings, merge, parse

__all__ = [
    "KINDS",
    "METHOD_SECTIONS",
    "SECTIONS",
    "Cohort",
    "known_recipes",
    "method_layer",
    "method_settings",
    "names_counts",
    "read_cohort",
    "read_recipe",
    "refuse_unknown",
    "section_layer",
]

SECTIONS = ("data", "plan", "network", "method", "training", "evaluation")
#: Sections in which the published training of a method may differ from the recipe's.
METHOD_SECTIONS = ("data", "plan", "network", "training", "evaluation")
KINDS = ("clean", "literature")
_RECIPE_ONLY = ("title", "description", "cohort", "deviations", "methods", "protocols")
_BY_LABELED = "by_labeled"


class Cohort(Settings):
    """What a recipe says of its data, for the reader; no run depends on it."""

    source: str = Field(description="Where the data come from.")
    folder: str = Field(description="What the dataset folder holds, and what was done to it before.")
    unit: str = Field(description="What is counted: patient, scan, image.")
    split: str = Field(description="Training, validation and test cases.")
    labeled: dict[int, str] = Field(description="Number of labeled units -> which they are.")
    metrics: str = Field(description="What the published tables hold, with units.")


def known_recipes() -> list[str]:
    """Names of the recipes that come with Scantly."""
    folder = resources.files("scantly") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe by name, or from a YAML file of one's own.

    Raises:
        ConfigError: for an unknown name, or keys a recipe does not have.
    """
    if name.endswith((".yaml", ".yml")):
        recipe = read_yaml(Path(name))
    elif name in known_recipes():
        with resources.as_file(resources.files("scantly") / "recipes" / f"{name}.yaml") as path:
            recipe = read_yaml(path)
    else:
        raise ConfigError(unknown_name("recipe", name, known_recipes()))
    where = f"recipe {name}"
    refuse_unknown(recipe, (*SECTIONS, *_RECIPE_ONLY), where)
    try:
        read_cohort(recipe)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    variants = _mapping(recipe.get("protocols"), f"{where}: protocols")
    refuse_unknown(variants, KINDS, f"{where}: protocols", "protocol")
    methods = tuple(catalogue.methods())
    _check_methods(recipe, methods, f"{where}: methods")
    for kind, variant in variants.items():
        place = f"{where}: protocols.{kind}"
        says = _mapping(variant, place)
        refuse_unknown(says, (*SECTIONS, "methods"), place)
        _check_methods(says, methods, f"{place}.methods")
    return recipe


def read_cohort(recipe: Mapping[str, Any]) -> Cohort | None:
    """What the recipe says of its data, if it says anything.

    Raises:
        ConfigError: for unknown, missing or wrong entries.
    """
    values = recipe.get("cohort")
    return None if values is None else parse(Cohort, _mapping(values, "cohort"), where="cohort")


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], where: str, kind: str = "section") -> None:
    """Refuse the first key that is not known, with the nearest one.

    Raises:
        ConfigError: naming it.
    """
    known = tuple(known)
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_name(kind, str(key), known)}")


def section_layer(recipe: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What a recipe and its variant for a protocol kind say of every method."""
    variant = _variant(recipe, kind)
    return merge(*({key: source[key] for key in SECTIONS if key in source} for source in (recipe, variant)))


def method_layer(
    recipe: Mapping[str, Any], kind: str, method: str, *, labeled: int | None = None, where: str = "recipe"
) -> dict[str, Any]:
    """What a recipe and its variant say of one method: its settings, and what it trains with.

    Args:
        recipe: From :func:`read_recipe`.
        kind: Protocol kind.
        method: Name in the catalogue; its class is imported if the recipe names it.
        labeled: Number of labeled subjects; ``None``: what depends on it is left out.
        where: Begins messages.

    Returns:
        Sections of a configuration; the method's settings are in ``method``.

    Raises:
        ConfigError: for a key that is neither a setting of the method nor a section.
    """
    layer: dict[str, Any] = {}
    for source, prefix in ((recipe, f"{where}: "), (_variant(recipe, kind), f"{where}: protocols.{kind}.")):
        entry = (source.get("methods") or {}).get(method)
        if entry is None:
            continue
        place = f"{prefix}methods.{method}"
        layer = merge(layer, _entry(entry, method, place, _BY_LABELED))
        by_labeled = f"{place}.{_BY_LABELED}"
        for count, own in _mapping(entry.get(_BY_LABELED), by_labeled).items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ConfigError(
                    f"{by_labeled}: {count!r} is no number of subjects; give whole numbers above 0, without "
                    "quotation marks."
                )
            settings = _entry(own, method, f"{by_labeled}.{count}")
            layer = merge(layer, settings if count == labeled else {})
    return layer


def names_counts(recipe: Mapping[str, Any], kind: str, method: str) -> bool:
    """Whether anything that a recipe says of a method depends on the number of labeled subjects."""
    entries = ((source.get("methods") or {}).get(method) for source in (recipe, _variant(recipe, kind)))
    return any(entry and _BY_LABELED in entry for entry in entries)


def method_settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of ``methods`` without what it says of sections and numbers of labeled subjects."""
    return {key: value for key, value in entry.items() if key not in (*METHOD_SECTIONS, _BY_LABELED)}


def _variant(recipe: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return (recipe.get("protocols") or {}).get(kind) or {}


def _entry(entry: Any, method: str, where: str, *further: str) -> dict[str, Any]:
    """Settings and sections of an entry of ``methods`` as sections of a configuration."""
    fields = catalogue.load(method).Config.model_fields
    refuse_unknown(_mapping(entry, where), (*fields, *METHOD_SECTIONS, *further), where, "setting")
    sections = {key: _mapping(entry[key], f"{where}.{key}") for key in METHOD_SECTIONS if key in entry}
    return {"method": method_settings(entry), **sections}


def _check_methods(source: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    entries = _mapping(source.get("methods"), where)
    refuse_unknown(entries, known, where, "method")
    for name, entry in entries.items():
        _mapping(entry, f"{where}.{name}")


def _mapping(values: Any, where: str) -> Mapping[Any, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} is {values!r}; write settings, for instance 'name: value' lines.")
    return values
