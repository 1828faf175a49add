"""Where Scantly differs from the public code on purpose, and the values that it has there.

An entry that agrees again is a line of :data:`KNOWN_DEVIATIONS` less; the test fails as long as it stands here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from golden_values import Compared, entries, list_apart

__all__ = ["BOUNDS", "KNOWN_DEVIATIONS", "Bounds", "Deviation", "check", "limit"]


@dataclass(frozen=True)
class Deviation:
    """What differs in an entry.

    Attributes:
        reason: One sentence, for the page.
        values: Term -> our numbers; all other terms of the entry agree.
    """

    reason: str
    values: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Bounds:
    """What a difference stays below, by precision: of values and, relative to their norms, of gradients."""

    float64: float
    float32: float
    gradients_float32: float = 1e-5


#: By file; ``arco_dense_head``'s weighted sum cancels, 10.3 from 23,040 products.
BOUNDS: dict[str, Bounds] = {
    "losses": Bounds(1e-13, 2e-6),
    "losses arco_dense_head weighted_sum": Bounds(1e-13, 1e-4),
    "networks": Bounds(1e-12, 3e-4),
    "sdf": Bounds(1e-13, 1e-6),
    "metrics": Bounds(1e-12, 1e-12),
}

_RAMPS = entries("losses")["ramps"]
_MC_NET_RAMP = "The public code of MC-Net counts the iteration before it reads the ramp, Scantly after."
_FIFTH_HEAD = "The public URPC network has a fifth head, of 9,220 parameters, that nothing uses."
_FULL = "A mask of all voxels is not a number in the public code, and -1 everywhere in Scantly."

KNOWN_DEVIATIONS: dict[tuple[str, str], Deviation] = {
    ("losses", "ramps"): Deviation(
        _MC_NET_RAMP,
        {
            "weight_mc_net_2d": _RAMPS["weight_2d"]["values"],
            "weight_mc_net_la": [10 * value for value in _RAMPS["weight_la"]["values"]],
        },
    ),
    ("networks", "unet_urpc"): Deviation(_FIFTH_HEAD, {"parameters": [1_821_840], "Conv2d": [26, 1_818_896]}),
    ("sdf", "full"): Deviation(_FULL, {"map": [-1.0] * 64}),
}


def limit(kind: str, name: str, compared: Compared, precision: str) -> float:
    """What a comparison's difference is at most."""
    if compared.what.startswith("no gradient"):
        return 0.0
    bounds = BOUNDS.get(f"{kind} {name} {compared.term}", BOUNDS[kind])
    if precision == "float64":
        return bounds.float64
    if "gradient" in compared.what:
        return max(bounds.float32, bounds.gradients_float32)
    return bounds.float32


def check(kind: str, name: str, comparisons: Iterable[Compared], precision: str) -> None:
    """Assert that an entry agrees, or deviates as :data:`KNOWN_DEVIATIONS` says.

    Args:
        kind: File.
        name: Entry.
        comparisons: All of it.
        precision: ``float64`` or ``float32``.
    """
    found = list(comparisons)
    assert found
    deviation = KNOWN_DEVIATIONS.get((kind, name))
    deviating = {} if deviation is None else deviation.values
    assert deviating.keys() <= {compared.term for compared in found}
    for compared in found:
        largest = limit(kind, name, compared, precision)
        if compared.term not in deviating:
            assert compared.difference <= largest, (name, compared)
        elif compared.ours:
            ours = list_apart(compared.ours, deviating[compared.term])
            assert ours <= largest, f"{name}: {compared} is neither theirs nor the deviation that is known"
            assert compared.difference > largest, f"{name}: {compared.term} agrees; take it out of KNOWN_DEVIATIONS"
