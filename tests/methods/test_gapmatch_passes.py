"""GapMatch: what the perturbed pass leaves alone, and what it sees."""

from __future__ import annotations

import pytest
import torch
from gapmatch_steps import SECOND, Passes, Recording, assert_equal, flat, make, make_batch, run, snapshot
from torch import nn


def watched_second(method, monkeypatch):
    """Weights and buffers when the perturbed pass begins, and when it ends or fails."""
    seen, original = [], method._second

    def second(*arguments):
        seen.append(snapshot(method.network))
        try:
            return original(*arguments)
        finally:
            seen.append(snapshot(method.network))

    monkeypatch.setattr(method, "_second", second)
    return seen


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SECOND, ids=lambda each: "-".join(map(str, each.values())) or "default")
def test_weights_and_statistics_are_bit_by_bit_what_they_were(settings, bf16, clip, monkeypatch):
    method = make(dropout=0.5, epsilon=0.3, **settings)
    seen, handles = watched_second(method, monkeypatch), Recording(method, gradient_clip=clip)
    start = flat(method.network)
    for _ in range(2):
        run(method, make_batch(), handles, bf16=bf16)
    assert len(seen) == 4
    assert_equal(seen[0], seen[1])
    assert_equal(seen[2], seen[3])
    counters = [value.item() for key, value in seen[1].items() if key.endswith("num_batches_tracked")]
    assert set(counters) == {2 + settings.get("strong_views", 1)}  # weak, strong, labeled
    norms = [module for module in method.network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(norm.track_running_stats and norm.training for norm in norms)
    assert flat(method.network).isfinite().all()
    assert not torch.equal(flat(method.network), start)
    assert all(p.grad is None for p in method.network.parameters())


def test_the_first_update_is_from_the_restored_weights_not_from_a_step_taken_back():
    method = make(epsilon=0.3)
    start, passes = flat(method.network), Passes(method.network)
    handles, _ = run(method, make_batch())
    assert not torch.equal(passes.displacement, torch.zeros_like(start))
    assert torch.equal(flat(method.network), start.add(handles.gradients[0], alpha=-0.1))


def test_the_step_ends_with_the_statistics_that_stood_before_the_perturbed_pass():
    method = make()
    passes = Passes(method.network)
    run(method, make_batch())
    assert len(passes.seen) == 4
    assert_equal(passes.seen[3].buffers, dict(method.network.named_buffers()))
    updated = make(second_statistics="updated")
    before = Passes(updated.network)
    run(updated, make_batch())
    counters = [b for key, b in updated.network.named_buffers() if key.endswith("num_batches_tracked")]
    assert {int(counter) for counter in counters} == {4}
    assert before.seen[3].buffers.keys() == passes.seen[3].buffers.keys()


def test_an_error_in_the_perturbed_pass_leaves_everything_as_it_was(monkeypatch):
    method = make(dropout=0.5, epsilon=0.3)
    seen, original, calls = watched_second(method, monkeypatch), method._consistency, []

    def breaks(*arguments):
        calls.append(original(*arguments))
        if len(calls) == 2:
            raise KeyError
        return calls[-1]

    monkeypatch.setattr(method, "_consistency", breaks)
    random = []
    monkeypatch.setattr(method, "_supervised", spied(method._supervised, lambda: random.append(torch.get_rng_state())))
    start = flat(method.network)
    with pytest.raises(KeyError):
        run(method, make_batch())
    assert_equal(*seen)
    assert torch.equal(flat(method.network), start)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert all(m.track_running_stats for m in method.network.modules() if isinstance(m, nn.BatchNorm2d))


def spied(function, then):
    def spy(*arguments):
        result = function(*arguments)
        then()
        return result

    return spy


class Drawing(nn.Module):
    """A network that notes one number of torch's generator in every pass, as dropout draws them."""

    def __init__(self):
        super().__init__()
        self.conv, self.drawn, self.kinds = nn.Conv2d(1, 3, 3, padding=1), [], []

    def forward(self, images):
        self.drawn.append(torch.rand(()).item())
        self.kinds.append(torch.is_grad_enabled())
        return self.conv(images)


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ({}, 1),
        ({"update": "sequential"}, 2),
        ({"strong_views": 2}, 1),
        ({"second_view": "new"}, 1),
        ({"perturbation": "random"}, 1),
        ({"ascent_steps": 3}, 3),
        ({"second_targets": "recomputed"}, 1),
    ],
    ids=lambda each: "-".join(map(str, each.values())) or "default" if isinstance(each, dict) else "",
)
def test_every_perturbed_pass_drops_what_the_first_dropped(settings, times):
    """Otherwise two random networks are compared, not two places in weight space."""
    network = Drawing()
    method = make(network, epsilon=0.1, **settings)
    views = settings.get("strong_views", 1)
    run(method, make_batch())
    passes = [drawn for drawn, grad in zip(network.drawn, network.kinds, strict=True) if grad]  # labels come without
    first, labeled, later = passes[:views], passes[views], passes[views + 1 :]
    assert later == times * first
    assert labeled not in first
    state = torch.get_rng_state()
    without = make(Drawing(), alpha=0.0, **settings)
    run(without, make_batch())
    assert torch.equal(torch.get_rng_state(), state)  # the next iteration draws as if there were no perturbed pass


def test_without_replay_the_perturbed_pass_draws_anew():
    network = Drawing()
    run(make(network, replay_dropout=False), make_batch())
    assert len(set(network.drawn)) == 4


def test_the_perturbed_pass_sees_the_same_view_or_a_new_one():
    for kind in ("same", "new"):
        method = make(second_view=kind)
        passes = Passes(method.network)
        run(method, make_batch())
        assert torch.equal(passes.seen[3].images, passes.seen[1].images) == (kind == "same")


def test_labels_stay_those_of_the_first_pass_or_are_those_of_the_moved_weights(monkeypatch):
    for kind in ("same", "recomputed"):
        method = make(second_targets=kind, epsilon=3.0)
        original, seen = method._consistency, []
        monkeypatch.setattr(method, "_consistency", lambda v, t, f=original, s=seen: (s.append(t), f(v, t))[1])
        passes = Passes(method.network)
        run(method, make_batch())
        assert len(passes.seen) == (4 if kind == "same" else 5)
        if kind == "same":
            assert seen[0] is seen[1]
        else:
            assert not passes.seen[3].grad
            assert torch.equal(passes.seen[3].images, make_batch().unlabeled)
            assert (passes.displacement.norm() - 3).abs() < 0.1
            assert not torch.equal(seen[0].targets, seen[1].targets)
