"""Entropy minimization: the worked numbers of its specification."""

from __future__ import annotations

import math

import pytest
import torch
from consistency_tasks import Fixed, make, make_batch, row_of

from scantly.methods.base import Progress

AT = Progress(0, 10)


@pytest.mark.parametrize(
    ("probs", "expected"),
    [([0.25] * 4, 0.999997), ([1.0, 0.0, 0.0, 0.0], -1e-6 / math.log(4)), ([0.7, 0.1, 0.1, 0.1], 0.67839)],
)
def test_normalized_entropy(probs, expected):
    method = make("entropy_minimization", classes=4)
    method.network = Fixed([[p] for p in probs])
    method.losses(row_of(1), AT)
    assert method.pop_logged()["uncertainty"].item() == pytest.approx(expected, abs=1e-5 if probs[0] == 0.7 else 3e-7)


def test_whose_entropy_counts():
    batch = make_batch()
    seen = {}
    for rows in ("unlabeled", "all"):
        method = make("entropy_minimization", rows=rows).eval()
        method.losses(batch, AT)
        seen[rows] = method.pop_logged()["uncertainty"].item()
        probs = method.network(batch.images if rows == "all" else batch.unlabeled).softmax(1)
        expected = -(probs * (probs + 1e-6).log()).sum(1).mean().item() / math.log(2)
        assert seen[rows] == pytest.approx(expected, abs=1e-6)
    assert seen["all"] != seen["unlabeled"]


def test_the_entropy_of_all_rows_counts_as_published():
    method, batch = make("entropy_minimization", consistency=1.0, rampup_iterations=0).eval(), make_batch(1, 3)
    batch.labeled = 200 * batch.labeled  # so that the labeled row is certain
    probs = method.network(batch.images).softmax(1)
    per_row = -(probs * (probs + 1e-6).log()).sum(1).mean((1, 2)) / math.log(2)
    expected = per_row.mean()
    assert abs(expected - per_row[1:].mean()) > 0.01
    torch.testing.assert_close(method.losses(batch, AT)["entropy"], expected)


def test_its_gradient_makes_predictions_more_certain():
    method = make("entropy_minimization", consistency=1.0, rampup_iterations=0)
    batch = make_batch()
    optimizer = torch.optim.SGD(method.network.parameters(), lr=0.5)
    history = []
    for _ in range(20):
        term = method.losses(batch, Progress(10, 10))["entropy"]
        optimizer.zero_grad()
        term.backward()
        optimizer.step()
        history.append(term.item())
    assert history[-1] < 0.5 * history[0]
