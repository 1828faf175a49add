"""Our methods with networks that answer what they are told, in float32 as they are or in double precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Task

DTYPES = {"float64": torch.float64, "float32": torch.float32}
TINY: dict[str, Any] = {"widths": [2, 2, 2], "dropout": [0.0, 0.0, 0.0]}


@contextmanager
def computed_in(precision: str) -> Iterator[torch.dtype]:
    """``float32``: nothing changes. ``float64``: new tensors are double, and what our code converts to float32 too."""
    dtype, before = DTYPES[precision], torch.get_default_dtype()
    if precision == "float32":
        yield dtype
        return
    torch.set_default_dtype(dtype)
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def recorded(place: Any, name: str) -> Iterator[list[Any]]:
    """What a function of a module or class returns within the block, in order."""
    original, results = getattr(place, name), list[Any]()

    def spy(*arguments: Any, **options: Any) -> Any:
        results.append(original(*arguments, **options))
        return results[-1]

    with mock.patch.object(place, name, spy):
        yield results


@contextmanager
def arguments_of(place: Any, name: str) -> Iterator[list[Any]]:
    """The first argument of each call of a function within the block."""
    original, received = getattr(place, name), list[Any]()

    def spy(*arguments: Any, **options: Any) -> Any:
        received.append(arguments[0])
        return original(*arguments, **options)

    with mock.patch.object(place, name, spy):
        yield received


class Rows(nn.Module):
    """A network whose answer to an image is a row of a table; the image's values are the row's number.

    So it does not matter in how many passes, and in which order, a method asks.
    """

    def __init__(self, *tables: Tensor) -> None:
        super().__init__()
        self.table = torch.cat(tables)

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images.detach().flatten(1)[:, 0].round().long()]

    deep_supervision = False

    def encode(self, images: Tensor) -> list[Tensor]:
        return [images]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        answer: Tensor = self(features[0])
        return answer


class DecodedRows(Rows):
    """A decoder, to be followed by a head that changes nothing."""

    def forward(self, features: Any) -> Any:
        return [super().forward(features[0])]


class Answers(nn.Module):
    """A network that gives one answer after the other, whatever it is asked."""

    def __init__(self, *answers: Any) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, *asked: Any) -> Any:
        return self.answers.pop(0)


class Shift(nn.Module):
    """Adds to the number of a row, which then stands for the perturbed one."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, features: Tensor) -> Tensor:
        return features + self.rows


def numbered(first: int, count: int, space: Sequence[int]) -> Tensor:
    """Images that hold the numbers ``first``, ``first + 1``, ..., ``(count, 1, *space)``."""
    numbers = torch.arange(first, first + count, dtype=torch.get_default_dtype())
    return numbers.view(-1, *[1] * (len(space) + 1)).expand(-1, 1, *space).clone()


def batch_of(labels: Tensor, labeled: int, unlabeled: int) -> Batch:
    """A step's data: images numbered from 0 on, labeled rows first.

    Args:
        labels: Of the labeled rows at least, ``(B, *spatial)``.
        labeled: Number of labeled rows.
        unlabeled: Number of unlabeled rows.
    """
    space = labels.shape[1:]
    one, other = numbered(0, labeled, space), numbered(labeled, unlabeled, space)
    return Batch(one, labels[:labeled], other, one, labels[:labeled], other)


def task_of(classes: int, space: Sequence[int], network: str = "unet", arguments: Any = None) -> Task:
    """A task of one channel with so many classes, background included, and patches of this size."""
    names = ("background", *(f"class {number}" for number in range(1, classes)))
    dims: Any = len(space)
    return Task(1, names, dims, tuple(space), network, TINY if arguments is None else arguments)


def method_of(name: str, classes: int, space: Sequence[int], **settings: Any) -> Method:
    """A method of the catalogue with its defaults but for these settings, on a tiny network that will be replaced."""
    kind = catalogue.load(name)
    method: Method = kind(task_of(classes, space), kind.Config(**settings))
    return method


def total(terms: dict[str, Tensor]) -> Tensor:
    """What a method minimizes."""
    return torch.stack(list(terms.values())).sum()
