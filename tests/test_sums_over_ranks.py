"""Sums, rows and conditions over two processes, and that one process changes nothing."""

from __future__ import annotations

import pytest
import torch

from scantly import ranks
from two_ranks import run_on_two_ranks


def test_one_process_gets_back_what_it_gives():
    values = torch.randn(3, 2, requires_grad=True)
    assert ranks.world_size() == 1
    assert ranks.rank() == 0
    assert ranks.sum_over_ranks(values) is values
    assert ranks.mean_over_ranks(values) is values
    assert all(a is b for a, b in zip(ranks.sums_over_ranks(values, values), (values, values), strict=True))
    flag = torch.tensor([True, False])
    assert ranks.true_on_all_ranks(flag) is flag
    for function in (ranks.rows_of_all_ranks, ranks.of_first_rank):
        found = function(values)
        assert found.data_ptr() == values.data_ptr()
        assert not found.requires_grad


def everything():
    own = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64) * (1 + 9 * ranks.rank())
    values = own.clone().requires_grad_()
    total = ranks.sum_over_ranks(values)
    # what the rank minimizes: the square of a ratio of sums, its own term beside it
    loss = (total.sum() / 10).square() + (1 + ranks.rank()) * values[0, 0]
    (gradient,) = torch.autograd.grad(loss, values)
    apart, scalar = ranks.sums_over_ranks(values.detach(), values.detach()[0, 0].float())
    return {
        "rank": (ranks.rank(), ranks.world_size()),
        "sum": total.detach(),
        "mean": ranks.mean_over_ranks(values).detach(),
        "gradient": gradient,
        "sums": (apart, scalar),
        "integers": ranks.sum_over_ranks(torch.tensor([1 + ranks.rank(), 2**40])),
        "rows": ranks.rows_of_all_ranks(own),
        "transposed": ranks.rows_of_all_ranks(own.T),
        "bool": ranks.rows_of_all_ranks(torch.tensor([[True, False], [ranks.rank() == 1, True]])),
        "bool_scalar_rows": ranks.rows_of_all_ranks(torch.tensor([ranks.rank() == 0])),
        "long": ranks.rows_of_all_ranks(torch.tensor([ranks.rank(), 7])),
        "half": ranks.rows_of_all_ranks(torch.tensor([ranks.rank() + 0.5], dtype=torch.bfloat16)),
        "all": ranks.true_on_all_ranks(torch.tensor([True, ranks.rank() == 0, False])),
        "first": ranks.of_first_rank(own),
        "changed": not torch.equal(own, torch.tensor([[1.0, 2.0], [3.0, 4.0]]) * (1 + 9 * ranks.rank())),
    }


@pytest.fixture(scope="module")
def found():
    return run_on_two_ranks(everything)


def test_sums_means_and_rows(found):
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert [each["rank"] for each in found] == [(0, 2), (1, 2)]
    for each in found:
        assert torch.equal(each["sum"], 11 * base)
        assert torch.equal(each["mean"], 5.5 * base)
        assert torch.equal(each["sums"][0], 11 * base)
        assert each["sums"][1].dtype == torch.float32
        assert each["sums"][1] == 11
        assert each["integers"].tolist() == [3, 2**41]
        assert torch.equal(each["rows"], torch.cat([base, 10 * base]))
        assert torch.equal(each["transposed"], torch.cat([base.T, 10 * base.T]))
        assert each["bool"].tolist() == [[True, False], [False, True], [True, False], [True, True]]
        assert each["bool_scalar_rows"].tolist() == [True, False]
        assert each["long"].tolist() == [0, 7, 1, 7]
        assert each["half"].tolist() == [0.5, 1.5]
        assert each["all"].tolist() == [True, False, False]
        assert torch.equal(each["first"], base)
        assert not each["changed"]


def test_gradients_of_the_mean_of_the_ranks_losses(found):
    """Loss (110 / 10)^2 on both, plus x and 2 x: their mean has gradients 2.2, and 0.5 and 1 more at the first."""
    for rank, each in enumerate(found):
        expected = torch.full((2, 2), 2.2, dtype=torch.float64)
        expected[0, 0] += (1 + rank) / 2
        torch.testing.assert_close(each["gradient"] / 2, expected)


def fails_on_the_second():
    if ranks.rank():
        raise ValueError("a voxel was lost")
    return ranks.sum_over_ranks(torch.ones(1))


def test_a_failure_of_one_rank_is_told():
    with pytest.raises(AssertionError, match="a voxel was lost"):
        run_on_two_ranks(fails_on_the_second)
