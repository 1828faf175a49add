"""Trainings of single steps on one process and on two, which see the same images and the same random numbers.

On two ranks each number that a method draws from its generator is a part of what one process draws for both batches.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts import arco_contrast, patch_contrast
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.methods.parts.samplers import candidates
from scantly.networks.batch_norm import synchronize_batch_norm
from scantly.ranks import rank, world_size
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.views import mix, thin_plate

RANKS, SIDE, STEPS, TOTAL = 2, 8, 3, 10
CLASSES = ("background", "a", "b")


@dataclass(frozen=True)
class Case:
    """One method with settings.

    Attributes:
        name: Of the catalogue.
        settings: Of the method.
        dims: 2 or 3.
        unlabeled: Unlabeled rows of each rank.
        labeled: Labeled rows of each rank.
        whole: Settings that one process has instead.
        levels: Levels of the network.
        stages: Names of the stages that are run; none: all.
        by_rank: Settings that differ between the ranks, for :func:`states`.
        blind: The first rank finds no patch, for :func:`states`.
        every_class: The first rank's labels hold the last class too.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    dims: int = 2
    labeled: int = 2
    unlabeled: int = 3
    whole: dict[str, Any] = field(default_factory=dict)
    levels: int = 2
    stages: tuple[str, ...] | None = None
    by_rank: tuple[dict[str, Any], ...] = ({}, {})
    blind: bool = False
    every_class: bool = False

    def __str__(self) -> str:
        told = "-".join(f"{key}={value}" for key, value in self.settings.items() if not isinstance(value, dict))
        return f"{self.name}-{self.dims}d-{told}"[:80]


# Images


def make_rows(count: int, dims: int, seed: int, classes: int) -> tuple[Tensor, Tensor]:
    """Noisy images in which the classes are bright boxes, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, *(SIDE,) * dims, dtype=torch.long)
    for row, start in enumerate(torch.empty(count).uniform_(0, 3, generator=generator).long().tolist()):
        for label in range(1, classes):
            first = start + 2 * (label - 1)
            labels[(row, *(slice(first, first + 3),) * dims)] = label
    noise = torch.empty(count, 1, *(SIDE,) * dims).normal_(generator=generator)  # not what a method draws
    images = labels[:, None] / 2 + 0.5 * noise
    return images, labels


def batch_of(case: Case, stage: Any, number: int, step: int) -> Batch:
    """What one rank sees; the first one has no voxel of the last class among its labels."""
    seed = 1000 * number + 10 * step
    counts = [
        case.labeled if stage.labeled.count is None else stage.labeled.count,
        case.unlabeled if stage.unlabeled.count is None else stage.unlabeled.count,
        0 if stage.extra.count is None else stage.extra.count,
    ]
    lacks = number == 0 and not case.every_class
    (x, y), (u, guessed), (e, z) = (
        make_rows(count, case.dims, seed + kind, len(CLASSES) - (lacks and kind != 1))
        for kind, count in enumerate(counts)
    )
    batch = Batch(x, y, u, x, y, u)
    if stage.relabel or stage.name.startswith("round"):
        batch.pseudo_labels = batch.pseudo_labels_raw = guessed
    if len(e):
        batch.extra, batch.extra_labels = e, z
    return batch


def joined(case: Case, batches: list[Batch]) -> Batch:
    """All ranks' rows; ICT's pairs stay together."""

    def rows(name: str) -> Any:
        values = [getattr(batch, name) for batch in batches]
        if values[0] is None or not isinstance(values[0], Tensor):
            return values[0]
        if case.name == "ict" and name.startswith("unlabeled"):
            half = len(values[0]) // 2
            values = [value[:half] for value in values] + [value[half:] for value in values]
        return torch.cat(values)

    return Batch(**{name: rows(name) for name in Batch.__dataclass_fields__})


# Random numbers


def blocks_of(case: Case, count: int) -> list[int] | None:
    """What a draw of so many rows is for: parts whose rows of all ranks are neighbors; none: shared by all rows."""
    labeled, unlabeled = case.labeled, case.unlabeled
    known = {labeled: [labeled], unlabeled: [unlabeled], labeled + unlabeled: [labeled, unlabeled]}
    known[2 * unlabeled] = [unlabeled, unlabeled]
    if case.name == "lclpl":
        pairs = case.settings["pairs"]
        known |= {2 * pairs: [pairs] * 2, 4 * pairs: [2 * pairs] * 2}  # views; sets of two classes
    return None if count == 1 else known[count]


def own_part(blocks: list[int], number: int) -> Tensor:
    """Which of the whole batch's rows are one rank's."""
    places, first = [], 0
    for block in blocks:
        places.append(torch.arange(block) + first + number * block)
        first += RANKS * block
    return torch.cat(places)


@contextmanager
def same_draws(case: Case) -> Iterator[None]:
    """Within it random numbers and samples are parts of the same numbers on one process and on two."""
    generator, alone = torch.Generator().manual_seed(5), world_size() == 1

    def drawn(original: Any, position: int) -> Any:
        def draw(*args: Any, generator: torch.Generator | None = None, **keywords: Any) -> Tensor:
            if generator is None:
                return original(*args, **keywords)
            size = args[position] if not isinstance(args[position], int) else (args[position],)
            blocks = blocks_of(case, size[0]) if len(size) and not alone else None
            if blocks is None:
                return original(*args, generator=shared, **keywords)
            whole = [*args]
            whole[position] = (RANKS * size[0], *size[1:])
            return original(*whole, generator=shared, **keywords)[own_part(blocks, rank())]

        return draw

    shared = generator
    gamma, next_row, basis = torch._standard_gamma, mix._next_row, thin_plate._spline_basis

    def gammas(alpha: Tensor, generator: torch.Generator) -> Tensor:
        if alone:
            return gamma(alpha, generator=shared)
        return gamma(alpha.repeat(1, RANKS), generator=shared).chunk(RANKS, 1)[rank()]

    def next_rows(count: int, device: torch.device) -> Tensor:
        if not alone:
            return next_row(count, device)
        own = next_row(case.unlabeled, device)  # boxes show images of the rank's own batch
        return torch.cat([own + number * case.unlabeled for number in range(RANKS)])

    changed = {"rand": 0, "randn": 0, "randint": 2}
    with ExitStack() as stack:
        for name, position in changed.items():
            stack.enter_context(patch.object(torch, name, drawn(getattr(torch, name), position)))
        stack.enter_context(patch.object(torch, "_standard_gamma", gammas))
        stack.enter_context(patch.object(mix, "_next_row", next_rows))
        stack.enter_context(patch.object(thin_plate, "_spline_basis", lambda *args: basis(*args).double()))
        if case.name == "arco":
            stack.enter_context(same_samples(case))
        if case.name == "plgcl":
            stack.enter_context(same_patches(case))
        yield


@contextmanager
def same_samples(case: Case) -> Iterator[None]:
    """ARCO: each rank draws from its own voxels; one process has the draws of all ranks, rank after rank.

    A rank without candidates of a class does not count, so one process has those of the other one twice.
    """
    calls, alone, push = itertools.count(), world_size() == 1, MemoryBank.push
    lacking: list[Tensor] = []

    def picked(found: Any, call: int, number: int, draws: int) -> Tensor:
        return found.pick(places(found.counts, call, number, draws))

    def places(counts: Tensor, call: int, number: int, draws: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * call + number)
        positions = torch.empty(len(counts), draws, dtype=torch.float64).uniform_(generator=generator)
        return torch.minimum((positions * counts[:, None]).long(), (counts[:, None] - 1).clamp(min=0))

    def voxels_of(number: int, voxels: int) -> Tensor:
        rows = own_part([case.labeled, case.unlabeled], number)
        each = voxels // (RANKS * (case.labeled + case.unlabeled))
        return (rows[:, None] * each + torch.arange(each)).flatten()

    def together(own: list[Tensor]) -> Tensor:
        return torch.cat([torch.where(lacking[n][:, None], own[1 - n], own[n]) for n in range(RANKS)], dim=1)

    def sample(kind: str, masks: Tensor, draws: int, *_: Any, permute: bool = False, **__: Any) -> Any:
        call = next(calls)
        if not alone:
            found = candidates(masks)
            return picked(found, call, rank(), draws), found.counts
        where = [voxels_of(number, masks.shape[1]) for number in range(RANKS)]
        found = [candidates(masks[:, index]) for index in where]
        own = [where[n][picked(found[n], call, n, draws // RANKS)] for n in range(RANKS)]
        if not permute:  # the anchors, which come first
            lacking[:] = [each.counts == 0 for each in found]
            seen.append(torch.stack(lacking).any(0).sum().item())
        return together(own), found[0].counts + found[1].counts

    def draw_ranks(kind: str, counts: Tensor, draws: int, *_: Any, **__: Any) -> Tensor:
        call = next(calls)
        if not alone:
            return places(counts, call, rank(), draws)
        return together([places(counts, call, number, draws // RANKS) for number in range(RANKS)])

    def in_order_of_ranks(self: MemoryBank, rows: Tensor, keep: Tensor | None = None) -> None:
        if alone and keep is not None:
            order = torch.cat([voxels_of(number, len(rows)) for number in range(RANKS)])
            rows, keep = rows[order], keep[order]
        push(self, rows, keep)

    with (
        patch.object(arco_contrast, "sample", sample),
        patch.object(arco_contrast, "draw_ranks", draw_ranks),
        patch.object(MemoryBank, "push", in_order_of_ranks),
    ):
        yield


@contextmanager
def same_patches(case: Case) -> Iterator[None]:
    """PLGCL's warm-up: views are the patches themselves, in turn; one process has those of all ranks."""
    alone, crop = world_size() == 1, patch_contrast.crop
    images: list[Tensor] = []

    def cropped(*args: Any) -> Tensor:
        images[:] = [args[2].image]
        return crop(*args)

    def resample(counts: Any, number: int, *, generator: torch.Generator) -> Tensor:
        each, index, first = number // RANKS if alone else number, [], 0
        for count in counts:
            places = torch.arange(first, first + count)
            owners = images[0][places] // case.labeled if alone else torch.zeros_like(places)
            found = [places[owners == number] for number in range(RANKS if alone else 1)]
            index += [own[torch.arange(each) % len(own)] for own in found] if count else []
            first += count
        return torch.cat(index)

    with (
        patch.object(patch_contrast, "crop", cropped),
        patch.object(patch_contrast, "resample", resample),
        patch.object(patch_contrast, "augment", lambda patches, generator: patches),
    ):
        yield


#: ARCO on one process: classes without an anchor on one of the ranks, for each step.
seen: list[float] = []


# Training


class Recording(TrainingHandles):
    """Keeps the gradient of every update."""

    def __init__(self, method: Method, *args: Any) -> None:
        super().__init__(method, *args)
        self.names = {id(p): name for name, p in method.named_parameters()}
        self.gradients: list[dict[str, Tensor]] = []

    def update(self, name: str = "main") -> None:
        self.average_gradients(name)
        found = {self.names[id(p)]: p.grad for p in self._parameters(name) if p.grad is not None}
        self.gradients.append({key: value.clone() for key, value in found.items()})
        super().update(name)


def make(case: Case, dropout: float = 0.0, **settings: Any) -> Method:
    """A method in train mode; the same weights on every rank."""
    torch.manual_seed(0)
    arguments = {"widths": [4, 8, 8][: case.levels], "dropout": [dropout] * case.levels}
    task = Task(1, CLASSES, case.dims, (SIDE,) * case.dims, "unet", arguments)
    kind = catalogue.load(case.name)
    method = kind(task, kind.Config(**{**case.settings, **settings}))
    method.to(torch.get_default_dtype()).train()
    method.generator.manual_seed(0)
    if world_size() > 1:
        synchronize_batch_norm(method)
    return method


def double_pairs(method: Any, case: Case) -> None:
    """LCLPL on one process: the pairs of both ranks."""
    pairs = method.pairs

    def place(index: int, number: int) -> int:
        if index < pairs.labeled:
            return number * pairs.labeled + index
        return RANKS * pairs.labeled + number * pairs.unlabeled + index - pairs.labeled

    halves = [[place(i, n) for n in range(RANKS) for i in half] for half in (pairs.first, pairs.second)]
    method.members = torch.tensor(halves[0] + halves[1])


def gradients(case: Case) -> dict[str, Any]:
    """Gradients of every update and the weights after each stage, all in float64 without dropout."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    seen.clear()
    try:
        with patch.object(torch.Tensor, "float", torch.Tensor.double), same_draws(case):
            return _gradients(case)
    finally:
        torch.set_default_dtype(before)


def _gradients(case: Case) -> dict[str, Any]:
    alone = world_size() == 1
    method = make(case, **(case.whole if alone else {}))
    for module in method.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    found: dict[str, Any] = {}
    for stage in method.stages():
        if case.stages is not None and stage.name not in case.stages:
            continue
        method.enter_stage(stage, first=True)
        if alone and case.name == "lclpl":
            double_pairs(method, case)
        handles = Recording(method, stage, TrainingSection(lr=0.01), TOTAL)
        for step in range(STEPS):
            progress = Progress(TOTAL - STEPS + step, TOTAL, stage.name, TOTAL - STEPS + step, TOTAL)
            batches = [batch_of(case, stage, number, step) for number in range(RANKS)]
            method.step(joined(case, batches) if alone else batches[rank()], progress, handles)
            method.after_step(progress)
        found[stage.name] = {
            "gradients": handles.gradients,
            "state": {key: value.clone() for key, value in method.state_dict().items()},
        }
    return found


def states(case: Case) -> dict[str, dict[str, str]]:
    """Digest of all that a method holds after three steps of each stage, with images and draws of this rank's own."""
    method = make(case, dropout=0.1, **case.by_rank[rank()])
    method.generator.manual_seed(10 + rank())
    torch.manual_seed(20 + rank())
    found = {}
    boxes_of = patch_contrast.class_boxes

    def none(*args: Any) -> Any:
        boxes, coverage = boxes_of(*args)
        return boxes.take(torch.arange(0), [0] * len(CLASSES)), coverage[:0]

    with patch.object(patch_contrast, "class_boxes", none if case.blind and rank() == 0 else boxes_of):
        for stage in method.stages():
            method.enter_stage(stage, first=True)
            handles = TrainingHandles(method, stage, TrainingSection(lr=0.01), TOTAL)
            for step in range(STEPS):
                progress = Progress(TOTAL - STEPS + step, TOTAL, stage.name, TOTAL - STEPS + step, TOTAL)
                terms = method.step(batch_of(case, stage, rank(), step), progress, handles)
                method.after_step(progress)
                assert all(value.isfinite() for value in [*terms.values(), *method.pop_logged().values()])
            found[stage.name] = {
                key: hashlib.sha256(value.contiguous().flatten().view(torch.uint8).numpy()).hexdigest()
                for key, value in method.state_dict().items()
            }
    return found
