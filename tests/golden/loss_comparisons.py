"""How each entry of ``losses.json`` is compared with our code, and what the page says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import adversarial_comparisons as adversarial
import consistency_comparisons as consistency
import contrast_comparisons as contrast
import schedule_comparisons as schedules
import torch
from golden_values import Compared, Entry, apart, compared_term, entries, inputs_of, numbers_of
from torch import Tensor

__all__ = ["LOSSES", "SCHEDULES", "Loss", "Schedule", "compared_loss", "compared_schedule"]


@dataclass(frozen=True)
class Loss:
    """Comparison of an entry with terms.

    Attributes:
        run: Of entry and inputs: term -> scalar or list.
        ours: What of Scantly it is, with the settings, for the page.
    """

    run: Callable[[Entry, dict[str, Tensor]], dict[str, Any]]
    ours: str


@dataclass(frozen=True)
class Schedule:
    """Comparison of an entry that lists values over iterations: name -> values, ours and theirs."""

    run: Callable[[Entry], dict[str, list[float]]]
    expected: Callable[[Entry], dict[str, list[float]]]
    ours: str


_DISTANCE = "`empty_distance=zero`"
LOSSES: dict[str, Loss] = {
    "supervised_2d": Loss(consistency.supervised, "`supervised`"),
    "supervised_2d_absent_class": Loss(consistency.supervised, "`supervised`"),
    "supervised_3d": Loss(consistency.supervised, "`supervised`"),
    "supervised_3d_foreground": Loss(consistency.supervised, "`supervised`, `dice_background=false`"),
    "mean_teacher": Loss(consistency.mean_teacher, "`mean_teacher`, `start_iteration=1000`"),
    "ua_mt_2d": Loss(consistency.ua_mt, "`ua_mt`, `official=true`"),
    "ua_mt_la": Loss(consistency.ua_mt, "`ua_mt`, `official=true`, `dice_background=false`, the ramp of LA"),
    "ict": Loss(consistency.interpolation, "`ict`"),
    "entropy_minimization_2d": Loss(consistency.entropy_minimization, "`entropy_minimization`"),
    "entropy_minimization_3d": Loss(consistency.entropy_minimization, "`entropy_minimization`"),
    "cps": Loss(consistency.cross_pseudo, "`cps`"),
    "cct": Loss(consistency.cross_consistency, "`cct`, `official=true`"),
    "cct_perturbations": Loss(consistency.perturbations, "perturbations of `cct` and `urpc`"),
    "urpc": Loss(consistency.pyramid, "`urpc`"),
    "dan": Loss(adversarial.dan, "`dan`"),
    "dtc": Loss(adversarial.dtc, f"`dtc`, {_DISTANCE}"),
    "sassnet": Loss(adversarial.sassnet, f"`sassnet`, {_DISTANCE}"),
    "mc_net_2d": Loss(consistency.mutual, "`mc_net`"),
    "mc_net_plus_2d": Loss(consistency.mutual, "`mc_net_plus`"),
    "mc_net_3d": Loss(consistency.mutual, "`mc_net`, the ramp of LA"),
    "mc_net_plus_3d": Loss(consistency.mutual, "`mc_net_plus`, the ramp of LA"),
    "unimatch": Loss(consistency.weak_to_strong, "`unimatch`"),
    "fixmatch_masked_cross_entropy": Loss(consistency.confident_labels, "`fixmatch`, its unsupervised loss"),
    "arco_instance_divergence": Loss(contrast.instance_divergence, "`arco`, `similarity_divergence`"),
    "arco_nearest_neighbor": Loss(contrast.nearest_neighbor, "`arco`, `nearest_neighbor_loss`"),
    "arco_unsupervised": Loss(contrast.unsupervised, "`arco`, `confident_cross_entropy`"),
    "arco_dense_head": Loss(contrast.dense_head, "`arco`, `PyramidHead`"),
    "arco_anatomical_contrast": Loss(contrast.anatomical_contrast, "`arco`, `negatives=released`, draws given"),
    "plgcl_closed_form": Loss(contrast.closed_form, "`plgcl`, warm-up"),
    "plgcl_closed_form_soft": Loss(contrast.closed_form, "`plgcl`, joint stage"),
    "lclpl_local_contrast": Loss(contrast.local_contrast, "`lclpl`, `normalization=released` and `correct`"),
    "lclpl_dice": Loss(contrast.dice_per_image, "`lclpl`, `soft_dice_per_image`"),
}
SCHEDULES: dict[str, Schedule] = {
    "ramps": Schedule(
        schedules.ramps,
        lambda entry: {name: list(value["values"]) for name, value in entry.items() if "values" in _mapping(value)},
        "ramps of `mean_teacher`, `ua_mt` and `mc_net`",
    ),
    "learning_rates": Schedule(
        schedules.learning_rates, schedules.learning_rates_expected, "rates of the optimizers, by method"
    ),
    "moving_average": Schedule(
        schedules.moving_average,
        lambda entry: {
            "decays": list(entry["decays"]),
            "teacher_after": [value for row in entry["teacher_after"] for value in row],
        },
        "the average of `mean_teacher`",
    ),
}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def compared_loss(name: str, dtype: torch.dtype) -> Iterator[Compared]:
    """All of an entry of :data:`LOSSES`."""
    entry = entries("losses")[name]
    inputs = inputs_of(entry, dtype)
    ours = LOSSES[name].run(entry, inputs)
    assert {key.partition(" ")[0] for key in ours} >= entry["terms"].keys()
    for term, expected in entry["terms"].items():
        yield from compared_term(term, expected, ours[term], inputs)
        for extra in sorted(expected.keys() - {"value", "values", "gradients"}):
            numbers = numbers_of(ours[f"{term} {extra}"])
            yield Compared(term, extra, apart(numbers[0], float(expected[extra])), numbers)


def compared_schedule(name: str) -> Iterator[Compared]:
    """All lists of an entry of :data:`SCHEDULES`, value by value relative to theirs."""
    entry, comparison = entries("losses")[name], SCHEDULES[name]
    ours, theirs = comparison.run(entry), comparison.expected(entry)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        differences = [apart(a, b) for a, b in zip(ours[key], theirs[key], strict=True)]
        yield Compared(key, "values", max(differences), tuple(ours[key]))
