"""From defaults, data, recipe, file, flags and ``--set`` to one resolved configuration.

The weaker first: defaults in the code, plan from the data, recipe, configuration file, flags, ``--set``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scantly import networks
from scantly.arguments import checked
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan, make_plan
from scantly.data.splits import Split, resolve_split
from scantly.data.topology import default_network
from scantly.errors import ConfigError, unknown_name
from scantly.files import parse_yaml, read_yaml
from scantly.methods import catalogue
from scantly.settings import merge, parse
from scantly.training.config import (
    DataSection,
    EvaluationSection,
    NetworkSection,
    RunConfig,
    TrainingSection,
)
from scantly.training.recipes import (
    SECTIONS,
    known_recipes,
    method_layer,
    names_counts,
    read_recipe,
    refuse_unknown,
    section_layer,
)

__all__ = ["flags_to_layer", "known_recipes", "parse_sets", "plan", "read_recipe", "resolve"]


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
        nested: Any = parse_yaml(text, f"--set {key}: '{text}'")
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
    recipe: str | Path | None = None,
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
    recipe = None if recipe is None else str(recipe)
    written = read_recipe(recipe) if recipe else {}
    file = read_yaml(Path(config_file)) if config_file else {}
    refuse_unknown(file, SECTIONS, str(config_file))
    set_layer = dict(sets) if isinstance(sets, Mapping) else parse_sets(sets)
    refuse_unknown(set_layer, SECTIONS, "--set")
    given = dict(flags or {})
    plain_flags = flags_to_layer(given, resized=False)

    kind = str(_first("evaluation", "protocol", [set_layer, plain_flags, file]) or "clean")
    variants = written.get("protocols")
    if variants and kind not in variants:
        raise ConfigError(f"recipe {recipe}: {unknown_name('protocol', kind, variants)}")
    shared = section_layer(written, kind)
    name = _first("method", "name", [set_layer, plain_flags, file, shared])
    if name is None:
        raise ConfigError("no method given; choose one with --method (scantly methods lists them).")
    name = catalogue.find(str(name)).name
    base = merge(shared, method_layer(written, kind, name, where=f"recipe {recipe}"))
    if names_counts(written, kind, name):
        labeled = _labeled_subjects(Path(dataset), kind, merge(base, file, plain_flags, set_layer))
        base = merge(shared, method_layer(written, kind, name, labeled=labeled, where=f"recipe {recipe}"))
    flag_layer = flags_to_layer(given, resized=bool(_first("plan", "size", [merge(base, file)])))
    _refuse_conflicts(flag_layer, set_layer)
    stronger = merge(file, flag_layer, set_layer)
    return _build(Path(dataset), recipe, kind, merge(_in_proportion(base, stronger), stronger))


def _labeled_subjects(dataset: Path, kind: str, merged: Mapping[str, Any]) -> int:
    """How many subjects of the split are labeled, however the user asked for them."""
    data = parse(DataSection, merge(merged.get("data") or {}, {"dataset": str(dataset)}), where="data")
    evaluation = parse(EvaluationSection, {"protocol": kind}, where="evaluation")
    split = _split(Dataset.open(dataset), data, evaluation)
    return len({split.groups[case] for case in split.labeled})


def _in_proportion(base: dict[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's layer with its own length; its intervals follow a run that the user makes longer or shorter."""
    own = base.get("training") or {}
    if not isinstance(own, Mapping) or own.get("steps") is None:
        return base
    steps = _first("training", "steps", [stronger, base])
    intervals: dict[str, Any] = {}
    if isinstance(steps, int) and isinstance(own["steps"], int) and own["steps"] > 0:
        given = {key: own[key] for key in ("validate_every", "checkpoint_every") if isinstance(own.get(key), int)}
        intervals = {key: max(1, round(value * steps / own["steps"])) for key, value in given.items()}
    return merge({"training": {"published_steps": own["steps"]}}, base, {"training": intervals})


@checked()
def plan(
    dataset: str | Path,
    *,
    recipe: str | Path | None = None,
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
    sections = {key: merged.get(key) or {} for key in SECTIONS}
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
    split = _split(dataset, data, evaluation)
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


def _split(dataset: Dataset, data: DataSection, evaluation: EvaluationSection) -> Split:
    return resolve_split(
        dataset,
        labeled=data.labeled,
        protocol=evaluation.protocol,
        seed=data.seed_split,
        seed_labeled=data.seed_labeled,
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
