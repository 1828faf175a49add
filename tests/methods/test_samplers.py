"""The samplers against exact variances, and the candidates against a plain list."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scantly.methods.parts.samplers import (
    candidates,
    draw_distinct,
    draw_positions,
    draw_ranks,
    grid_order,
    sample,
)

KINDS = ("naive", "sg", "sag")
HALVES = [0, 1, 2, 3, 10, 11, 12, 13]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def means(kind, values, draws, groups, runs=20_000, seed=0):
    counts = torch.full((runs,), len(values))
    ranks = draw_ranks(kind, counts, draws, groups, generator(seed))
    return torch.tensor([float(v) for v in values], dtype=torch.float64)[ranks].mean(1)


def exact_variance(kind, values, draws, groups):
    """Variance of the mean of the draws, integrated piece by piece over the unit interval."""
    size, values = len(values), [Fraction(v) for v in values]
    mean = sum(values) / size
    total = sum((v - mean) ** 2 for v in values) / size
    if kind == "naive":
        return total / draws
    spread, paired, between = [], [], []
    for m in range(groups):
        low, high = Fraction(m, groups), Fraction(m + 1, groups)
        cuts = {low, high} | {Fraction(i, size) for i in range(size + 1) if low < Fraction(i, size) < high}
        cuts |= {low + high - cut for cut in cuts}
        pieces = [(b - a, values[int((a + b) / 2 * size)], values[int((low + high - (a + b) / 2) * size)])
                  for a, b in pairwise(sorted(cuts))]  # fmt: skip
        here = sum(w * v for w, v, _ in pieces) * groups
        spread.append(sum(w * (v - here) ** 2 for w, v, _ in pieces) * groups)
        paired.append(sum(w * (v - here) * (u - here) for w, v, u in pieces) * groups)
        between.append((here - mean) ** 2)
    s, p, b = (sum(x) / groups for x in (spread, paired, between))

    def leftover(count):
        rest = count % groups
        return Fraction(rest * (groups - rest), max(groups - 1, 1)) * b

    if kind == "sg":
        return (draws * s + leftover(draws)) / Fraction(draws) ** 2
    pairs = draws // 2
    return (2 * pairs * (s + p) + 4 * leftover(pairs) + draws % 2 * total) / Fraction(draws) ** 2


def assert_variance(kind, values, draws, groups, expected):
    assert exact_variance(kind, values, draws, groups) == expected
    drawn = means(kind, values, draws, groups)
    deviations = (drawn - float(sum(values)) / len(values)) ** 2
    error = deviations.std() / math.sqrt(len(drawn))
    assert abs(float(deviations.mean()) - float(expected)) <= 5 * error + 1e-20
    assert abs(float(drawn.mean()) - sum(values) / len(values)) <= 5 * math.sqrt(float(expected) / len(drawn)) + 1e-12


@pytest.mark.parametrize(
    ("values", "draws", "groups", "expected"),
    [
        pytest.param(HALVES, 4, 2, ["6.5625", "0.3125", "0"], id="linear within halves"),
        pytest.param([0, 3, 3, 0, 10, 13, 13, 10], 4, 2, ["6.8125", "0.5625", "1.125"], id="even: the bound"),
        pytest.param(range(7), 8, 4, ["1/2", "2/49", "1/98"], id="7 candidates in 4 strata"),
        pytest.param(range(7), 6, 4, ["2/3", "4/21", "62/147"], id="left-over draws"),
        pytest.param(range(7), 5, 4, ["4/5", "52/245", "1172/1225"], id="odd, left-over draws"),
        pytest.param([0, 1, 1, 0, 0, 1, 1, 0], 4, 2, ["0.0625", "0.0625", "0.125"], id="sag above naive"),
    ],
)
def test_variances_are_those_of_the_specification(values, draws, groups, expected):
    for kind, variance in zip(KINDS, expected, strict=True):
        assert_variance(kind, list(values), draws, groups, Fraction(variance))


def test_antithetic_draws_of_a_linear_list_give_its_mean_every_time():
    assert torch.equal(means("sag", HALVES, 4, 2), torch.full((20_000,), 6.5, dtype=torch.float64))


def test_stratification_removes_the_variance_between_the_groups():
    between = Fraction(1, 4) * (Fraction(1, 2) * 25 + Fraction(1, 2) * 25)
    assert exact_variance("naive", HALVES, 4, 2) - exact_variance("sg", HALVES, 4, 2) == between == Fraction("6.25")


@pytest.mark.parametrize("seed", range(8))
def test_means_are_unbiased_and_variances_bounded_for_any_sizes(seed):
    g = generator(seed)
    size, draws, groups = (int(torch.randint(1, high, (1,), generator=g)) for high in (30, 20, 9))
    values = torch.randint(-9, 10, (size,), generator=g).tolist()
    variance = {kind: exact_variance(kind, values, draws, groups) for kind in KINDS}
    for kind in KINDS:
        assert_variance(kind, values, draws, groups, variance[kind])
    assert variance["sg"] <= variance["naive"]
    assert variance["sag"] <= 2 * variance["naive"]
    if draws % (2 * groups) == 0:
        assert variance["sag"] <= 2 * variance["sg"]


def test_a_constant_has_no_variance():
    for kind, draws in product(KINDS, (4, 5)):
        assert means(kind, [2.5] * 7, draws, 4, runs=50).var() == 0


@pytest.mark.parametrize("draws", [4, 5])
def test_without_differences_between_groups_strata_change_nothing(draws):
    values = [0, 4, 1, 3, 2, 2, 4, 0]
    assert_variance("sg", values, draws, 4, exact_variance("naive", values, draws, 4))


@pytest.mark.parametrize("kind", KINDS)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    draws=st.integers(1, 20),
    groups=st.integers(1, 20),
    permute=st.booleans(),
)
def test_ranks_are_candidates_and_as_many_as_asked_for(kind, counts, draws, groups, permute):
    counts = torch.tensor(counts)
    ranks = draw_ranks(kind, counts, draws, groups, generator(), permute=permute)
    assert ranks.shape == (len(counts), draws)
    assert ranks.dtype == torch.int64
    assert (ranks >= 0).all()
    assert (ranks < counts[:, None].clamp(min=1)).all()
    assert torch.equal(ranks, draw_ranks(kind, counts, draws, groups, generator(), permute=permute))


def test_the_largest_rank_is_the_last_candidate_of_millions():
    ranks = draw_ranks("sag", torch.tensor([2_000_003]), 4096, 4096, generator())
    assert int(ranks.max()) < 2_000_003
    # Every candidate must be reachable: ranks are no multiples of the float32 grid.
    assert len(set((ranks % 8).flatten().tolist())) == 8


def test_one_stratum_is_naive():
    assert torch.equal(draw_positions("sg", 3, 50, 1, generator()), draw_positions("naive", 3, 50, 1, generator()))


def test_every_stratum_gets_as_many_stratified_draws():
    strata = (draw_positions("sg", 5, 48, 16, generator()) * 16).floor().long()
    for row in strata:
        assert torch.bincount(row, minlength=16).tolist() == [3] * 16


def test_left_over_draws_go_to_different_strata_each_equally_often():
    strata = (draw_positions("sg", 4000, 6, 4, generator()) * 4).floor().long()
    assert (strata[:, 4] != strata[:, 5]).all()
    hits = torch.bincount(strata[:, 4:].flatten(), minlength=4)
    assert (hits - 2000).abs().max() < 5 * math.sqrt(2000)
    assert len({tuple(row) for row in strata[:100, 4:].tolist()}) > 6  # drawn per set


def test_antithetic_pairs_are_mirror_images_in_their_stratum():
    positions = draw_positions("sag", 3, 33, 16, generator())
    first, second = positions[:, :16], positions[:, 16:32]
    sums = (2 * torch.arange(16, dtype=torch.float64) + 1) / 16
    assert (first + second - sums).abs().max() <= 1e-12
    assert ((first * 16).floor() == torch.arange(16)).all()
    assert positions.dtype == torch.float64


def evenness(ranks, size):
    """Hits per candidate, and their chi-square in multiples of the bound on that of even draws."""
    hits = torch.bincount(ranks.flatten(), minlength=size).double()
    expected = ranks.numel() / size
    # Mirrored pairs double the variance of the statistic.
    return hits, float(((hits - expected) ** 2 / expected).sum() / (size - 1 + 6 * math.sqrt(4 * (size - 1))))


@pytest.mark.parametrize("kind", ["sg", "sag"])
def test_all_candidates_are_drawn_equally_often(kind):
    ranks = draw_ranks(kind, torch.full((2045,), 5233), 256, 16, generator(3))
    assert evenness(ranks, 5233)[1] <= 1


def folded_grid(size, draws, parts, runs, g):
    """The released sampler: the list in a square of cells, equally many draws from each, uniform ones to fill up."""
    edge = round(math.sqrt(size))
    assert edge**2 <= size  # so no cell holds what is no candidate
    square = torch.arange(edge**2).view(edge, edge)
    starts = [part * (edge // parts) for part in range(parts)] + [edge]
    cells = [square[a:b, c:d].flatten() for (a, b), (c, d) in product(pairwise(starts), repeat=2)]
    per_cell = draws * edge**2 // size // parts**2
    ranks = [cell[torch.randint(len(cell), (runs, per_cell), generator=g)] for cell in cells]
    filler = torch.randint(size, (runs, draws - per_cell * parts**2), generator=g)
    return torch.cat([*ranks, filler], dim=1)


def test_the_released_folded_grid_draws_the_end_of_the_list_too_seldom():
    ranks = folded_grid(5233, 256, 4, 2045, generator(3))
    hits, chi_square = evenness(ranks, 5233)
    assert ranks.shape == (2045, 256)
    assert chi_square > 1
    assert float(hits[5184:].mean()) / 100 == pytest.approx(16 / 256, rel=0.2)
    assert float(hits[:5184].min()) > float(hits[5184:].max())


def test_permuted_draws_are_the_same_draws_in_another_order_per_set():
    counts = torch.tensor([64, 64])
    ranks = draw_ranks("sg", counts, 64, 64, generator(), permute=True)
    assert torch.equal(ranks.sort(1).values, torch.arange(64).expand(2, -1))
    assert not torch.equal(ranks[0], torch.arange(64))
    assert not torch.equal(ranks[0], ranks[1])


@pytest.mark.parametrize(("batch", "size", "cells"), [(3, (5, 7), 4), (2, (3, 4, 6), 2), (1, (2, 2), 4)])
def test_the_grid_orders_by_cell_then_image_then_voxel(batch, size, cells):
    def key(place):
        image, *voxel = place
        return [min(cells * i // n, cells - 1) for i, n in zip(voxel, size, strict=True)], image, voxel

    places = list(product(range(batch), *(range(n) for n in size)))
    expected = sorted(range(len(places)), key=lambda i: key(places[i]))
    assert grid_order(batch, size, cells, torch.device("cpu")).tolist() == expected


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    order=st.none() | st.permutations(range(6)),
)
def test_candidates_are_picked_by_rank_along_the_order(rows, order):
    mask = torch.tensor(rows)
    found = candidates(mask, None if order is None else torch.tensor(order))
    lists = [[i for i in (order or range(6)) if row[i]] for row in rows]
    assert found.counts.tolist() == [len(row) for row in lists]
    picked = found.pick(torch.stack([torch.arange(6).clamp(max=max(len(row) - 1, 0)) for row in lists]))
    for row, voxels in zip(lists, picked, strict=True):
        if row:
            assert voxels.tolist() == [row[min(i, len(row) - 1)] for i in range(6)]
        assert ((voxels >= 0) & (voxels < 6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_voxels_are_candidates_of_their_set(kind):
    masks = torch.rand(3, 200, generator=generator()) < 0.3
    masks[1] = False
    index, counts = sample(kind, masks, 100, 16, generator(), order=torch.randperm(200, generator=generator(1)))
    assert counts.tolist() == masks.sum(1).tolist()
    for row in (0, 2):
        assert masks[row][index[row]].all()
    assert index.shape == (3, 100)


def test_strata_of_the_grid_are_cells_of_the_image():
    """With all voxels as candidates, 16 draws hit each of the 4 x 4 cells once."""
    order = grid_order(1, (8, 8), 4, torch.device("cpu"))
    index, _ = sample("sg", torch.ones(1, 64, dtype=torch.bool), 16, 16, generator(), order=order, permute=True)
    row, column = index[0] // 8, index[0] % 8
    assert sorted((row // 2 * 4 + column // 2).tolist()) == list(range(16))
    by_scan, _ = sample("sg", torch.ones(1, 64, dtype=torch.bool), 16, 16, generator())
    assert sorted((by_scan[0] // 4).tolist()) == list(range(16))


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4),
    draws=st.integers(0, 7),
    seed=st.integers(0, 100),
)
def test_distinct_draws_are_candidates_first_and_never_twice_the_same(rows, draws, seed):
    masks = torch.tensor(rows)
    index, drawn = draw_distinct(masks, draws, generator(seed))
    assert index.shape == drawn.shape == (len(rows), draws)
    for mask, places, good in zip(masks, index, drawn, strict=True):
        count = min(int(mask.sum()), draws)
        assert good.tolist() == [True] * count + [False] * (draws - count)
        assert torch.equal(mask[places], good)
        assert len(set(places.tolist())) == draws
    again = draw_distinct(masks, draws, generator(seed))
    assert torch.equal(again[0], index)


def test_every_candidate_is_drawn_distinctly_equally_often_and_sets_are_independent():
    masks = torch.zeros(4000, 12, dtype=torch.bool)
    masks[:, 2:10] = True
    index, drawn = draw_distinct(masks, 3, generator())
    assert drawn.all()
    hits = torch.bincount(index.flatten(), minlength=12)
    assert hits[[0, 1, 10, 11]].sum() == 0
    expected = 4000 * 3 / 8
    assert (hits[2:10] - expected).abs().max() < 5 * math.sqrt(expected)
    first = torch.bincount(index[:, 0], minlength=12)[2:10]  # nor has the order a preference
    assert (first - 500).abs().max() < 5 * math.sqrt(500)
    together = (index[0::2] == index[1::2]).all(1).float().mean().item()
    assert together == pytest.approx(1 / 336, abs=5 * math.sqrt(1 / 336 / 2000))


def test_distinct_draws_take_as_many_numbers_whatever_the_candidates():
    states = []
    for share in (0.0, 0.3, 1.0):
        source = generator()
        draw_distinct(torch.rand(3, 50, generator=generator(1)) < share, 5, source)
        states.append(source.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])
