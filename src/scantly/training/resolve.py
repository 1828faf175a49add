"""From defaults, data, recipe, file, flags and ``--set`` to one resolved configuration.

The weaker first: defaults in the code, plan from the data, recipe, configuration file, flags, ``--set``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from scantly import networks
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan, make_plan
from scantly.data.splits import resolve_split
from scantly.data.topology import default_network
from scantly.errors import ConfigError, unknown_name
from scantly.files import read_yaml
from scantly.methods import catalogue
from scantly.settings import merge, parse
from scantly.training.config import (
    DataSection,
    EvaluationSection,
    NetworkSection,
    RunConfig,
    TrainingSection,
)

__all__ = ["flags_to_layer", "known_recipes", "parse_sets", "plan", "read_recipe", "resolve"]

_SECTIONS = ("data", "plan", "network", "method", "training", "evaluation")
_RECIPE_ONLY = ("title", "description", "deviations", "methods", "protocols")


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
    _refuse_unknown(recipe, (*_SECTIONS, *_RECIPE_ONLY), f"recipe {name}")
    return recipe


def _refuse_unknown(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}: {unknown_name('section', key, known)}")


def parse_sets(assignments: Sequence[str]) -> dict[str, Any]:
    """``["method.consistency=0.5", ...]`` as nested settings; values are read as YAML.

    Raises:
        ConfigError: for text without ``=`` or a value that is not YAML.
    """
    layer: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes key=value, for instance method.consistency=0.5; got '{assignment}'.")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {key}: '{text}' is not a value ({error}).") from error
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        layer = merge(layer, nested)
    return layer


def _flatten(layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def flags_to_layer(flags: Mapping[str, Any], *, resized: bool) -> dict[str, Any]:
    """Command-line flags (absent ones ``None``) as nested settings.

    Args:
        flags: ``method``, ``labeled``, ``seed``, ``size`` (the literature's H W [D]) and so on.
        resized: The recipe resizes whole slices or volumes: ``size`` is then that size too.

    Raises:
        ConfigError: for a size of other than two or three numbers.
    """
    places = {
        "method": "method.name",
        "labeled": "data.labeled",
        "seed_labeled": "data.seed_labeled",
        "store": "data.store",
        "workers": "data.workers",
        "dims": "plan.spatial_dims",
        "protocol": "evaluation.protocol",
        "steps": "training.steps",
        "seed": "training.seed",
        "device": "training.device",
        "devices": "training.devices",
        "nodes": "training.nodes",
        "precision": "training.precision",
    }
    layer: dict[str, Any] = {}
    for flag, value in flags.items():
        if value is None:
            continue
        if flag == "size":
            if len(value) not in {2, 3}:
                raise ConfigError(f"--size takes H W or H W D; got {' '.join(map(str, value))}.")
            size = [value[2], value[0], value[1]] if len(value) == 3 else list(value)
            layer = merge(layer, {"plan": {"patch_size": size, **({"size": size} if resized else {})}})
        else:
            section, key = places[flag].split(".")
            layer = merge(layer, {section: {key: value}})
    return layer


def _refuse_conflicts(flags: Mapping[str, Any], sets: Mapping[str, Any]) -> None:
    set_values = _flatten(sets)
    for key, value in _flatten(flags).items():
        if key in set_values and str(set_values[key]) != str(value):  # YAML reads 32 as a number
            raise ConfigError(f"a flag says {key}={value} and --set says {key}={set_values[key]}; give one of the two.")


def resolve(
    dataset: str | Path,
    *,
    recipe: str | None = None,
    config_file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] | Mapping[str, Any] = (),
) -> RunConfig:
    """Resolve everything that a run needs to know, before anything is trained or written.

    Args:
        dataset: Dataset folder.
        recipe: Name of a recipe or path of a YAML file.
        config_file: YAML file with the sections of the configuration.
        flags: Command-line flags, see :func:`flags_to_layer`.
        sets: ``key=value`` texts, or nested settings.

    Returns:
        The configuration, all defaults filled in.

    Raises:
        ConfigError: naming every unknown key or bad value.
        DatasetError: if the dataset folder or the number of labeled units does not fit.
    """
    written = read_recipe(recipe) if recipe else {}
    file = read_yaml(Path(config_file)) if config_file else {}
    _refuse_unknown(file, _SECTIONS, str(config_file))
    set_layer = dict(sets) if isinstance(sets, Mapping) else parse_sets(sets)
    _refuse_unknown(set_layer, _SECTIONS, "--set")
    given = dict(flags or {})

    kind = _first("evaluation", "protocol", [set_layer, flags_to_layer(given, resized=False), file]) or "clean"
    variants = written.get("protocols", {})
    if written and variants and kind not in variants:
        raise ConfigError(f"recipe {recipe}: {unknown_name('protocol', str(kind), variants)}")
    variant = variants.get(kind, {})
    base = {key: written[key] for key in _SECTIONS if key in written}
    base = merge(base, {key: variant[key] for key in _SECTIONS if key in variant})
    name = _first("method", "name", [set_layer, flags_to_layer(given, resized=False), file, base])
    if name is None:
        raise ConfigError("no method given; choose one with --method (scantly methods lists them).")
    catalogue.find(str(name))
    for source in (written, variant):
        base = merge(base, {"method": source.get("methods", {}).get(name, {})})
    before_flags = merge(base, file)
    flag_layer = flags_to_layer(given, resized=bool(before_flags.get("plan", {}).get("size")))
    _refuse_conflicts(flag_layer, set_layer)
    merged = merge(before_flags, flag_layer, set_layer)
    return _build(Path(dataset), recipe, str(kind), merged)


def plan(
    dataset: str | Path,
    *,
    recipe: str | None = None,
    config_file: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] | Mapping[str, Any] = (),
) -> Plan:
    """The plan that a training on this dataset would follow; arguments as for :func:`resolve`."""
    given = {"method": "supervised", **(flags or {})}
    return resolve(dataset, recipe=recipe, config_file=config_file, flags=given, sets=sets).plan


def _first(section: str, key: str, layers: Sequence[Mapping[str, Any]]) -> Any:
    for layer in layers:
        values = layer.get(section)
        if isinstance(values, Mapping) and values.get(key) is not None:
            return values[key]
    return None


def _build(dataset_path: Path, recipe: str | None, kind: str, merged: Mapping[str, Any]) -> RunConfig:
    sections = {key: merged.get(key) or {} for key in _SECTIONS}
    for key, values in sections.items():
        if not isinstance(values, Mapping):
            raise ConfigError(f"section '{key}' is {values!r}; write settings, for instance {key}.name=value.")
    named = sections["data"].get("dataset", dataset_path)
    if Path(named).resolve() != dataset_path.resolve():
        raise ConfigError(f"data.dataset says {named}, the command {dataset_path}; give the dataset folder once.")
    data = parse(DataSection, merge(sections["data"], {"dataset": str(dataset_path.resolve())}), where="data")
    network = parse(NetworkSection, sections["network"], where="network")
    training = parse(TrainingSection, sections["training"], where="training")
    evaluation = parse(EvaluationSection, merge(sections["evaluation"], {"protocol": kind}), where="evaluation")
    name = str(sections["method"]["name"])
    settings = {key: value for key, value in sections["method"].items() if key != "name"}
    method_class = catalogue.load(name)
    method = parse(method_class.Config, settings, where="method")

    dataset = Dataset.open(dataset_path)
    split = resolve_split(
        dataset,
        labeled=data.labeled,
        protocol=evaluation.protocol,
        seed=data.seed_split,
        seed_labeled=data.seed_labeled,
    )
    if method_class.uses_unlabeled and not split.unlabeled:
        raise ConfigError(
            f"method '{name}' learns from unlabeled cases, but all {len(split.labeled)} training cases are labeled; "
            "give --labeled N to hide the labels of the others, or choose --method supervised."
        )
    plan = make_plan(
        dataset, split, dims=sections["plan"].get("spatial_dims"), overrides=sections["plan"], network=network.name
    )
    network = _planned_network(network, plan)
    if method_class.uses_unlabeled and plan.unlabeled_batch_size == 0:
        raise ConfigError(f"method '{name}' needs unlabeled rows; set plan.unlabeled_batch_size to 1 or more.")
    if evaluation.selection == "auto":
        chosen = "best" if split.val and split.test else "last"
        evaluation = evaluation.model_copy(update={"selection": chosen})
    if evaluation.selection == "best" and not split.val:
        raise ConfigError(
            "evaluation.selection is 'best', but the split has no validation cases; choose 'last' or add 'val' "
            "to splits.json."
        )
    return RunConfig(
        recipe=recipe,
        data=data,
        plan=plan,
        network=network,
        method={"name": name, **method.model_dump(mode="json")},
        training=training,
        evaluation=evaluation,
        split=split.to_dict(),
    )


def _planned_network(network: NetworkSection, plan: Plan) -> NetworkSection:
    """The network by its own name, with what the plan says about it.

    Raises:
        ConfigError: if it does not exist, does not take the arguments, or the patch does not fit it.
    """
    name = default_network(plan.spatial_dims, plan.kernel_sizes) if network.name == "auto" else network.name
    arguments = dict(network.arguments)
    if name == "dynunet" and plan.kernel_sizes and plan.strides:
        planned = {"kernel_sizes": plan.kernel_sizes, "strides": plan.strides}
        arguments = {key: [list(level) for level in levels] for key, levels in planned.items()} | arguments
    networks.check_sides(name, plan.patch_size, in_channels=len(plan.normalization), arguments=arguments)
    return network.model_copy(update={"name": name, "arguments": arguments})
