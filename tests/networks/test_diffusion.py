"""The noise process against the numbers of the specification, where the step enters a network, and sampling."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.networks import build
from scantly.networks.diffusion import DiffusionNetwork, NoiseSchedule, signed_one_hot, time_embedding
from scantly.networks.skips import SkipNetwork

NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm)
TABLE = {
    0: (0.9999, 0.99995, 1.0e-4, 9999),
    99: (0.897018, 0.947110, 0.102982, 8.7104),
    249: (0.524085, 0.723937, 0.475915, 1.1012),
    499: (0.0785872, 0.280334, 0.921413, 0.08529),
    749: (0.00335055, 0.0578839, 0.996649, 0.003362),
    999: (4.03583e-5, 0.00635282, 0.999960, 4.04e-5),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def arguments_of(name, dims):
    if name == "dynunet":
        kernels = [[1] + [3] * (dims - 1), *[[3] * dims] * 2]
        return {"widths": [4, 8, 16], "kernel_sizes": kernels, "strides": [[1] * dims, *[[2] * dims] * 2]}
    return {"widths": [4, 8, 16], "dropout": [0.0] * 3 if name == "unet" else 0.0}


def network_of(name="unet", dims=2, channels=1, classes=2, *, trained=True, steps=1000, **arguments):
    """A diffusion network whose normalizations have seen something and whose biases are not what they began as."""
    torch.manual_seed(0)
    given_arguments = {**arguments_of(name, dims), **arguments}
    backbone = build(
        name, spatial_dims=dims, in_channels=channels + classes, out_channels=classes, arguments=given_arguments
    )
    network = DiffusionNetwork(SkipNetwork(backbone), classes, NoiseSchedule(steps))
    if trained:
        with torch.no_grad():
            network(randn(4, channels, *(8,) * dims), randn(4, classes, *(8,) * dims), torch.tensor([0, 3, 500, 999]))
    return network.eval()


# the noise process


@pytest.mark.parametrize("t", TABLE)
def test_the_table_of_the_specification(t):
    kept = NoiseSchedule().kept
    assert kept.dtype == torch.float64
    share, root, variance, ratio = TABLE[t]
    assert kept[t].item() == pytest.approx(share, rel=2e-6)
    assert kept[t].sqrt().item() == pytest.approx(root, rel=2e-6)
    assert 1 - kept[t].item() == pytest.approx(variance, rel=1e-5)
    assert (kept[t] / (1 - kept[t])).item() == pytest.approx(ratio, rel=1e-3)


def test_the_schedule_is_a_plain_product_and_is_not_saved():
    schedule = NoiseSchedule(5, (0.1, 0.5))
    left, expected = 1.0, []
    for beta in (0.1, 0.2, 0.3, 0.4, 0.5):
        left *= 1 - beta
        expected.append(left)
    assert schedule.kept.tolist() == pytest.approx(expected, rel=1e-12)
    assert schedule.state_dict() == {}


@pytest.mark.parametrize(("t", "mean", "variance"), [(99, 0.94711, 0.10298), (499, 0.28033, 0.92141)])
def test_mean_and_variance_of_noised_maps(t, mean, variance):
    """All of Y_0 is 1: 400,000 draws."""
    clean = torch.ones(4, 1, 100, 1000)
    noisy = NoiseSchedule().noised(clean, torch.full((4,), t), randn(*clean.shape))
    assert noisy.mean().item() == pytest.approx(mean, abs=0.01)
    assert noisy.var().item() == pytest.approx(variance, rel=0.015)


def test_every_row_is_noised_by_its_own_step():
    schedule, clean, noise = NoiseSchedule(), randn(3, 2, 4, 5), randn(3, 2, 4, 5, seed=1)
    t = torch.tensor([0, 499, 999])
    noisy = schedule.noised(clean, t, noise)
    for row, (_, root, variance, _) in enumerate(TABLE[step] for step in t.tolist()):
        torch.testing.assert_close(noisy[row], root * clean[row] + math.sqrt(variance) * noise[row], atol=1e-5, rtol=0)
    assert noisy.dtype == torch.float32


def test_the_worked_way_back():
    """From t = 499 to 249 with Y_t = 0.5 and an estimate of 1."""
    schedule = NoiseSchedule()
    t, earlier = torch.tensor([499]), torch.tensor([249])
    noisy, clean = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    back = schedule.step_back(noisy, clean, t, earlier)
    assert back.item() == pytest.approx(0.881808, abs=1e-6)
    assert ((back - 0.723937) / math.sqrt(0.475915)).item() == pytest.approx(0.228842, abs=3e-6)  # its noise


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), first=st.integers(1, 999), share=st.floats(0, 1, exclude_max=True))
def test_with_the_true_map_a_step_back_is_the_sample_of_the_same_noise(seed, first, share):
    schedule, earlier = NoiseSchedule(), int(first * share)
    clean, noise = randn(2, 3, 2, 4, seed=seed).sign().double(), randn(2, 3, 2, 4, seed=seed + 1).double()
    t, s = torch.full((2,), first), torch.full((2,), earlier)
    back = schedule.step_back(schedule.noised(clean, t, noise), clean, t, s)
    torch.testing.assert_close(back, schedule.noised(clean, s, noise), atol=1e-9, rtol=0)


def test_the_steps_of_the_way_back():
    assert NoiseSchedule().way_back(10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert NoiseSchedule().way_back(1) == [999]  # the noise itself is restored
    assert NoiseSchedule(7).way_back(4) == [6, 4, 2, 0]
    assert NoiseSchedule().way_back(50) == [round(999 * (49 - i) / 49) for i in range(50)]


def test_label_maps_become_signs():
    labels = torch.tensor([[[0, 2], [1, 1]]])
    signed = signed_one_hot(labels, 3)
    assert signed.shape == (1, 3, 2, 2)
    assert signed.dtype == torch.float32
    assert signed[0, :, 0, 1].tolist() == [-1, -1, 1]
    assert torch.equal(signed.argmax(1), labels)
    assert torch.equal(signed.sum(1), torch.full((1, 2, 2), -1.0))


# the step


def test_the_worked_time_embedding():
    embedded = time_embedding(torch.tensor([10]), 4)
    expected = torch.tensor([[-0.544021, 0.00100000, -0.839072, 0.9999995]])
    torch.testing.assert_close(embedded, expected, atol=1e-6, rtol=0)


def test_time_embeddings_are_their_formula():
    t = [0, 1, 77, 999]
    embedded = time_embedding(torch.tensor(t))
    assert embedded.shape == (4, 128)
    for row, step in zip(embedded.tolist(), t, strict=True):
        angles = [step * math.exp(-math.log(10_000) * i / 63) for i in range(64)]
        assert row[:64] == pytest.approx([math.sin(a) for a in angles], abs=2e-4)
        assert row[64:] == pytest.approx([math.cos(a) for a in angles], abs=2e-4)


def hooked(network):
    """Names of the normalizations at which the step enters."""
    backbone = network.network.backbone
    return [name for name, module in backbone.named_modules() if isinstance(module, NORMS) and module._forward_hooks]


VNET = ["encoder.1.1", "encoder.1.4", "encoder.2.1", "encoder.2.4", "encoder.2.7"]
PLACES = {
    # the first convolution of a level changes the size, except on the finest, which has one alone and gets nothing
    "vnet": [*VNET, "decoder.0.upsample.1", "decoder.0.block.1", "decoder.1.upsample.1"],
    "unet": ["encoder.0.1", "encoder.1.1", "encoder.2.1", "decoder.0.block.1", "decoder.1.block.1"],
    "unet3d": ["encoder.0.1", "encoder.1.1", "encoder.2.1", "decoder.0.block.1", "decoder.1.block.1"],
    "dynunet": [*(f"encoder.{i}.norm1" for i in range(3)), *(f"decoder.{i}.conv_block.norm1" for i in range(2))],
}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", PLACES)
def test_where_the_step_enters(name, dims):
    assert hooked(network_of(name, dims, trained=False)) == PLACES[name]


def test_where_the_step_enters_the_v_net_of_the_literature():
    network = network_of("vnet", 3, trained=False, widths=[16, 32, 64, 128, 256])
    counts = dict.fromkeys([*(f"encoder.{i}" for i in range(5)), *(f"decoder.{i}" for i in range(4))], 0)
    for name in hooked(network):
        counts[".".join(name.split(".")[:2])] += 1
    # down or up, and all convolutions of the block but the last: 1, 2, 3, 3, 3 down and 3, 3, 2, 1 up
    assert list(counts.values()) == [0, 2, 3, 3, 3, 3, 3, 2, 1]
    widths = [shift.out_features for shift in network.shifts]
    assert widths == [*[32] * 2, *[64] * 3, *[128] * 3, *[256] * 3, *[128] * 3, *[64] * 3, *[32] * 2, 16]


@pytest.mark.parametrize("upsampling", ["linear", "nearest"])
def test_an_interpolating_v_net_is_told_behind_its_convolution_too(upsampling):
    network = network_of("vnet", 2, trained=False, upsampling=upsampling)
    assert [name for name in hooked(network) if "upsample" in name] == ["decoder.0.upsample.2", "decoder.1.upsample.2"]


@pytest.mark.parametrize("name", PLACES)
def test_the_last_normalization_that_a_level_passes_is_left_alone(name):
    """By the order in which they are passed, not by that in which they are listed."""
    network, passed = network_of(name), []
    told = hooked(network)
    for place, module in network.network.backbone.named_modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(lambda *_, place=place: passed.append(place))
    network(randn(1, 1, 8, 8), randn(1, 2, 8, 8), torch.tensor([5]))
    levels = {}
    for place in passed:
        levels.setdefault(".".join(place.split(".")[:2]), []).append(place)
    assert sorted(told) == sorted(place for level in levels.values() for place in level[:-1])


def test_what_is_added_is_the_formula():
    network, seen = network_of(), []
    conv, norm = network.network.backbone.encoder[0][:2]
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))  # rectified in place next
    images, noisy, t = randn(2, 1, 8, 8), randn(2, 2, 8, 8, seed=1), torch.tensor([7, 700])
    network(images, noisy, t)
    first, _, second, _ = network.embedding
    assert (first.in_features, first.out_features, second.out_features) == (128, 512, 512)
    told = second(functional.silu(first(time_embedding(t))))
    added = network.shifts[0](functional.silu(told))
    raw = conv(torch.cat([images, noisy], 1))
    normalized = functional.batch_norm(raw, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(seen[0], normalized + added[:, :, None, None])


@pytest.mark.parametrize("name", ["vnet", "unet3d"])
def test_without_normalizations_the_step_could_not_enter(name):
    with pytest.raises(ConfigError, match=r"^the diffusion network is told the step .* network\.arguments\.norm"):
        network_of(name, 2, norm="none")


# the network


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", PLACES)
def test_image_and_noisy_map_and_step_all_matter(name, dims):
    network, size = network_of(name, dims, channels=2, classes=3), (8,) * dims
    images, noisy = randn(2, 2, *size), randn(2, 3, *size, seed=1)
    logits, features = network(images, noisy, torch.tensor([3, 900]))
    assert logits.shape == (2, 3, *size)
    assert features.shape == (2, 4, *size)
    for changed in (
        (images + 1 * randn(*images.shape, seed=2), noisy, torch.tensor([3, 900])),
        (images, noisy + randn(*noisy.shape, seed=2), torch.tensor([3, 900])),
        (images, noisy, torch.tensor([40, 500])),
    ):
        difference = (network(*changed)[0] - logits).abs().flatten(1).max(1).values
        assert (difference > 1e-4).all()
    only = (network(images, noisy, torch.tensor([3, 500]))[0] - logits).abs().flatten(1).max(1).values
    assert only[0] == 0
    assert only[1] > 1e-4


def test_a_row_does_not_see_the_other_rows_nor_their_steps():
    network = network_of()
    images, noisy, t = randn(5, 1, 8, 8), randn(5, 2, 8, 8, seed=1), torch.tensor([0, 999, 5, 5, 300])
    together = network(images, noisy, t)[0]
    for rows in ([0], [3, 1], [4, 2, 0]):
        torch.testing.assert_close(network(images[rows], noisy[rows], t[rows])[0], together[rows])


def test_a_copy_and_the_original_do_not_touch_each_other():
    network = network_of()
    inputs = randn(2, 1, 8, 8), randn(2, 2, 8, 8, seed=1), torch.tensor([3, 900])
    before = network(*inputs)[0]
    other = copy.deepcopy(network)
    assert torch.equal(other(*inputs)[0], before)
    with torch.no_grad():
        for shift in other.shifts:
            shift.bias.add_(1)
    assert torch.equal(network(*inputs)[0], before)
    moved = other(*inputs)[0]
    assert not torch.allclose(moved, before)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(other(*inputs)[0], moved)


def test_after_an_error_inside_nothing_of_the_step_is_left():
    network = network_of()
    with pytest.raises(ConfigError, match="multiples of 4"):
        network(randn(1, 1, 6, 6), randn(1, 2, 6, 6), torch.tensor([3]))
    assert network._shifts_now == []
    network(randn(2, 1, 8, 8), randn(2, 2, 8, 8), torch.tensor([3, 4]))
    assert network._shifts_now == []


def test_the_gradient_reaches_embedding_and_every_shift():
    network = network_of().train()
    network(randn(2, 1, 8, 8), randn(2, 2, 8, 8), torch.tensor([3, 900]))[0].square().sum().backward()
    for name, parameter in [*network.embedding.named_parameters(), *network.shifts.named_parameters()]:
        assert parameter.grad.abs().sum() > 0, name


def test_it_runs_under_autocast():
    network, noisy = network_of(), randn(2, 2, 8, 8, seed=1)
    images, t = randn(2, 1, 8, 8), torch.tensor([3, 900])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network(images, noisy, t)[0]
        sampled = network.sample(images, noisy, steps=3)
    torch.testing.assert_close(mixed.float(), network(images, noisy, t)[0], atol=0.1, rtol=0.1)
    assert sampled.isfinite().all()


# sampling


class Oracle(DiffusionNetwork):
    """Knows the true map; or says the same logits whatever it is asked."""

    def __init__(self, logits, schedule):
        nn.Module.__init__(self)
        self.logits, self.schedule, self.asked = logits, schedule, []

    def forward(self, images, noisy, t):
        self.asked.append((noisy, t))
        return self.logits, noisy


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_perfect_network_restores_the_map_along_one_noise(steps, clip):
    schedule, labels = NoiseSchedule(), torch.randint(3, (2, 4, 6), generator=generator())
    clean, noise = signed_one_hot(labels, 3), randn(2, 3, 4, 6, seed=1)
    oracle = Oracle(60 * clean, schedule)
    logits = oracle.sample(torch.zeros(2, 1, 4, 6), noise, steps=steps, clip=clip)
    assert torch.equal(logits.argmax(1), labels)
    assert [t.tolist() for _, t in oracle.asked] == [[step] * 2 for step in schedule.way_back(steps)]
    _, root, variance, _ = TABLE[999]
    hidden = (noise - root * clean) / math.sqrt(variance)  # which noise made this of the true map
    for noisy, t in oracle.asked:
        torch.testing.assert_close(noisy, schedule.noised(clean, t, hidden), atol=1e-4, rtol=0)


def test_one_pass_is_the_prediction_from_the_noise_itself():
    network, images, noise = network_of(), randn(2, 1, 8, 8), randn(2, 2, 8, 8, seed=1)
    sampled = network.sample(images, noise, steps=1)
    assert torch.equal(sampled, network(images, noise, torch.tensor([999, 999]))[0])


@pytest.mark.parametrize(("clip", "estimate"), [(False, [0.905148, -0.905148]), (True, [1.0, 0.0])])
def test_what_is_taken_for_the_clean_map_between_two_passes(clip, estimate):
    """Logits 3 and 0: probabilities 0.952574 and 0.047426."""
    schedule = NoiseSchedule()
    logits = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    oracle, noise = Oracle(logits, schedule), randn(1, 2, 2, 2)
    oracle.sample(torch.zeros(1, 1, 2, 2), noise, steps=3, clip=clip)
    clean = torch.tensor(estimate).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert torch.equal(oracle.asked[0][0], noise)
    for (noisy, t), (later, earlier) in zip(oracle.asked, oracle.asked[1:], strict=False):
        hidden = (noisy - schedule.kept[t].sqrt().float() * clean) / (1 - schedule.kept[t]).sqrt().float()
        torch.testing.assert_close(later, schedule.noised(clean, earlier, hidden), atol=1e-5, rtol=0)


def test_a_sample_is_made_of_single_passes():
    network, schedule = network_of(steps=20), NoiseSchedule(20)
    images, noisy = randn(2, 1, 8, 8), randn(2, 2, 8, 8, seed=1)
    sampled = network.sample(images, noisy, steps=3)
    for t, earlier in ((19, 10), (10, 0), (0, None)):
        logits = network(images, noisy, torch.tensor([t, t]))[0]
        if earlier is not None:
            clean = 2 * logits.softmax(1) - 1
            noisy = schedule.step_back(noisy, clean, torch.tensor([t, t]), torch.tensor([earlier, earlier]))
    assert torch.equal(sampled, logits)
