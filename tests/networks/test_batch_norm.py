"""Batch norm over two processes against one over the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.ema import gather_statistics, make_teacher
from scantly.networks.batch_norm import synchronize_batch_norm
from scantly.ranks import rank, world_size
from two_ranks import run_on_two_ranks

SHAPES = {1: (8, 3), 2: (4, 3, 5, 6), 3: (4, 3, 2, 3, 4)}
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CASES = [
    (dims, settings)
    for dims in (1, 2, 3)
    for settings in (
        {},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 0.3, "affine": False},
        {"track_running_stats": False},
    )
]


def norm_of(dims, settings, dtype=torch.float64):
    norm = KINDS[dims](3, **settings).to(dtype)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
            norm.bias.copy_(torch.tensor([0.0, -1.0, 3.0]))
    return norm


def batches(dims, number=3, dtype=torch.float64, offset=100.0):
    """Inputs and weights of a sum that is minimized, with means far from 0."""
    generator = torch.Generator().manual_seed(dims)
    shape = SHAPES[dims]
    factor = 1 + torch.arange(shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return [
        (
            (offset + factor * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype),
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(number)
    ]


def of_this_rank(x, first=None):
    """Half of the rows, or all behind so many, on one process all."""
    if world_size() == 1:
        return x
    first = len(x) // 2 if first is None else first
    return x[first:] if rank() else x[:first]


def train(norm, data, first=None):
    """Outputs, gradients and state after some passes and one in evaluation mode."""
    found = []
    for images, weights in data:
        x = of_this_rank(images, first).clone().requires_grad_()
        y = norm(x)
        norm.zero_grad()
        (y.square() * of_this_rank(weights, first)).sum().backward()
        found.append((y.detach(), x.grad, *[p.grad.clone() for p in norm.parameters()]))
    with without_statistics(norm):
        found.append((norm(of_this_rank(data[0][0], first)).detach(),))
    state = {key: value.clone() for key, value in norm.state_dict().items()}
    norm.eval()
    found.append((norm(of_this_rank(data[0][0], first)).detach(),))
    return found, state


def every_case():
    answers = []
    for dims, settings in CASES:
        norm = norm_of(dims, settings)
        synchronize_batch_norm(norm)
        answers.append(train(norm, batches(dims)))
    return answers


@pytest.fixture(scope="module")
def answers():
    return run_on_two_ranks(every_case)


@pytest.mark.parametrize("index", range(len(CASES)), ids=str)
def test_it_is_one_batch_norm_over_the_whole_batch(answers, index):
    dims, settings = CASES[index]
    passes, state = train(norm_of(dims, settings), batches(dims))
    first, second = (answer[index] for answer in answers)
    assert set(state) == set(first[1]) == set(second[1])
    for key, value in state.items():
        assert torch.equal(first[1][key], second[1][key]), key
        torch.testing.assert_close(first[1][key], value, rtol=1e-10, atol=1e-10)
    unshared = settings.get("track_running_stats") is False
    for number, (whole, one, other) in enumerate(zip(passes, first[0], second[0], strict=True)):
        if number == len(passes) - 1 and unshared:
            continue  # in evaluation mode without statistics: those of the rank's rows, as torch has it
        for part, (expected, a, b) in enumerate(zip(whole, one, other, strict=True)):
            found = torch.cat([a, b]) if part < 2 else a + b  # rows, or gradients of parameters
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-9)


def unequal_numbers():
    """3 rows and 1, then 4 and 0; and a copy made before and one after."""
    before = norm_of(2, {})
    whole = nn.Sequential(before, nn.Sequential(nn.BatchNorm1d(2)))
    synchronize_batch_norm(whole)
    synchronize_batch_norm(whole)
    answers = [train(copy.deepcopy(before), batches(2), first) for first in (3, 4)]
    teacher = make_teacher(before, buffers="predicting")
    for passes, (x, _) in enumerate(batches(2)):
        gather_statistics(teacher, of_this_rank(x), passes)
    kinds = isinstance(before, nn.BatchNorm2d) and isinstance(whole[1][0], nn.BatchNorm1d)
    return answers, teacher.state_dict(), kinds


def test_ranks_may_have_different_numbers_of_rows_and_copies_stay_synchronized():
    found = run_on_two_ranks(unequal_numbers)
    passes, state = train(norm_of(2, {}), batches(2))
    for case in range(2):
        for expected, one, other in zip(passes, found[0][0][case][0], found[1][0][case][0], strict=True):
            torch.testing.assert_close(torch.cat([one[0], other[0]]), expected[0], rtol=1e-10, atol=1e-9)
        for key, value in state.items():
            torch.testing.assert_close(found[1][0][case][1][key], value, rtol=1e-10, atol=1e-10)
    teacher = make_teacher(norm_of(2, {}), buffers="predicting")
    for passes, (x, _) in enumerate(batches(2)):
        gather_statistics(teacher, x, passes)
    for key, value in teacher.state_dict().items():
        torch.testing.assert_close(found[0][1][key], value, rtol=1e-10, atol=1e-10)
    assert found[0][2]


def under_autocast():
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        norm, (x, _) = norm_of(2, {}, torch.float32), batches(2, 1, torch.float32, offset=1.0)[0]
        if world_size() > 1:
            synchronize_batch_norm(norm)
        x = of_this_rank(x).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x)
        y.float().square().sum().backward()
        answers.append((y.detach(), x.grad, norm.running_mean, norm.weight.grad))
    return answers


def test_bf16_goes_in_and_out_and_statistics_are_fp32():
    found = run_on_two_ranks(under_autocast)
    for expected, one, other in zip(under_autocast(), *found, strict=True):
        assert [value.dtype for value in one] == [value.dtype for value in expected]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if one[0].dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(torch.cat([one[0], other[0]]), expected[0], **tolerance)
        torch.testing.assert_close(one[2], expected[2], rtol=1e-5, atol=1e-5)


def test_in_one_process_it_gives_what_batch_norm_gives():
    norm, same = norm_of(2, {}, torch.float32), norm_of(2, {}, torch.float32)
    synchronize_batch_norm(same)
    assert isinstance(same, nn.BatchNorm2d)
    (passes, state), (found, states) = (
        train(each, batches(2, dtype=torch.float32, offset=1.0)) for each in (norm, same)
    )
    for expected, got in zip(passes, found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(states, state)
