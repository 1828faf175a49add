"""Steps in weight space: worked numbers of the specification of GapMatch, and what must be left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from scantly.methods.parts.modes import evaluation_mode
from scantly.methods.parts.weight_perturbation import (
    agreement,
    ascend,
    displaced,
    joint_norm,
    plus,
    random_state,
    replayed_random,
    take_gradients,
)

CPU = torch.device("cpu")


def parameters(*values, dtype=torch.float64):
    return [nn.Parameter(torch.tensor(each, dtype=dtype)) for each in values]


def values(tensors):
    return [each.tolist() for each in tensors]


# worked numbers


def quadratic(theta):
    """``theta^T A theta / 2`` with ``A = diag(2, 1)``."""
    return 0.5 * (torch.tensor([2.0, 1.0], dtype=theta.dtype) * theta * theta).sum()


def perturbed(loss, weights, epsilon):
    """The loss, its gradient, the moved weights, and loss and gradient there."""
    value = loss(*weights)
    first = list(torch.autograd.grad(value, weights))
    with displaced(weights):
        ascend(weights, first, epsilon, "global_l2")
        moved = [p.detach().clone() for p in weights]
        there = loss(*weights)
        second = list(torch.autograd.grad(there, weights))
    return value.item(), first, moved, there.item(), second


def test_the_quadratic():
    weights = parameters([1.0, 1.0])
    value, first, moved, there, second = perturbed(quadratic, weights, 0.1)
    assert first[0].tolist() == [2, 1]
    assert joint_norm(first).item() == pytest.approx(2.236068, abs=1e-6)
    assert moved[0].tolist() == pytest.approx([1.089443, 1.044721], abs=1e-6)
    assert second[0].tolist() == pytest.approx([2.178885, 1.044721], abs=1e-6)
    assert plus(first, second, 1.0)[0].tolist() == pytest.approx([4.178885, 2.044721], abs=1e-6)
    assert (value, there) == pytest.approx((1.5, 1.732607), abs=1e-6)
    assert value + 0.1 * joint_norm(first).item() == pytest.approx(1.723607, abs=1e-6)
    assert weights[0].tolist() == [1, 1]


@pytest.mark.parametrize(("epsilon", "error"), [(0.1, 9.0e-3), (0.01, 9.0e-5), (0.001, 9.0e-7)])
def test_what_the_first_order_leaves_is_quadratic_in_the_step(epsilon, error):
    value, first, _, there, _ = perturbed(quadratic, parameters([1.0, 1.0]), epsilon)
    assert there - value - epsilon * joint_norm(first).item() == pytest.approx(error, rel=1e-6)


def test_the_margin_of_a_linear_classifier_falls_by_epsilon_times_the_feature():
    weights, x = parameters(0.5), 2.0
    value, first, moved, there, second = perturbed(lambda w: nn.functional.softplus(-w * x), weights, 0.1)
    assert (value, first[0].item()) == pytest.approx((0.313262, -0.537883), abs=1e-6)
    assert moved[0].item() == pytest.approx(0.4, abs=1e-9)
    assert (there, second[0].item()) == pytest.approx((0.371101, -0.620051), abs=1e-6)
    assert plus(first, second, 1.0)[0].item() == pytest.approx(-1.157934, abs=1e-6)
    assert moved[0].item() * x == pytest.approx(1.0 - 0.1 * x, abs=1e-9)


# steps


def test_a_step_over_each_tensors_own_norm():
    weights = parameters([3.0, 4.0], [[2.0]], [0.0, 0.0])
    gradients = [torch.tensor(g, dtype=torch.float64) for g in ([0.0, -2.0], [[5.0]], [1.0, 1.0])]
    ascend(weights, gradients, 0.1, "layer_relative")  # lengths 5, 2 and 0
    assert values(weights) == [pytest.approx([3.0, 3.5]), [pytest.approx([2.2])], [0, 0]]


def test_a_step_in_proportion_to_each_weights_size():
    """``|theta| g = (2, -4), (0)``, of joint norm ``sqrt(20)``; the step is ``0.1 theta^2 g`` over it."""
    weights = parameters([1.0, -2.0], [0.0])
    gradients = [torch.tensor(g, dtype=torch.float64) for g in ([2.0, -2.0], [7.0])]
    ascend(weights, gradients, 0.1, "adaptive")
    root = math.sqrt(20)
    assert values(weights) == [pytest.approx([1 + 0.2 / root, -2 - 0.8 / root]), [0]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
@pytest.mark.parametrize("factor", [1.0, 1000.0, 1e-6])
@pytest.mark.parametrize("scale", ["global_l2", "layer_relative", "adaptive"])
def test_the_length_of_a_step_does_not_depend_on_the_gradients_scale(dtype, tolerance, factor, scale):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3, 3, 3), (8,), (2, 8)]
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    with displaced(weights) as kept:
        ascend(weights, [factor * g for g in gradients], 0.01, scale)
        steps = [(p - copy).detach() for p, copy in zip(weights, kept, strict=True)]
    if scale == "global_l2":
        lengths = [joint_norm(steps)]
    elif scale == "layer_relative":
        lengths = [step.norm() / p.norm() for step, p in zip(steps, weights, strict=True)]
    else:
        lengths = [joint_norm([step / p for step, p in zip(steps, weights, strict=True)])]
    assert [length.item() for length in lengths] == pytest.approx([0.01] * len(lengths), rel=tolerance)
    assert all((step * g >= 0).all() for step, g in zip(steps, gradients, strict=True))  # up, in every direction


@pytest.mark.parametrize("scale", ["global_l2", "layer_relative", "adaptive"])
def test_a_gradient_of_zero_moves_nothing(scale):
    weights = parameters([1.0, 2.0], [[3.0]])
    ascend(weights, [torch.zeros_like(p) for p in weights], 0.1, scale)
    assert values(weights) == [[1, 2], [[3]]]


# gradients aside


def test_taken_gradients_are_cleared_and_zeros_where_there_was_none():
    used, unused = parameters([1.0, 2.0], [[3.0]], dtype=torch.float32)
    (used * used).sum().backward()
    taken = take_gradients([used, unused])
    assert values(taken) == [[2, 4], [[0]]]
    assert used.grad is None
    assert unused.grad is None
    (used * used).sum().backward()  # does not add to what was taken
    assert taken[0].tolist() == [2, 4]


def test_a_sum_leaves_its_parts_alone():
    first, second = (
        [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])],
        [torch.tensor([10.0, 20.0]), torch.tensor([[1.0]])],
    )
    assert values(plus(first, second, 0.5)) == [[6, 12], [[3.5]]]
    assert values(first) == [[1, 2], [[3]]]
    assert values(second) == [[10, 20], [[1]]]


def test_the_norm_is_that_of_one_long_vector():
    assert joint_norm([torch.tensor([1.0, 2.0]), torch.tensor([[2.0], [4.0]])]).item() == pytest.approx(5)


@pytest.mark.parametrize(
    ("first", "second", "cosine"),
    [
        (([3.0, 0.0], [[4.0]]), ([3.0, 0.0], [[4.0]]), 1.0),
        (([3.0, 0.0], [[4.0]]), ([-6.0, 0.0], [[-8.0]]), -1.0),
        (([3.0, 0.0], [[4.0]]), ([0.0, 7.0], [[0.0]]), 0.0),
        (([3.0, 0.0], [[4.0]]), ([0.0, 0.0], [[2.0]]), 0.8),
        (([3.0, 0.0], [[4.0]]), ([0.0, 0.0], [[0.0]]), 0.0),
        (([0.0, 0.0], [[0.0]]), ([0.0, 0.0], [[0.0]]), 0.0),
        (([3e-7, 0.0], [[4e-7]]), ([0.0, 0.0], [[2e-7]]), 0.8),  # small gradients are not zero
    ],
)
def test_the_cosine_between_two_gradients(first, second, cosine):
    first, second = ([torch.tensor(each) for each in vectors] for vectors in (first, second))
    assert agreement(first, second).item() == pytest.approx(cosine, abs=1e-6)


# what is put back


def test_displaced_weights_come_back_bit_by_bit_also_after_an_error():
    weights = [nn.Parameter(torch.randn(50, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    before = [p.detach().clone() for p in weights]
    places = [p.data_ptr() for p in weights]
    with displaced(weights) as kept:
        assert all(torch.equal(copy, value) for copy, value in zip(kept, before, strict=True))
        ascend(weights, [torch.ones_like(p) for p in weights], 1 / 3, "global_l2")
        assert not torch.equal(weights[0], before[0])
    assert all(torch.equal(p, value) for p, value in zip(weights, before, strict=True))
    with pytest.raises(KeyError), displaced(weights):
        ascend(weights, [torch.ones_like(p) for p in weights], 1 / 3, "global_l2")
        raise KeyError
    assert all(torch.equal(p, value) for p, value in zip(weights, before, strict=True))
    assert [p.data_ptr() for p in weights] == places
    assert all(p.requires_grad and p.is_leaf for p in weights)


def test_dropout_is_replayed_and_the_generator_stands_where_it_stood():
    torch.manual_seed(3)
    dropout, ones = nn.Dropout(0.5), torch.ones(100)
    state = random_state(CPU)
    first = dropout(ones)
    dropout(ones)
    stands = torch.get_rng_state()
    with replayed_random(state, CPU):
        assert torch.equal(dropout(ones), first)
    assert torch.equal(torch.get_rng_state(), stands)
    with pytest.raises(KeyError), replayed_random(state, CPU):
        dropout(ones)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), stands)
    assert not torch.equal(dropout(ones), first)


def test_modes_are_put_back_module_by_module_also_after_an_error():
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())).train()
    network[1][0].eval()
    before = [module.training for module in network.modules()]
    with evaluation_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before
    with pytest.raises(KeyError), evaluation_mode(network):
        raise KeyError
    assert [module.training for module in network.modules()] == before
