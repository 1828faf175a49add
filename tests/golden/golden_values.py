"""Values of public codes, and the inputs, fillings and measures that go with them; see the README beside this file.

``Entry`` and ``Term`` are objects of the JSON files. Differences are relative unless said otherwise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

FOLDER = Path(__file__).parent

Entry = Mapping[str, Any]
Term = Mapping[str, Any]

_LONGEST = 65521  # period of the filling
_TEACHERS = {"teacher", "teacher_first", "teacher_second", "passes"}  # to see that nothing flows into them


@cache
def golden(kind: str) -> Mapping[str, Any]:
    """One of the files: ``losses``, ``networks``, ``sdf`` or ``metrics``."""
    return dict(json.loads((FOLDER / f"{kind}.json").read_text(encoding="utf-8")))


def entries(kind: str) -> dict[str, Entry]:
    """Its entries by name."""
    (listed,) = (golden(kind)[key] for key in ("entries", "masks", "pairs") if key in golden(kind))
    found = {entry["name"]: entry for entry in listed}
    assert len(found) == len(listed)
    return found


def pseudo(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """``u(n)``, in (-1, 1), of whole numbers."""
    m = numbers % _LONGEST
    return 2 * ((31 * m**2 + 7919 * m + 17) % _LONGEST).astype(np.float64) / _LONGEST - 1


def array(spec: Any) -> NDArray[Any]:
    """The array of a specification: float64, or int64 for labels and masks."""
    if "kind" in spec:
        return _drawn(spec)
    if "sum" in spec:
        first, second = map(array, spec["sum"])
        return np.asarray(first + second)
    if "tanh" in spec:
        return np.tanh(array(spec["tanh"]))
    if "softmax" in spec:
        powers = np.exp(array(spec["softmax"]) - array(spec["softmax"]).max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))
    if "unit" in spec:
        rows = array(spec["unit"])
        return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True))
    if "one_hot" in spec:
        labels = array(spec["one_hot"])
        return np.moveaxis(np.eye(spec["classes"])[labels], -1, 1) * spec["scale"]
    if "balls" in spec:
        return _shapes(spec, _ball, "balls")
    return _shapes(spec, _box, "boxes")


def _drawn(spec: Mapping[str, Any]) -> NDArray[Any]:
    rng, shape = np.random.default_rng(spec["seed"]), spec["shape"]
    if spec["kind"] == "integers":
        return rng.integers(spec["low"], spec["high"], size=shape)
    if spec["kind"] == "uniform":
        return rng.uniform(spec["low"], spec["high"], size=shape).astype(np.float32).astype(np.float64)
    assert spec["kind"] == "normal"
    drawn = rng.normal(size=shape).astype(np.float32) * np.float32(spec["scale"])
    return drawn.astype(np.float64)


def _shapes(spec: Mapping[str, Any], inside: Any, key: str) -> NDArray[np.int64]:
    rows, shape = spec[key], list(spec["shape"])
    filled = np.zeros(shape, dtype=np.int64)
    for row, parts in enumerate(rows):
        target = filled if len(rows) == 1 and shape[0] != 1 else filled[row]
        for part in parts:
            value, where = inside(part, target.shape)
            target[where] = value
    return filled


def _ball(part: Any, shape: Sequence[int]) -> tuple[int, NDArray[np.bool_]]:
    value, center, square = part
    return value, sum((grid - c) ** 2 for grid, c in zip(np.indices(shape), center, strict=True)) <= square


def _box(part: Any, shape: Sequence[int]) -> tuple[int, tuple[slice, ...]]:
    return 1, tuple(slice(*bounds) for bounds in part)


def inputs_of(entry: Entry, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arrays of an entry's ``inputs``; those that a term has a gradient for require it, and a teacher's answers."""
    needed = {name for term in entry.get("terms", {}).values() for name in term.get("gradients", {})}
    needed |= _TEACHERS
    found = {}
    for name, spec in entry["inputs"].items():
        tensor = torch.from_numpy(np.asarray(spec) if isinstance(spec, list) else array(spec))
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        found[name] = tensor.requires_grad_() if name in needed else tensor
    return found


def fill(network: nn.Module) -> nn.Module:
    """Give every parameter and running statistic its value by shape and kind, and switch to evaluation mode."""
    for module in network.modules():
        normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            numbers = np.arange(values.numel(), dtype=np.int64)
            if name == "num_batches_tracked":
                continue
            if name == "bias":
                filled = 0.1 * pseudo(numbers + 2000)
            elif name == "running_mean":
                filled = 0.1 * pseudo(numbers + 3000)
            elif name == "running_var":
                filled = 1 + 0.5 * pseudo(numbers + 4000)
            elif normalizes:
                filled = 1 + 0.25 * pseudo(numbers + 1000)
            else:
                assert name == "weight", name
                filled = pseudo(numbers) * math.sqrt(6 / (values.numel() / values.shape[0]))
            with torch.no_grad():
                values.copy_(torch.from_numpy(filled).view(values.shape))
    return network.eval()


def image(shape: Sequence[int]) -> Tensor:
    """The networks' input of a shape ``(B, C, *spatial)``, float64."""
    row, channel, *places = np.indices(shape).astype(np.float64)
    phase = sum((0.31 + 0.17 * axis + 0.05 * row + 0.03 * channel) * x for axis, x in enumerate(places))
    wave = np.sin(phase + 0.5 * row + 0.25 * channel) + 0.5 * np.cos(0.7 * places[0] - 0.4 * places[-1] + row)
    return torch.from_numpy(wave)


def projection(values: Tensor, *, mean: bool = False) -> float:
    """Sum (or mean) over flat indices n of value times ``u(n)``."""
    flat = values.detach().double().flatten().numpy()
    total = float(flat @ pseudo(np.arange(flat.size, dtype=np.int64)))
    return total / flat.size if mean else total


def apart(ours: float, theirs: float) -> float:
    """Difference relative to their value, absolute where that is 0."""
    return abs(ours - theirs) / (abs(theirs) or 1.0)


def list_apart(ours: Sequence[float], theirs: Sequence[float], *, scale: float | None = None) -> float:
    """Largest difference of two lists, relative to their largest absolute value, or ``scale``."""
    a, b = np.asarray(ours, dtype=np.float64).ravel(), np.asarray(theirs, dtype=np.float64).ravel()
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max()) / (scale or float(np.abs(b).max()) or 1.0)


@dataclass(frozen=True)
class Compared:
    """One comparison.

    Attributes:
        term: Of the entry.
        what: Of the term: ``value``, ``values``, ``gradient of <input>`` and so on.
        difference: Between ours and theirs, infinite where theirs is not a number.
        ours: Our numbers, where the term has any but gradients.
    """

    term: str
    what: str
    difference: float
    ours: tuple[float, ...] = ()


def numbers_of(ours: Any) -> tuple[float, ...]:
    """A scalar, list, array or tensor as plain numbers, flat."""
    return tuple(torch.as_tensor(ours).detach().double().flatten().tolist())


def compared_term(name: str, term: Term, ours: Any, inputs: Mapping[str, Tensor]) -> Iterator[Compared]:
    """What is compared in a term of ``losses.json``: value or values, and the gradient of every input.

    Args:
        name: Of the term.
        term: Of the file.
        ours: Scalar tensor, number, or list of numbers.
        inputs: Of :func:`inputs_of`, of which ``ours`` was computed.
    """
    numbers = numbers_of(ours)
    if "values" in term:
        yield Compared(name, "values", list_apart(numbers, np.ravel(term["values"]).tolist()), numbers)
        return
    yield Compared(name, "value", apart(numbers[0], term["value"]), numbers)
    gradients = term.get("gradients")
    if gradients is None:
        return
    assert isinstance(ours, Tensor)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    computed = torch.autograd.grad(ours, list(leaves.values()), allow_unused=True, retain_graph=True)
    for (leaf, tensor), gradient in zip(leaves.items(), computed, strict=True):
        found = torch.zeros_like(tensor) if gradient is None else gradient
        if leaf in gradients:
            yield Compared(name, f"gradient of {leaf}", _gradient_apart(found, gradients[leaf]))
        else:
            yield Compared(name, f"no gradient of {leaf}", float(found.abs().max()))


def _gradient_apart(ours: Tensor, theirs: Mapping[str, Any]) -> float:
    norm = theirs["l2"] or 1.0
    flat = ours.double().flatten()
    listed = [*theirs["first"], *theirs["last"]]
    scale = max(*map(abs, listed), norm / math.sqrt(flat.numel()))
    return max(
        apart(float(flat.norm()), theirs["l2"]),
        abs(projection(ours) - theirs["projection"]) / norm,
        list_apart([*flat[:5].tolist(), *flat[-5:].tolist()], listed, scale=scale),
    )
