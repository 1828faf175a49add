import pytest
import torch
from torch import nn

from scantly.errors import ConfigError
from scantly.methods.base import Method, MethodConfig, OptimizerSpec, Stage, Task
from scantly.ranks import rank
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles, learning_rate
from two_ranks import run_on_two_ranks


def test_poly_values_of_the_specification():
    settings = TrainingSection()

    def rate(t):
        return 0.01 * learning_rate("poly", t + 1, 30_000, settings)  # advanced after each step

    assert rate(0) == pytest.approx(0.01)
    assert rate(7_500) == pytest.approx(0.0077189, abs=1e-7)
    assert rate(15_000) == pytest.approx(0.0053589, abs=1e-7)
    assert learning_rate("poly", 0, 30_000, settings) == learning_rate("poly", 1, 30_000, settings) == 1.0
    assert learning_rate("poly", 29_999, 30_000, settings) > 0


def test_step_schedule_cuts_after_2500_and_5000_of_6000():
    settings = TrainingSection()
    factors = [learning_rate("step", t, 6_000, settings) for t in (0, 2_499, 2_500, 4_999, 5_000)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])


class Adversaries(Method):
    """Two networks, each with its own optimizer."""

    def __init__(self):
        super().__init__(Task(1, ("b", "a"), 2, (16, 16)), MethodConfig())
        self.g, self.d = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)

    def losses(self, batch, progress):
        return {}

    @property
    def predictor(self):
        return self.g

    def optimizers(self, stage):
        return {
            "g": OptimizerSpec(self.g.parameters()),
            "d": OptimizerSpec(self.d.parameters(), name="adam", lr=1e-3, schedule="constant"),
        }


def test_named_backward_keeps_the_other_network_clean():
    method = Adversaries()
    handles = TrainingHandles(method, Stage(), TrainingSection(), 10)
    handles.backward(method.d(method.g(torch.ones(1, 2))).sum(), "g")
    assert method.g.weight.grad is not None
    assert method.d.weight.grad is None
    before = method.d.weight.clone()
    handles.update("g")
    assert method.g.weight.grad is None
    assert torch.equal(method.d.weight, before)


def test_each_optimizer_has_its_own_schedule_and_state():
    method = Adversaries()
    handles = TrainingHandles(method, Stage(), TrainingSection(), 10)
    handles.set_iteration(6)
    assert handles.rates()["d"] == 1e-3
    assert handles.rates()["g"] == pytest.approx(0.01 * 0.5**0.9)
    handles.backward(method.d(method.g(torch.ones(1, 2))).sum())
    handles.update("d")
    state = handles.state_dict()
    other = TrainingHandles(Adversaries(), Stage(), TrainingSection(), 10)
    other.load_state_dict(state)
    assert other.state_dict()["d"]["state"].keys() == state["d"]["state"].keys()


def test_clipping_bounds_the_norm_per_optimizer():
    method = Adversaries()
    handles = TrainingHandles(method, Stage(), TrainingSection(gradient_clip=0.5, momentum=0, weight_decay=0), 10)
    before = method.g.weight.detach().clone()
    handles.backward(1000 * method.g(torch.ones(1, 2)).sum(), "g")
    handles.update("g")
    assert (method.g.weight - before).norm().item() == pytest.approx(0.01 * 0.5, rel=1e-4)


def averaged():
    """Rank 0 adds gradients of ones, rank 1 none; ``d`` has a gradient on neither."""
    torch.manual_seed(0)
    method = Adversaries()
    handles = TrainingHandles(method, Stage(), TrainingSection(momentum=0, weight_decay=0.5), 10)
    before = [p.detach().clone() for p in (method.g.weight, method.d.weight)]

    def ones():
        if rank() == 0:
            handles.backward(method.g.weight.sum(), "g")

    ones()
    handles.average_gradients("g")
    first = method.g.weight.grad.clone()
    ones()  # beside the half that both have
    handles.average_gradients("g")
    second = method.g.weight.grad.clone()
    handles.update("d")
    handles.update("g")
    after = [p.detach().clone() for p in (method.g.weight, method.d.weight)]
    return first, second, before, after


def test_gradients_are_averaged_over_the_ranks_also_those_added_after_an_average():
    for first, second, before, after in run_on_two_ranks(averaged):
        assert torch.equal(first, torch.full((2, 2), 0.5))
        assert torch.equal(second, torch.full((2, 2), 1.0))
        assert torch.allclose(after[0], before[0] - 0.01 * (1 + 0.5 * before[0]))
        assert torch.equal(after[1], before[1])  # not even decayed: in one process it has no gradient


def test_an_optimizers_own_power_end_and_clipping_win_over_the_recipes():
    class Own(Adversaries):
        def optimizers(self, stage):
            spec = OptimizerSpec(self.g.parameters(), power=2.0, end_lr=1e-4, gradient_clip=0.5, lr=0.01)
            return {"g": spec} if stage.name == "warm" else {"d": OptimizerSpec(self.d.parameters())}

    method = Own()
    settings = TrainingSection(gradient_clip=100.0, momentum=0, weight_decay=0)
    handles = TrainingHandles(method, Stage("warm"), settings, 10)
    handles.set_iteration(6)  # the rate of step 5: half-way
    assert handles.rates() == {"g": pytest.approx(1e-4 + (0.01 - 1e-4) * 0.25)}
    handles.set_iteration(0)
    before = method.g.weight.detach().clone()
    handles.backward(1000 * method.g(torch.ones(1, 2)).sum(), "g")
    handles.update("g")
    assert (method.g.weight - before).norm().item() == pytest.approx(0.01 * 0.5, rel=1e-4)
    assert list(TrainingHandles(method, Stage("later"), settings, 10).rates()) == ["d"]


def test_nesterov_without_momentum_is_refused():
    class Nesterov(Adversaries):
        def optimizers(self, stage):
            return {"main": OptimizerSpec(nesterov=True)}

    with pytest.raises(ConfigError, match=r"training\.momentum is 0"):
        TrainingHandles(Nesterov(), Stage(), TrainingSection(momentum=0), 10)


class Spared(Adversaries):
    """One optimizer, whose weight decay leaves the second network alone."""

    def __init__(self, name, undecayed=True):
        super().__init__()
        self.name, self.undecayed = name, undecayed

    def optimizers(self, stage):
        spared = self.d.parameters() if self.undecayed else ()
        return {"main": OptimizerSpec([*self.g.parameters(), *self.d.parameters()], name=self.name, undecayed=spared)}


def spared_handles(name, **options):
    torch.manual_seed(0)
    method = Spared(name, **options)
    return method, TrainingHandles(method, Stage(), TrainingSection(lr=0.1, weight_decay=0.5, momentum=0), 10)


@pytest.mark.parametrize("undecayed", [True, False])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_weight_decay_spares_what_it_should_and_nothing_else(name, undecayed):
    method, handles = spared_handles(name, undecayed=undecayed)
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    handles.backward(0 * method.d(method.g(torch.ones(1, 2))).sum())
    handles.update()
    assert not torch.equal(method.g.weight, before["g.weight"])
    if name != "adam":  # whose first step has the same length whatever the gradient
        torch.testing.assert_close(method.g.weight, before["g.weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(method.d.weight, before["d.weight"]) == undecayed


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_what_is_spared_the_decay_is_trained_as_without_decay(name):
    method, handles = spared_handles(name)
    other = torch.nn.Linear(2, 1, bias=False)
    other.load_state_dict(method.d.state_dict())
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(other.parameters(), weight_decay=0, lr=0.1)
    for iteration in range(4):
        handles.set_iteration(iteration)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - max(iteration - 1, 0) / 10) ** 0.9
        handles.backward(method.d(torch.ones(1, 2)).square().sum())
        handles.update()
        optimizer.zero_grad()
        other(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(method.d.weight, other.weight)


def test_what_is_spared_counts_for_the_clipping_and_has_state_and_rate():
    torch.manual_seed(0)
    method, settings = Spared("sgd"), TrainingSection(gradient_clip=0.5, weight_decay=0, momentum=0.9, lr=0.1)
    handles = TrainingHandles(method, Stage(), settings, 10)
    before = torch.cat([p.detach().flatten().clone() for p in (method.g.weight, method.d.weight)])
    handles.backward(1000 * (method.g.weight.sum() + method.d.weight.sum()))
    handles.update()
    after = torch.cat([p.detach().flatten() for p in (method.g.weight, method.d.weight)])
    assert (after - before).norm().item() == pytest.approx(0.1 * 0.5, rel=1e-4)
    handles.set_iteration(6)
    groups = handles._optimizers["main"].param_groups
    assert [group["lr"] for group in groups] == [handles.rates()["main"]] * 2
    assert [group["weight_decay"] for group in groups] == [0, 0]
    state = handles.state_dict()
    other = TrainingHandles(Spared("sgd"), Stage(), settings, 10)
    other.load_state_dict(state)
    restored = other.state_dict()["main"]
    assert restored["param_groups"] == state["main"]["param_groups"]
    assert set(restored["state"]) == {0, 1}
    for index, values in state["main"]["state"].items():
        assert torch.equal(restored["state"][index]["momentum_buffer"], values["momentum_buffer"])
