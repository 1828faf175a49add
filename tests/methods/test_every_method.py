"""What every method of the catalogue must do, in 2D and 3D, in fp32 and bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Stage, Task
from scantly.networks.precision import emulates_bf16
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from small_methods import LEVELS, SMALL

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
METHODS = [entry.name for entry in catalogue.CATALOGUE]
STEPS = 30
STAGE = Stage()


def make_rows(count: int, dims: int, device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright boxes on a noisy ground: enough to learn something in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, *(16,) * dims, dtype=torch.long)
    for row, start in enumerate(torch.randint(2, 6, (count,), generator=generator).tolist()):
        labels[(row, *(slice(start, start + 8),) * dims)] = 1
    images = labels[:, None] + 0.3 * torch.randn(count, 1, *(16,) * dims, generator=generator)
    return images.to(device), labels.to(device)


def make_batch(dims: int, device: str, stage: Stage = STAGE, *, relabeled: bool = False) -> Batch:
    """A batch as the stage asks for it; a plan would give two rows of each kind."""
    counts = [2 if rows.count is None else rows.count for rows in (stage.labeled, stage.unlabeled, stage.extra)]
    (x, y), (u, pseudo), (extra, extra_labels) = (
        make_rows(count, dims, device, seed) for seed, count in enumerate(counts)
    )
    batch = Batch(x, y, u, x, y, u, tuple("a" * len(x)), tuple("c" * len(u)))
    if relabeled:
        batch.pseudo_labels = batch.pseudo_labels_raw = pseudo
    if len(extra):
        batch.extra, batch.extra_labels = extra, extra_labels
    return batch


def make_method(name: str, dims: int, device: str = "cpu", network: str = "unet", **arguments: object) -> Method:
    levels = LEVELS.get(name, 2)
    arguments = arguments or {"widths": [8, 16, 32][:levels], "dropout": [0.0, 0.1, 0.1][:levels]}
    task = Task(1, ("background", "box"), dims, (16,) * dims, network, arguments)
    torch.manual_seed(0)
    method_class = catalogue.load(name)
    method = method_class(task, method_class.Config(**SMALL.get(name, {}))).to(device).train()
    method.generator = torch.Generator(device).manual_seed(0)
    return method


class Training:
    """All stages of a method on one batch each, ``STEPS`` iterations of every stage."""

    def __init__(self, method: Method, dims: int, device: str = "cpu", *, bf16: bool = False, lr: float = 0.05) -> None:
        self.method, self.dims, self.device, self.bf16 = method, dims, device, bf16
        self.settings = TrainingSection(lr=lr)

    def enter(self, stage: Stage, *, first: bool = True) -> TrainingHandles:
        stages = self.method.stages()
        self.method.enter_stage(stage, first=first)
        relabeled = any(s.relabel for s in stages[: [s.name for s in stages].index(stage.name) + 1])
        self.batch = make_batch(self.dims, self.device, stage, relabeled=relabeled)
        self.handles = TrainingHandles(self.method, stage, self.settings, STEPS)
        return self.handles

    def run(self, stage: Stage, steps: range) -> list[float]:
        """The sum of the losses at each step."""
        sums = []
        for iteration in steps:
            progress = Progress(iteration, STEPS, stage.name, iteration, STEPS)
            self.handles.set_iteration(iteration)
            with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16, cache_enabled=False):
                terms = self.method.step(self.batch, progress, self.handles)
            self.method.after_step(progress)
            sums.append(float(sum(value.detach() for value in terms.values())))
        return sums


def foreground_dice(method: Method, batch: Batch) -> float:
    modes = [(module, module.training) for module in method.modules()]
    with torch.no_grad():
        found = method.predictor.eval()(batch.labeled).argmax(1) == 1
    for module, training in modes:
        module.training = training
    truth = batch.labels == 1
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_stays_finite(name, dims, bf16, device):
    method = make_method(name, dims, device)
    training = Training(method, dims, device, bf16=bf16)
    # Where bf16 is emulated a step in 3D takes seconds: the first ones are looked at, whether they are finite.
    few = bf16 and dims == 3 and emulates_bf16(device)
    for stage in method.stages():
        training.enter(stage)
        sums = training.run(stage, range(3 if few else STEPS))
        assert all(torch.isfinite(torch.tensor(sums))), stage.name
    assert few or foreground_dice(method, training.batch) > 0.7
    with torch.no_grad():
        logits = method.predictor.eval()(training.batch.labeled)
    assert logits.shape == (len(training.batch.labeled), 2, *(16,) * dims)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(name, dims, bf16, monkeypatch):
    method = make_method(name, dims)
    training = Training(method, dims, bf16=bf16)
    seen = {}
    update = TrainingHandles.update

    def watched(self, optimizer="main"):
        seen.update({key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None})
        update(self, optimizer)

    for stage in method.stages():
        handles = training.enter(stage)
        training.run(stage, range(STEPS - 3, STEPS - 1))  # so that banks hold something
        seen.clear()
        monkeypatch.setattr(TrainingHandles, "update", watched)
        training.run(stage, range(STEPS - 1, STEPS))
        monkeypatch.setattr(TrainingHandles, "update", update)
        trained = {id(p) for optimizer in handles.rates() for p in handles._parameters(optimizer)}
        names = {key for key, p in method.named_parameters() if id(p) in trained}
        assert set(seen) == names, stage.name
        # a bias before a normalization has no gradient but rounding; everything else must have one
        silent = {key for key, grad in seen.items() if not grad.abs().sum() > 0}
        assert not {key for key in silent if not key.endswith("bias")}, stage.name


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_in_the_middle_it_goes_on_the_same(name, dims):
    method = make_method(name, dims)
    training = Training(method, dims)
    for stage in method.stages():
        handles = training.enter(stage)
        training.run(stage, range(5))
        saved = {key: value.clone() for key, value in method.state_dict().items()}
        optimizers = copy.deepcopy(handles.state_dict())
        generators = (method.generator.get_state(), torch.get_rng_state())
        straight = training.run(stage, range(5, 10))

        other = make_method(name, dims)
        other.load_state_dict(saved, strict=True)
        other.generator.set_state(generators[0])
        resumed = Training(other, dims)
        resumed.enter(stage, first=False).load_state_dict(optimizers)
        torch.set_rng_state(generators[1])
        assert resumed.run(stage, range(5, 10)) == straight, stage.name
        for key, value in method.state_dict().items():
            assert torch.equal(other.state_dict()[key], value), (stage.name, key)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", ["unet3d", "vnet", "dynunet"])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_every_network_of_ours(name, network, dims):
    levels = LEVELS.get(name, 2)
    kernels = [[1] + [3] * (dims - 1), *[[3] * dims] * (levels - 1)]
    topology = {"kernel_sizes": kernels, "strides": [[1] * dims, *[[2] * dims] * (levels - 1)]}
    widths = [8, 16, 32][:levels]
    method = make_method(name, dims, "cpu", network, widths=widths, **(topology if network == "dynunet" else {}))
    training = Training(method, dims)
    for stage in method.stages():
        training.enter(stage)
        sums = training.run(stage, range(5))
        assert all(torch.isfinite(torch.tensor(sums))), stage.name
    with torch.no_grad():
        assert method.predictor.eval()(make_batch(dims, "cpu").labeled).shape == (2, 2, *(16,) * dims)


@pytest.mark.parametrize("name", METHODS)
def test_the_predictor_stands_alone(name):
    """Its weights, loaded into a fresh method's predictor, give the same logits."""
    method, other = make_method(name, 2), make_method(name, 2)
    training, stage = Training(method, 2), method.stages()[0]
    training.enter(stage)
    training.run(stage, range(3))
    other.predictor.load_state_dict(method.predictor.state_dict(), strict=True)
    images = make_batch(2, "cpu").labeled
    assert torch.equal(other.predictor.eval()(images), method.predictor.eval()(images))
