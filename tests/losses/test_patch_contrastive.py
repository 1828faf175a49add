import math

import pytest
import torch
from torch.nn.functional import normalize

from scantly.losses.patch_contrastive import (
    binary_entropy,
    closed_form_contrast,
    discrete_contrast,
)

A = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
B = torch.tensor([[0.0, 1.0], [-0.6, 0.8]])
C = torch.tensor([[-1.0, 0.0], [-0.8, -0.6]])


def statistics(*queues):
    """Mean and biased covariance of each queue."""
    covariances = [torch.cov(queue.T.double(), correction=0).float() for queue in queues]
    return torch.stack([queue.mean(0) for queue in queues]), torch.stack(covariances)


def closed(*queues, anchors=None, tau=1.0, lam=1.0, psi=2.0):
    """Loss of each vector of the queues against the queues themselves."""
    means, covariances = statistics(*queues)
    groups = torch.arange(len(queues)).repeat_interleave(2)
    vectors = torch.cat(queues) if anchors is None else anchors
    return [
        closed_form_contrast(
            vector[None],
            group[None],
            means,
            covariances,
            temperature=tau,
            covariance_weight=lam,
            negative_weight=psi,
        ).item()
        for vector, group in zip(vectors, groups, strict=True)
    ]


def random_queues(classes=3, rows=20, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = 2 * torch.randn(classes, 1, width, generator=generator)
    return list(normalize(centers + torch.randn(classes, rows, width, generator=generator), dim=2))


def naive_closed(anchors, groups, means, covariances, tau, lam, psi):
    total = 0.0
    for f, i in zip(anchors.double(), groups.tolist(), strict=True):
        score = [
            f @ mu / tau + lam / (2 * tau**2) * f @ sigma @ f
            for mu, sigma in zip(means.double(), covariances.double(), strict=True)
        ]
        weighted = sum(math.exp(s) * (1 if j == i else psi / len(means)) for j, s in enumerate(score))
        total += -float(f @ means[i].double()) / tau + math.log(weighted)
    return total / len(anchors)


# entropy


@pytest.mark.parametrize(
    ("patch", "nats", "bits"),
    [
        ([[0.9, 0.8], [0.5, 0.6]], [0.325083, 0.500402, 0.693147, 0.673012], [0.468996, 0.721928, 1, 0.970951]),
    ],
)
def test_entropy_of_the_ambiguous_patch(patch, nats, bits):
    patch = torch.tensor(patch)
    assert binary_entropy(patch, base=math.e).flatten().tolist() == pytest.approx(nats, abs=1e-6)
    assert binary_entropy(patch).flatten().tolist() == pytest.approx(bits, abs=1e-6)
    assert binary_entropy(patch, base=math.e).mean().item() == pytest.approx(0.547911, abs=1e-6)
    assert binary_entropy(patch).mean().item() == pytest.approx(0.790469, abs=1e-6)


def test_entropy_of_the_certain_patch():
    patch = torch.tensor([[0.99, 0.98], [0.95, 0.97]])
    assert binary_entropy(patch, base=math.e).mean().item() == pytest.approx(0.121825, abs=1e-6)
    assert binary_entropy(patch).mean().item() == pytest.approx(0.175756, abs=1e-6)


def test_sampling_weights_of_the_two_patches():
    patches = torch.tensor([[[0.9, 0.8], [0.5, 0.6]], [[0.99, 0.98], [0.95, 0.97]]])
    weights = 1 - binary_entropy(patches).mean((1, 2))
    assert weights.tolist() == pytest.approx([0.209531, 0.824244], abs=1e-6)
    assert (weights / weights.sum()).tolist() == pytest.approx([0.202686, 0.797314], abs=1e-6)


def test_entropy_is_symmetric_bounded_and_largest_at_a_half():
    probs = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    entropy = binary_entropy(probs)
    torch.testing.assert_close(entropy, binary_entropy(1 - probs), rtol=0, atol=1e-6)
    assert entropy.min() > 0
    assert entropy.max() <= 1
    assert binary_entropy(torch.tensor(0.5)) == 1
    assert (binary_entropy(torch.tensor([0.49, 0.51])) < 1).all()


def test_one_hot_maps_have_almost_no_entropy_the_same_inside_and_outside():
    inside, outside = binary_entropy(torch.tensor([1.0, 0.0]))
    assert inside.item() == pytest.approx(2.5e-6, rel=0.05)
    assert inside == outside


# statistics


def test_statistics_of_the_worked_queues():
    means, covariances = statistics(A, B)
    torch.testing.assert_close(means, torch.tensor([[0.9, 0.3], [-0.3, 0.9]]))
    expected = torch.tensor([[[0.01, -0.03], [-0.03, 0.09]], [[0.09, 0.03], [0.03, 0.01]]])
    torch.testing.assert_close(covariances, expected, rtol=0, atol=1e-6)


# closed form


def test_closed_form_without_covariance():
    assert closed(A, B, lam=0) == pytest.approx([0.263282, 0.437488, 0.437488, 0.263282], abs=1e-6)
    assert sum(closed(A, B, lam=0)) / 4 == pytest.approx(0.350385, abs=1e-6)


def test_closed_form_with_covariance():
    losses = closed(A, B)
    assert losses[:2] == pytest.approx([0.277685, 0.456845], abs=1e-6)
    assert sum(losses) / 4 == pytest.approx(0.367265, abs=1e-6)
    f, (means, covariances) = A[0], statistics(A, B)
    scores = [(f @ mean + 0.5 * f @ sigma @ f).item() for mean, sigma in zip(means, covariances, strict=True)]
    assert scores == pytest.approx([0.905, -0.255], abs=1e-6)


def test_closed_form_with_twice_the_negatives():
    losses = closed(A, B, psi=4)
    assert losses[:2] == pytest.approx([0.491721, 0.766935], abs=1e-6)
    assert sum(losses) / 4 == pytest.approx(0.629328, abs=1e-6)


def test_closed_form_at_the_warm_ups_temperature():
    losses = closed(A, B, tau=0.2, lam=4, psi=4)
    assert losses[:2] == pytest.approx([0.739545, 2.361995], abs=2e-5)
    assert sum(losses) / 4 == pytest.approx(1.550770, abs=2e-5)


@pytest.mark.parametrize(
    ("psi", "each", "mean"),
    [(3, [0.396221, 0.556876, 0.638766, 0.638766, 0.556876, 0.396221], 0.530621), (6, None, 0.870257)],
)
def test_closed_form_of_three_classes(psi, each, mean):
    losses = closed(A, B, C, psi=psi)
    if each is not None:
        assert losses == pytest.approx(each, abs=1e-6)
    assert sum(losses) / 6 == pytest.approx(mean, abs=1e-6)


def test_closed_form_is_the_mean_over_anchors_and_agrees_with_a_loop():
    queues = random_queues()
    means, covariances = statistics(*queues)
    anchors = torch.cat([queue[:n] for queue, n in zip(queues, (3, 1, 5), strict=True)])
    groups = torch.tensor([0] * 3 + [1] + [2] * 5)
    for tau, lam, psi in ((1.0, 10.0, 4096.0), (0.2, 4.0, 4096.0), (0.5, 0.0, 1.0)):
        ours = closed_form_contrast(
            anchors, groups, means, covariances, temperature=tau, covariance_weight=lam, negative_weight=psi
        )
        assert ours.item() == pytest.approx(naive_closed(anchors, groups, means, covariances, tau, lam, psi), rel=1e-5)


def test_closed_form_is_above_the_expectation_that_it_bounds():
    means, covariances = (each.double() for each in statistics(A, B))
    generator = torch.Generator().manual_seed(0)
    # each class spreads along one direction only: x = mu + z * direction
    z = torch.randn(2, 1_000_000, generator=generator, dtype=torch.float64)
    directions = torch.tensor([[-0.1, 0.3], [0.3, 0.1]], dtype=torch.float64)
    torch.testing.assert_close(directions[:, :, None] * directions[:, None], covariances, rtol=0, atol=1e-6)
    own, other = ((mean + each[:, None] * d)[:, 0] for mean, d, each in zip(means, directions, z, strict=True))
    expectation = (-own + torch.logaddexp(own, other)).mean().item()
    assert expectation == pytest.approx(0.27212, abs=4e-4)
    assert expectation < closed(A, B)[0] == pytest.approx(0.277685, abs=1e-6)


@pytest.mark.parametrize("copies", [1, 3])
def test_with_identical_vectors_it_is_the_discrete_loss_with_that_many_negatives(copies):
    own, other = normalize(torch.tensor([[0.3, 0.9, 0.1]])), normalize(torch.tensor([[-0.5, 0.2, 0.7]]))
    anchor = normalize(torch.tensor([[1.0, 0.4, -0.2]]))
    means, covariances = statistics(own.repeat(9, 1), other.repeat(9, 1))
    torch.testing.assert_close(covariances, torch.zeros(2, 3, 3), rtol=0, atol=1e-6)
    group = torch.tensor([0])
    ours = closed_form_contrast(
        anchor, group, means, covariances, temperature=0.5, covariance_weight=2.0, negative_weight=2.0 * copies
    )
    keys = torch.cat([own, other.repeat(copies, 1)])
    expected = discrete_contrast(anchor, group, keys, torch.tensor([0] + [1] * copies), temperature=0.5)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)


def test_closed_form_rises_with_negatives_and_covariance_and_is_invariant_to_rotation():
    queues = random_queues()
    losses = [sum(closed(*(q[:2] for q in queues), psi=psi)) for psi in (1.0, 2.0, 4.0)]
    assert losses[0] < losses[1] < losses[2]
    losses = [sum(closed(*(q[:2] for q in queues), lam=lam)) for lam in (0.0, 1.0, 4.0)]
    assert losses[0] <= losses[1] <= losses[2]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    turned = closed(*(q[:2] @ rotation for q in queues))
    assert turned == pytest.approx(closed(*(q[:2] for q in queues)), abs=1e-5)


@pytest.mark.parametrize("classes", [0, 1])
def test_fewer_than_two_classes_cost_nothing_and_keep_the_graph(classes):
    anchors = torch.randn(4, 8, requires_grad=True)
    arguments = (torch.zeros(4, dtype=torch.long), torch.zeros(classes, 8), torch.zeros(classes, 8, 8))
    loss = closed_form_contrast(anchors, *arguments, temperature=1, covariance_weight=1, negative_weight=4096)
    loss.backward()
    assert loss == 0
    assert anchors.grad is not None
    assert not anchors.grad.any()


def test_anchors_take_gradient_and_queues_none():
    queues = [queue.requires_grad_() for queue in random_queues(2, 4)]
    means, covariances = statistics(*queues)
    anchors = torch.randn(3, 8, requires_grad=True)
    groups = torch.tensor([0, 0, 1])
    closed_form_contrast(
        anchors, groups, means, covariances, temperature=1, covariance_weight=1, negative_weight=1
    ).backward()
    discrete_contrast(
        anchors, groups, torch.cat(queues), torch.arange(2).repeat_interleave(4), temperature=1
    ).backward()
    assert (anchors.grad.abs().sum(1) > 0).all()
    assert all(queue.grad is None for queue in queues)


def test_closed_form_stays_finite_and_float32_under_autocast():
    queues = random_queues(width=128)
    means, covariances = statistics(*queues)
    anchors = torch.cat([queue[:2] for queue in queues]).requires_grad_()
    arguments = (torch.arange(3).repeat_interleave(2), means, covariances)
    settings = {"temperature": 0.2, "covariance_weight": 4.0, "negative_weight": 4096.0}
    plain = closed_form_contrast(anchors, *arguments, **settings)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = closed_form_contrast(anchors, *arguments, **settings)
        rounded = closed_form_contrast(anchors.bfloat16(), *arguments, **settings)
    assert torch.equal(plain, mixed)
    assert rounded.dtype == torch.float32
    rounded.backward()
    assert anchors.grad.isfinite().all()


# discrete form


def discrete(tau, anchors=None, **options):
    vectors, groups = torch.cat([A, B]), torch.tensor([0, 0, 1, 1])
    return [
        discrete_contrast(
            vectors[i : i + 1],
            groups[i : i + 1],
            vectors,
            groups,
            temperature=tau,
            exclude=torch.eye(4, dtype=torch.bool)[i : i + 1],
        ).item()
        for i in range(4)
    ]


def test_discrete_loss_of_the_worked_vectors():
    losses = discrete(1.0)
    assert losses == pytest.approx([0.528229, 0.818925, 0.818925, 0.528229], abs=1e-6)
    assert losses[0] == pytest.approx(-0.8 + math.log(math.exp(0.8) + 1 + math.exp(-0.6)), abs=1e-6)
    assert sum(losses) / 4 == pytest.approx(0.673577, abs=1e-6)


def test_discrete_loss_at_a_low_temperature():
    losses = discrete(0.2)
    assert losses == pytest.approx([0.019045, 0.326563, 0.326563, 0.019045], abs=1e-6)
    vectors, groups = torch.cat([A, B]), torch.tensor([0, 0, 1, 1])
    mean = discrete_contrast(vectors, groups, vectors, groups, temperature=0.2, exclude=torch.eye(4, dtype=torch.bool))
    assert mean.item() == pytest.approx(0.172804, abs=1e-6)


def test_discrete_loss_agrees_with_a_loop():
    keys = torch.cat(random_queues(3, 5))
    key_groups = torch.arange(3).repeat_interleave(5)
    valid = torch.arange(15) % 4 != 3
    anchors, groups = (
        normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(3))),
        torch.tensor([2, 0, 1, 0]),
    )
    total = 0.0
    for f, i in zip(anchors, groups.tolist(), strict=True):
        s = [math.exp(float(f @ key) / 0.3) for key in keys]
        negative = sum(s[n] for n in range(15) if valid[n] and key_groups[n] != i)
        losses = [-math.log(s[n] / (s[n] + negative)) for n in range(15) if valid[n] and key_groups[n] == i]
        total += sum(losses) / len(losses)
    ours = discrete_contrast(anchors, groups, keys, key_groups, temperature=0.3, valid=valid)
    assert ours.item() == pytest.approx(total / 4, rel=1e-5)


def test_anchors_without_positives_or_negatives_are_not_counted():
    anchors = torch.cat([A, B]).requires_grad_()
    groups = torch.tensor([0, 0, 1, 1])
    only_a = discrete_contrast(
        anchors, groups, A, torch.tensor([0, 0]), temperature=1.0
    )  # no negatives, or no positives
    assert only_a == 0
    only_a.backward()
    assert not anchors.grad.any()
    valid = torch.tensor([True, True, False, True])
    both = discrete_contrast(anchors[2:3], groups[2:3], torch.cat([A, B]), groups, temperature=1.0, valid=valid)
    beside_a_lonely_one = discrete_contrast(
        anchors[2:4],
        torch.tensor([1, 2]),  # class 2 has no key
        torch.cat([A, B]),
        groups,
        temperature=1.0,
        valid=valid,
    )
    assert both.item() == pytest.approx(beside_a_lonely_one.item())


def test_an_anchor_without_negatives_does_not_dilute_the_mean():
    anchors, groups = torch.stack([A[0], B[0]]), torch.tensor([0, 1])
    exclude = torch.tensor([[False, False, False, False], [True, True, False, False]])  # the second sees its class only
    keys, key_groups = torch.cat([A, B]), torch.tensor([0, 0, 1, 1])
    both = discrete_contrast(anchors, groups, keys, key_groups, temperature=1.0, exclude=exclude)
    first = discrete_contrast(anchors[:1], groups[:1], keys, key_groups, temperature=1.0)
    assert both.item() == pytest.approx(first.item())


def test_discrete_gradients_are_finite_at_low_temperature_in_bf16():
    anchors = torch.cat([A, B]).bfloat16().requires_grad_()
    groups = torch.tensor([0, 0, 1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = discrete_contrast(anchors, groups, torch.cat([A, B]), groups, temperature=0.01)
    loss.backward()
    assert loss.dtype == torch.float32
    assert anchors.grad.isfinite().all()
