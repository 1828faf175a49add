"""UA-MT: the worked numbers of its specification, and what its passes are."""

from __future__ import annotations

import math

import pytest
import torch
from consistency_tasks import Fixed, make, make_batch, row_of

from scantly.losses import entropy
from scantly.methods.base import Progress


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 0.521028), (3_000, 0.569508), (6_000, 0.693147), (7_000, 0.693147)]
)
def test_the_threshold_rises_to_the_largest_entropy(iteration, expected):
    assert make("ua_mt").threshold(Progress(iteration, 6_000)) == pytest.approx(expected, abs=1e-6)


def test_the_threshold_knows_the_number_of_classes():
    last = Progress(10, 10)
    assert make("ua_mt", classes=4).threshold(last) == pytest.approx(math.log(4))
    assert make("ua_mt", classes=4, official=True).threshold(last) == pytest.approx(math.log(2))


def test_entropy_in_nats():
    mean = torch.tensor([[0.9, 0.6], [0.1, 0.4]])[None]
    assert entropy(mean, epsilon=1e-6)[0].tolist() == pytest.approx([0.32508, 0.67301], abs=1e-5)
    assert entropy(torch.full((1, 4, 1), 0.25), epsilon=1e-6).item() == pytest.approx(math.log(4), abs=4.2e-6)
    assert entropy(torch.tensor([[[1.0], [0.0]]]), epsilon=1e-6).item() == pytest.approx(-1e-6, abs=2e-7)


def test_uncertain_voxels_do_not_count(monkeypatch):
    method = make("ua_mt")
    method.student = Fixed([[0.8, 0.5], [0.2, 0.5]])
    method.teacher = Fixed([[0.9, 0.7], [0.1, 0.3]])
    uncertainty = entropy(torch.tensor([[0.9, 0.6], [0.1, 0.4]])[None, :, None], epsilon=1e-6)
    monkeypatch.setattr(method, "uncertainty", lambda _: uncertainty)
    method.losses(row_of(2), Progress(0, 6_000))
    logged = method.pop_logged()
    assert logged["disagreement"].item() == pytest.approx(0.01, abs=1e-6)
    assert logged["certain"].item() == 0.5


def test_without_a_certain_voxel_the_consistency_is_zero_and_so_is_its_gradient(monkeypatch):
    method = make("ua_mt", consistency=1.0, rampup_iterations=0)
    monkeypatch.setattr(method, "uncertainty", lambda images: torch.full(images[:, 0].shape, 9.0))
    term = method.losses(make_batch(), Progress(0, 10))["consistency"]
    term.backward()
    assert term.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in method.student.parameters())


def test_with_every_voxel_certain_it_is_mean_teacher(monkeypatch):
    settings = {"consistency": 1.0, "rampup_iterations": 0, "teacher_buffers": "own"}
    method, plain = make("ua_mt", classes=4, **settings), make("mean_teacher", classes=4, **settings)
    monkeypatch.setattr(method, "uncertainty", lambda images: torch.full(images[:, 0].shape, -1.0))
    batch = make_batch(classes=4)
    ours, theirs = (each.losses(batch, Progress(0, 10)) for each in (method, plain))
    for name in ("supervised", "consistency"):
        torch.testing.assert_close(ours[name], theirs[name])


@pytest.mark.parametrize(("passes", "rows"), [(8, [4] * 4), (3, [4, 2]), (1, [2])])
def test_two_passes_share_a_forward_and_none_has_a_gradient(passes, rows):
    method, seen = make("ua_mt", passes=passes), []
    method.teacher.register_forward_hook(lambda module, args, output: seen.append((len(args[0]), output.requires_grad)))
    with torch.no_grad():
        method.uncertainty(make_batch().unlabeled)
    assert seen == [(count, False) for count in rows]


def test_every_pass_has_noise_and_dropout_of_its_own():
    method, seen = make("ua_mt", dropout=0.5), []
    method.teacher.register_forward_hook(lambda module, args, output: seen.extend(zip(args[0], output, strict=True)))
    with torch.no_grad():
        method.uncertainty(make_batch(unlabeled=1).unlabeled)
    assert len({image.sum().item() for image, _ in seen}) == 8
    quiet = make("ua_mt", dropout=0.5, noise_std=0.0)
    seen.clear()
    quiet.teacher.register_forward_hook(lambda module, args, output: seen.extend(zip(args[0], output, strict=True)))
    with torch.no_grad():
        quiet.uncertainty(make_batch(unlabeled=1).unlabeled)
    assert len({output.sum().item() for _, output in seen}) == 8


def test_without_noise_and_dropout_the_uncertainty_is_the_entropy_of_one_pass():
    method = make("ua_mt", noise_std=0.0, passes=5).eval()
    images = make_batch().unlabeled
    with torch.no_grad():
        once = entropy(method.teacher(images).softmax(1), epsilon=1e-6)
        torch.testing.assert_close(method.uncertainty(images), once, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_reaches_the_student_only(dims):
    method = make("ua_mt", dims=dims, consistency=1.0, rampup_iterations=0)
    method.losses(make_batch(dims=dims), Progress(10, 10))["consistency"].backward()
    assert all(p.grad is not None and p.grad.any() for p in method.student.head.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())
