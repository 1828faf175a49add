"""What every method of the catalogue must do, in 2D and 3D, in fp32 and bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Stage, Task
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
METHODS = [entry.name for entry in catalogue.CATALOGUE]
STEPS = 30


def make_batch(dims: int, device: str, seed: int = 0) -> Batch:
    """Bright boxes on a noisy ground: enough to learn something in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(4, *(16,) * dims, dtype=torch.long)
    for row, start in enumerate(torch.randint(2, 6, (4,), generator=generator).tolist()):
        labels[(row, *(slice(start, start + 8),) * dims)] = 1
    images = labels[:, None] + 0.3 * torch.randn(4, 1, *(16,) * dims, generator=generator)
    images, labels = images.to(device), labels.to(device)
    x, u, y = images[:2], images[2:], labels[:2]
    return Batch(x, y, u, x, y, u, ("a", "b"), ("c", "d"))


def make_method(name: str, dims: int, device: str = "cpu") -> Method:
    task = Task(1, ("background", "box"), dims, (16,) * dims, "unet", {"widths": [8, 16], "dropout": [0.0, 0.1]})
    torch.manual_seed(0)
    method_class = catalogue.load(name)
    method = method_class(task, method_class.Config()).to(device).train()
    method.generator = torch.Generator(device).manual_seed(0)
    return method


def run(method: Method, dims: int, device: str, bf16: bool, steps: range, handles: TrainingHandles) -> list[float]:
    batch = make_batch(dims, device)
    sums = []
    for iteration in steps:
        progress = Progress(iteration, STEPS, method.stages()[0].name, iteration, STEPS)
        handles.set_iteration(iteration)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.step(batch, progress, handles)
        method.after_step(progress)
        sums.append(float(sum(value.detach() for value in terms.values())))
    return sums


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_stays_finite(name, dims, bf16, device):
    method = make_method(name, dims, device)
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.05), STEPS)
    sums = run(method, dims, device, bf16, range(STEPS), handles)
    assert all(torch.isfinite(torch.tensor(sums)))
    assert sum(sums[-5:]) < 0.7 * sum(sums[:5])
    batch = make_batch(dims, device)
    with torch.no_grad():
        logits = method.predictor.eval()(batch.labeled)
    assert logits.shape == (2, 2, *(16,) * dims)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(name, dims, bf16, monkeypatch):
    method = make_method(name, dims)
    handles = TrainingHandles(method, Stage(), TrainingSection(), STEPS)
    seen = {}

    def update(self, optimizer="main"):
        seen.update({key: p.grad for key, p in method.named_parameters() if p.grad is not None})

    monkeypatch.setattr(TrainingHandles, "update", update)
    run(method, dims, "cpu", bf16, range(STEPS - 1, STEPS), handles)
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    assert set(seen) == trained
    # a bias before a normalization has no gradient but rounding; everything else must have one
    silent = {key for key, grad in seen.items() if not grad.abs().sum() > 0}
    assert not {key for key in silent if not key.endswith("bias")}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_in_the_middle_it_goes_on_the_same(name, dims):
    method = make_method(name, dims)
    handles = TrainingHandles(method, Stage(), TrainingSection(), STEPS)
    run(method, dims, "cpu", False, range(5), handles)
    saved = {key: value.clone() for key, value in method.state_dict().items()}
    optimizers, generators = copy.deepcopy(handles.state_dict()), (method.generator.get_state(), torch.get_rng_state())
    straight = run(method, dims, "cpu", False, range(5, 10), handles)

    other = make_method(name, dims)
    other.load_state_dict(saved, strict=True)
    others = TrainingHandles(other, Stage(), TrainingSection(), STEPS)
    others.load_state_dict(optimizers)
    other.generator.set_state(generators[0])
    torch.set_rng_state(generators[1])
    assert run(other, dims, "cpu", False, range(5, 10), others) == straight
    for key, value in method.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", ["unet3d", "vnet", "dynunet"])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_every_network_of_ours(name, network, dims):
    topology = {"kernel_sizes": [[1] + [3] * (dims - 1), [3] * dims], "strides": [[1] * dims, [2] * dims]}
    arguments = {"widths": [8, 16], **(topology if network == "dynunet" else {})}
    torch.manual_seed(0)
    method_class = catalogue.load(name)
    task = Task(1, ("background", "box"), dims, (16,) * dims, network, arguments)
    method = method_class(task, method_class.Config()).train()
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.05), STEPS)
    sums = run(method, dims, "cpu", False, range(10), handles)
    assert all(torch.isfinite(torch.tensor(sums)))
    assert sums[-1] < sums[0]
    with torch.no_grad():
        assert method.predictor.eval()(make_batch(dims, "cpu").labeled).shape == (2, 2, *(16,) * dims)


@pytest.mark.parametrize("name", METHODS)
def test_the_predictor_stands_alone(name):
    """Its weights, loaded into a fresh method's predictor, give the same logits."""
    method, other = make_method(name, 2), make_method(name, 2)
    run(method, 2, "cpu", False, range(3), TrainingHandles(method, Stage(), TrainingSection(), STEPS))
    other.predictor.load_state_dict(method.predictor.state_dict(), strict=True)
    images = make_batch(2, "cpu").labeled
    assert torch.equal(other.predictor.eval()(images), method.predictor.eval()(images))
