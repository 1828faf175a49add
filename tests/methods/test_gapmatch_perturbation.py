"""GapMatch: the direction and length of the perturbation of the weights."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from gapmatch_steps import STRONG_ONLY, Passes, Quadratic, cosine, flat, gradient, make, make_batch, run, slow_losses
from torch import nn

from scantly.errors import ConfigError
from scantly.methods.gapmatch import GapMatch
from scantly.settings import parse


def test_the_direction_is_the_consistencys_and_not_the_totals():
    batch = make_batch(dtype=torch.float64)
    displaced = {}
    for source in ("unsupervised", "total"):
        settings = {"perturbation_source": source, "unsupervised_weight": 0.7, "dtype": torch.float64, **STRONG_ONLY}
        method = make(**settings)
        start, passes = copy.deepcopy(method.network), Passes(method.network)
        run(method, batch)
        displaced[source] = passes.displacement
    unsupervised, supervised = slow_losses(start, batch, passes.seen[1].images)
    first, own = gradient(start, unsupervised), gradient(start, supervised)
    assert cosine(displaced["unsupervised"], first) == pytest.approx(1, abs=1e-6)
    assert cosine(displaced["unsupervised"], first + own) < 0.99
    assert cosine(displaced["total"], own + 0.7 * first) == pytest.approx(1, abs=1e-6)
    assert cosine(displaced["total"], first) < 0.99


@pytest.mark.parametrize("perturbation", ["global_l2", "random"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("epsilon", [0.1, 0.001])
def test_the_perturbation_has_norm_epsilon(perturbation, dtype, tolerance, epsilon):
    method = make(perturbation=perturbation, epsilon=epsilon, dtype=dtype)
    passes = Passes(method.network)
    run(method, make_batch(dtype=dtype))
    assert passes.displacement.norm().item() == pytest.approx(epsilon, rel=tolerance)
    assert method.pop_logged()["perturbation_norm"].item() == pytest.approx(epsilon, rel=tolerance)


def test_the_perturbation_does_not_depend_on_the_losss_scale(monkeypatch):
    seen = []
    for factor in (1, 1000):
        method = make(dtype=torch.float64)
        original, passes = method._consistency, Passes(method.network)
        monkeypatch.setattr(method, "_consistency", lambda *a, f=original, k=factor: k * f(*a))
        run(method, make_batch(dtype=torch.float64))
        seen.append(passes.displacement)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=1e-9)


def test_layerwise_and_adaptive_steps_and_weights_alone():
    batch = make_batch(dtype=torch.float64)
    moved = {}
    for key, settings in {
        "layer_relative": {"perturbation": "layer_relative"},
        "adaptive": {"perturbation": "adaptive"},
        "weights": {"perturbed": "weights"},
    }.items():
        method = make(dtype=torch.float64, epsilon=0.05, **settings, **STRONG_ONLY)
        start, passes = copy.deepcopy(method.network), Passes(method.network)
        run(method, batch)
        moved[key] = passes.displacement
    g, theta = gradient(start, slow_losses(start, batch, passes.seen[1].images)[0]), flat(start)
    slow = 0.05 * theta**2 * g / (theta.abs() * g).norm()
    assert (moved["adaptive"] - slow).norm() < 1e-4 * slow.norm()
    at = 0
    for p in start.parameters():
        part = slice(at, at := at + p.numel())
        step = 0.05 * theta[part].norm() * g[part] / (g[part].norm() + 1e-12)
        # A bias before a batch norm has a gradient of rounding alone, in whichever direction.
        if g[part].norm() > 1e-9:
            assert (moved["layer_relative"][part] - step).norm() <= 1e-4 * step.norm()
        assert (moved["weights"][part] == 0).all() == (p.ndim == 1)
    assert moved["weights"].norm().item() == pytest.approx(0.05, rel=1e-6)
    chosen = moved["weights"] != 0
    assert cosine(moved["weights"][chosen], g[chosen]) == pytest.approx(1, abs=1e-6)


def test_a_random_direction_knows_nothing_of_the_gradients():
    seen = []
    for seed, generator in [(0, 0), (1, 0), (0, 5)]:
        method = make(perturbation="random", epsilon=0.1)
        method.generator.manual_seed(generator)
        passes = Passes(method.network)
        run(method, make_batch(seed=seed))
        seen.append(passes.displacement)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-6)
    assert abs(cosine(seen[0], seen[2])) < 0.2
    assert (seen[0] > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_ascent_in_two_steps_on_the_quadratic_and_on_a_line(monkeypatch):
    """Each of epsilon / 2 along the gradient where it begins: together at most epsilon, on a line exactly that."""
    factors, ends = torch.tensor([2.0, 1.0]).double(), {}
    for kind in ("quadratic", "line"):
        method = make(Quadratic(), dtype=torch.float64, epsilon=0.4, ascent_steps=2)
        theta, seen = method.network.theta, []

        def loss(*_, theta=theta, seen=seen, power=2 if kind == "quadratic" else 1):
            seen.append(theta.detach().clone())
            return (factors * theta**power).sum() / power

        monkeypatch.setattr(method, "_consistency", loss)
        monkeypatch.setattr(method, "_supervised", lambda _, theta=theta: 0 * theta.sum())
        run(method, make_batch(dtype=torch.float64))
        ends[kind] = (seen[-1] - 1).norm().item()
        place = torch.ones(2).double()
        for expected in seen:
            assert torch.allclose(expected, place, atol=1e-9)
            g = factors * (place if kind == "quadratic" else 1)
            place = place + 0.2 * g / g.norm()
        assert len(seen) == 3
    assert ends["line"] == pytest.approx(0.4, rel=1e-9)
    assert 0.39 < ends["quadratic"] < 0.4


@pytest.mark.parametrize(("source", "steps"), [("unsupervised", 1), ("unsupervised", 2), ("total", 1)])
def test_every_step_of_the_ascent_follows_the_chosen_gradient(source, steps, monkeypatch):
    """With losses that are lines each step has the same direction: (1, 0) of L_u, or (1, 1) of both."""
    method = make(Quadratic(), dtype=torch.float64, epsilon=0.4, ascent_steps=steps, perturbation_source=source)
    theta, seen = method.network.theta, []
    monkeypatch.setattr(method, "_consistency", lambda *_: (seen.append(theta.detach().clone()), theta[0])[1])
    monkeypatch.setattr(method, "_supervised", lambda _: theta[1])
    run(method, make_batch(dtype=torch.float64))
    step = [0.4, 0.0] if source == "unsupervised" else [0.4 / math.sqrt(2)] * 2
    assert (seen[-1] - 1).tolist() == pytest.approx(step, abs=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturbation_source": "total", "ascent_steps": 2},
        {"perturbation_source": "total", "update": "sequential"},
        {"perturbation_source": "total", "perturbation": "random"},
        {"second_targets": "recomputed", "ema_decay": 0.9},
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings):
    with pytest.raises(ConfigError, match=r"goes with update=joint|leave out ema_decay"):
        parse(GapMatch.Config, settings, where="method")


@pytest.mark.parametrize("perturbation", ["global_l2", "random"])
def test_several_steps_stay_within_epsilon(perturbation):
    method = make(dtype=torch.float32, epsilon=0.3, ascent_steps=3, perturbation=perturbation)
    run(method, make_batch())
    norm = method.pop_logged()["perturbation_norm"].item()
    assert norm == pytest.approx(0.3, rel=1e-2) if perturbation == "random" else norm < 0.3 * 1.01


@pytest.mark.parametrize("kind", ["ce", "dice", "ce_dice"])
def test_finite_differences_along_the_perturbation_give_the_gradients_norm(kind):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1))
    errors = []
    for epsilon in (1e-2, 1e-3, 1e-4, 1e-5):
        method = make(
            copy.deepcopy(network), dtype=torch.float64, epsilon=epsilon, consistency_loss=kind, **STRONG_ONLY
        )
        _, terms = run(method, make_batch(dtype=torch.float64))
        logged = method.pop_logged()
        slope = (logged["loss_after"] - terms["unsupervised"]) / epsilon
        errors.append(abs((slope / logged["gradient_norm"]).item() - 1))
    assert terms["unsupervised"].dtype == torch.float64
    assert errors[-1] < 1e-3
    assert all(later < 0.2 * earlier for earlier, later in pairwise(errors))
