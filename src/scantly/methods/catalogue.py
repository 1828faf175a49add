"""The methods by name, read without torch; other packages add theirs by entry point."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from scantly.errors import ConfigError, unknown_name
from scantly.settings import Settings

if TYPE_CHECKING:
    from scantly.methods.base import Method

__all__ = ["CATALOGUE", "Entry", "describe", "find", "load", "methods"]

ENTRY_POINTS = "scantly.methods"


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue.

    Attributes:
        name: What ``--method`` takes.
        target: ``module:class``; only entries of installed packages are ever imported, never names from files.
        title: The method's usual name.
        paper: Authors, venue, year.
        summary: The idea in one line.
    """

    name: str
    target: str
    title: str
    paper: str
    summary: str


CATALOGUE = (
    Entry(
        "supervised",
        "scantly.methods.supervised:Supervised",
        "Supervised",
        "cross-entropy and Dice on labeled cases, the field's baseline",
        "labeled cases alone: lower bound; with all labels the upper bound",
    ),
    Entry(
        "pi_model",
        "scantly.methods.pi_model:PiModel",
        "Pi-model",
        "Laine and Aila, ICLR 2017",
        "two passes of one network with noise and dropout of their own must agree",
    ),
    Entry(
        "mean_teacher",
        "scantly.methods.mean_teacher:MeanTeacher",
        "Mean Teacher",
        "Tarvainen and Valpola, NeurIPS 2017",
        "match a weight-averaged teacher on noisy unlabeled images",
    ),
    Entry(
        "ua_mt",
        "scantly.methods.ua_mt:UncertaintyAwareMeanTeacher",
        "UA-MT",
        "Yu et al., MICCAI 2019",
        "Mean Teacher on the voxels of which the teacher is certain",
    ),
    Entry(
        "ict",
        "scantly.methods.ict:InterpolationConsistency",
        "ICT",
        "Verma et al., IJCAI 2019",
        "the prediction of a mixture is the mixture of a teacher's predictions",
    ),
    Entry(
        "entropy_minimization",
        "scantly.methods.entropy_minimization:EntropyMinimization",
        "Entropy minimization",
        "Grandvalet and Bengio, NeurIPS 2004; Vu et al., CVPR 2019",
        "push predictions of unlabeled images to be certain",
    ),
    Entry(
        "pseudo_label",
        "scantly.methods.pseudo_label:PseudoLabel",
        "Self-training",
        "Lee, ICML workshop 2013",
        "the network's own confident predictions are its labels, at every step or round by round",
    ),
    Entry(
        "cps",
        "scantly.methods.cps:CrossPseudoSupervision",
        "CPS",
        "Chen et al., CVPR 2021",
        "two networks, begun differently, learn from each other's labels",
    ),
    Entry(
        "dan",
        "scantly.methods.dan:AdversarialNetwork",
        "DAN",
        "Zhang et al., MICCAI 2017",
        "fool a discriminator that tells labeled from unlabeled images by their segmentations",
    ),
    Entry(
        "cct",
        "scantly.methods.cct:CrossConsistency",
        "CCT",
        "Ouali et al., CVPR 2020",
        "auxiliary decoders that see perturbed features must agree with the main decoder",
    ),
    Entry(
        "urpc",
        "scantly.methods.urpc:PyramidConsistency",
        "URPC",
        "Luo et al., MICCAI 2021",
        "scales of one decoder must match their mean, less where they diverge",
    ),
    Entry(
        "dtc",
        "scantly.methods.dtc:DualTaskConsistency",
        "DTC",
        "Luo et al., AAAI 2021",
        "a predicted distance map, turned into a mask, must agree with the predicted mask",
    ),
    Entry(
        "sassnet",
        "scantly.methods.sassnet:ShapeAware",
        "SASSNet",
        "Li et al., MICCAI 2020",
        "fool a discriminator that tells labeled from unlabeled images by their predicted distance maps",
    ),
    Entry(
        "mc_net",
        "scantly.methods.mc_net:MCNet",
        "MC-Net",
        "Wu et al., MICCAI 2021",
        "two decoders must match each other's sharpened prediction",
    ),
    Entry(
        "mc_net_plus",
        "scantly.methods.mc_net:MCNetPlus",
        "MC-Net+",
        "Wu et al., Medical Image Analysis 2022",
        "three decoders must match each other's sharpened prediction",
    ),
    Entry(
        "fixmatch",
        "scantly.methods.fixmatch:FixMatch",
        "FixMatch",
        "Sohn et al., NeurIPS 2020",
        "confident labels of the weak view supervise the strong view",
    ),
    Entry(
        "unimatch",
        "scantly.methods.unimatch:UniMatch",
        "UniMatch",
        "Yang et al., CVPR 2023",
        "confident labels supervise two strong views and one with perturbed features",
    ),
    Entry(
        "arco",
        "scantly.methods.arco:ARCO",
        "ARCO",
        "You et al., NeurIPS 2023",
        "relational pretraining, then voxel contrast on stratified (SG, SAG) draws",
    ),
    Entry(
        "plgcl",
        "scantly.methods.plgcl:PLGCL",
        "PLGCL",
        "Basak and Yin, CVPR 2023",
        "contrast patches cut class by class with the help of pseudo-labels, least ambiguous first",
    ),
    Entry(
        "lclpl",
        "scantly.methods.lclpl:LCLPL",
        "Local contrastive self-training",
        "Chaitanya et al., Medical Image Analysis 2023",
        "contrast voxels with class means of pseudo-labels, relabel the pool between rounds",
    ),
    Entry(
        "gapmatch",
        "scantly.methods.gapmatch:GapMatch",
        "GapMatch",
        "Huang et al., AAAI 2025",
        "weak-to-strong consistency, and the same again at weights perturbed along its gradient",
    ),
    Entry(
        "diffcl",
        "scantly.methods.diffcl:DiffCL",
        "Diff-CL",
        "Guo et al., arXiv 2025",
        "a convolutional and a diffusion network supervise each other; contrast with stored labeled voxels",
    ),
)


def methods() -> dict[str, Entry]:
    """All methods by name: the catalogue, then those of installed packages (group ``scantly.methods``).

    Raises:
        ConfigError: if an installed package takes a name that exists.
    """
    found = {entry.name: entry for entry in CATALOGUE}
    for point in entry_points(group=ENTRY_POINTS):
        package = point.dist.name if point.dist else "an installed package"
        if point.name in found:
            taken = found[point.name].paper if found[point.name] not in CATALOGUE else "in the catalogue"
            raise ConfigError(f"method '{point.name}' of {package} is already {taken}; rename or remove it.")
        found[point.name] = Entry(point.name, point.value, point.name, f"from {package}", f"see {package}")
    return found


def find(name: str) -> Entry:
    """The entry of that name.

    Raises:
        ConfigError: if there is none; the nearest name is offered.
    """
    known = methods()
    if name not in known:
        raise ConfigError(unknown_name("method", name, known))
    return known[name]


def load(name: str) -> type[Method]:
    """Import the class of a method.

    Raises:
        ConfigError: if there is no such method, or an installed package that claims it does not have it.
    """
    entry = find(name)
    module, _, attribute = entry.target.partition(":")
    try:
        loaded: type[Method] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        if entry in CATALOGUE:
            raise
        raise ConfigError(
            f"method '{name}' {entry.paper} cannot be loaded from '{entry.target}' ({error}); mend or remove that "
            "package."
        ) from error
    if entry not in CATALOGUE and not _is_method(loaded):
        raise ConfigError(
            f"method '{name}' {entry.paper}: '{entry.target}' is no subclass of scantly.methods.base.Method; mend or "
            "remove that package."
        )
    return loaded


def _is_method(loaded: object) -> bool:
    from scantly.methods.base import Method

    return isinstance(loaded, type) and issubclass(loaded, Method)


def describe(name: str) -> dict[str, Any]:
    """Paper, idea, settings with meaning and default of one method, as plain data (imports the method).

    Returns:
        Keys ``name``, ``title``, ``paper``, ``summary``, ``description`` (the docstring), and ``settings``:
        name -> ``{"default", "type", "description"}``; settings within settings have dotted names.
    """
    import inspect

    entry = find(name)
    method = load(name)
    return {
        "name": entry.name,
        "title": entry.title,
        "paper": entry.paper,
        "summary": entry.summary,
        "description": inspect.cleandoc(method.__doc__ or ""),
        "settings": _settings(method.Config),
    }


def _settings(kind: type[Settings], values: Settings | None = None) -> dict[str, dict[str, Any]]:
    """Default, type and meaning of each setting; settings within settings by their dotted names.

    Args:
        kind: The class of settings.
        values: Whose values are the defaults; ``None``: those of the class.
    """
    schema = kind.model_json_schema()["properties"] if kind.model_fields else {}
    defaults = {
        key: getattr(values, key)
        if values is not None
        else (None if field.is_required() else field.get_default(call_default_factory=True))
        for key, field in kind.model_fields.items()
    }
    plain = kind.model_construct(**defaults).model_dump(mode="json", warnings=False)
    found: dict[str, dict[str, Any]] = {}
    for key, field in kind.model_fields.items():
        default: object = defaults[key]
        if isinstance(default, Settings):
            found |= {f"{key}.{inner}": told for inner, told in _settings(type(default), default).items()}
            continue
        choices = schema[key].get("enum")
        found[key] = {
            "default": plain[key],
            "type": " | ".join(map(str, choices)) if choices else schema[key].get("type", ""),
            "description": field.description or "",
        }
    return found
