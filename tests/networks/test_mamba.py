"""The Mamba mixer against plain loops, the HF-Mamba block, and the skips that hold it."""

from __future__ import annotations

import math
from functools import partial
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.networks import VNet
from scantly.networks.high_frequency import Extractor, high_frequency
from scantly.networks.mamba import HighFrequencyMamba, HighFrequencySkips, MambaMixer

SIZES = {2: (4, 6), 3: (2, 4, 3)}


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def block_of(dims, channels=8, *, gamma=0.5, **options):
    """A block in float64 whose numbers are all far from their initial ones."""
    torch.manual_seed(0)
    block = HighFrequencyMamba(dims, channels, **options).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        block.gamma.fill_(gamma)
    return block


def silu(x):
    return x / (1 + math.exp(-x))


def mix_by_hand(mixer, tokens):
    """One mixer, number by number, for one sequence ``(L, c)``."""
    length, width = tokens.shape
    inner, (rank, state, _) = 2 * width, mixer.sizes
    expand, select, step, contract = (
        layer.weight.tolist() for layer in (mixer.expand, mixer.select, mixer.step, mixer.contract)
    )
    kernel, bias, step_bias = mixer.conv.weight[:, 0].tolist(), mixer.conv.bias.tolist(), mixer.step.bias.tolist()
    log, skip = mixer.A_log.tolist(), mixer.Dskip.tolist()

    def times(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    memory = [[0.0] * state for _ in range(inner)]
    before, outputs = [], []
    for position in range(length):
        both = times(expand, tokens[position].tolist())
        before.append(both[:inner])
        gate = both[inner:]
        u = []
        for d in range(inner):
            value = bias[d]
            for lag in range(4):  # the kernel's last weight is for the token itself
                if position >= lag:
                    value += kernel[d][3 - lag] * before[position - lag][d]
            u.append(silu(value))
        selected = times(select, u)
        b, c = selected[rank : rank + state], selected[rank + state :]
        deltas = times(step, selected[:rank])
        gated = []
        for d in range(inner):
            delta = math.log1p(math.exp(deltas[d] + step_bias[d]))
            for n in range(state):
                decay = math.exp(-delta * math.exp(log[d][n]))
                memory[d][n] = decay * memory[d][n] + delta * b[n] * u[d]
            y = sum(c[n] * memory[d][n] for n in range(state)) + skip[d] * u[d]
            gated.append(y * silu(gate[d]))
        outputs.append(times(contract, gated))
    return torch.tensor(outputs, dtype=torch.float64)


@pytest.mark.parametrize(("channels", "state", "length"), [(3, 8, 11), (18, 2, 5), (2, 3, 1), (1, 1, 40)])
def test_a_mixer_is_its_formula(channels, state, length):
    torch.manual_seed(0)
    mixer = MambaMixer(channels, state=state).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokens = random(2, length, channels)
    expected = torch.stack([mix_by_hand(mixer, sequence) for sequence in tokens])
    assert (mixer(tokens) - expected).abs().max() < 1e-10


def test_sizes_and_initial_values_of_a_mixer():
    torch.manual_seed(0)
    mixer = MambaMixer(40)
    assert parameters(mixer) == 40 * 160 + 80 * 4 + 80 + 80 * (3 + 16) + 3 * 80 + 80 + 80 * 8 + 80 + 80 * 40
    assert [name for name, module in mixer.named_modules() if getattr(module, "bias", None) is not None] == [
        "conv",
        "step",
    ]
    steps = functional.softplus(MambaMixer(2000, state=1).step.bias.double())
    assert steps.min() > 0.001 * (1 - 1e-5)
    assert steps.max() < 0.1 * (1 + 1e-5)
    # Log-uniform: a half of them below 10^-2, a quarter below 10^-2.5.
    assert (steps < 0.01).double().mean() == pytest.approx(0.5, abs=0.03)
    assert (steps < 10**-2.5).double().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 9).expand(80, 8))
    assert torch.equal(mixer.Dskip, torch.ones(80))


def test_a_mixer_looks_back_and_the_block_both_ways():
    torch.manual_seed(0)
    mixer = MambaMixer(8).double()
    tokens = random(2, 12, 8)
    changed = tokens.clone()
    changed[:, 7] += 1
    difference = (mixer(changed) - mixer(tokens)).abs().amax((0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0

    def influence(directions):
        block = block_of(2, directions=directions)
        grid = random(1, 8, 3, 4)
        changed = grid.clone()
        changed[:, :, 1, 3] += 1  # the token 7
        return (block.attention(changed) - block.attention(grid)).abs().amax((0, 1)).flatten()

    assert influence(1)[:7].max() == 0
    assert influence(1)[7:].min() > 0
    assert influence(2).min() > 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("channels", "count"), [(64, 21_089), (128, 75_969)])
def test_parameters_of_the_block(dims, channels, count):
    block = HighFrequencyMamba(dims, channels)
    assert parameters(block) == count
    mixer = parameters(block.mixers[0])
    assert parameters(HighFrequencyMamba(dims, channels, directions=1)) == count - mixer
    assert parameters(HighFrequencyMamba(dims, channels, directions=2 * dims)) == count + 2 * (dims - 1) * mixer


def manual(block, features):
    """Steps 1 to 6 for one or two directions."""
    high = high_frequency(features, block.extractor)
    h = torch.einsum("bi...,oi->b...o", high, block.reduce.weight.flatten(1)) + block.reduce.bias
    sizes, h = h.shape, h.flatten(1, -2)
    q = block.norm(h)
    h = h + block.mixers[0](q)
    if len(block.mixers) == 2:
        h = h + block.mixers[1](q.flip(1)).flip(1)
    restored = block.last_norm(h) @ block.restore.weight.flatten(1).T + block.restore.bias
    return features + block.gamma * restored.sigmoid().view(*sizes[:-1], -1).movedim(-1, 1) * high


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("extractor", get_args(Extractor))
def test_the_block_is_its_steps(dims, directions, extractor):
    block = block_of(dims, directions=directions, extractor=extractor)
    features = random(2, 8, *SIZES[dims])
    assert torch.allclose(block(features), manual(block, features), atol=1e-12)


@pytest.mark.parametrize(("dims", "directions"), [(2, 4), (3, 6)])
def test_many_directions_are_the_average_over_the_orders_of_the_axes(dims, directions):
    block = block_of(dims, directions=directions)
    grid = random(2, *SIZES[dims], 4)
    orders = {2: ["bhwc", "bwhc"], 3: ["bdhwc", "bhwdc", "bwdhc"]}[dims]
    expected = torch.zeros_like(grid)
    for number, order in enumerate(orders):
        turned = torch.einsum(f"{orders[0]}->{order}", grid)
        tokens = turned.reshape(2, -1, 4)
        forward, backward = block.mixers[2 * number : 2 * number + 2]
        mixed = forward(tokens) + backward(tokens.flip(1)).flip(1)
        expected += torch.einsum(f"{order}->{orders[0]}", mixed.view(turned.shape)) / len(orders)
    assert torch.allclose(block._mixed(grid), expected, atol=1e-12)


@pytest.mark.parametrize(("dims", "directions"), [(2, 4), (3, 6)])
def test_with_the_same_weights_many_directions_are_the_mean_of_turned_maps_and_turn_along(dims, directions):
    many, two = block_of(dims, directions=directions), block_of(dims)
    grid = random(2, *SIZES[dims], 4)
    for number, mixer in enumerate(many.mixers):
        mixer.load_state_dict(two.mixers[number % 2].state_dict())
    cycle = [0, *range(2, dims + 1), 1, dims + 1]
    back = [0, dims, *range(1, dims), dims + 1]
    turned, parts = grid, []
    for turns in range(dims):
        part = two._mixed(turned)
        for _ in range(turns):
            part = part.permute(back)
        parts.append(part)
        turned = turned.permute(cycle)
    assert torch.allclose(many._mixed(grid), torch.stack(parts).mean(0), atol=1e-12)
    assert torch.allclose(many._mixed(grid.permute(cycle)), many._mixed(grid).permute(cycle), atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("extractor", get_args(Extractor))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_new_block_returns_its_input_bit_for_bit(dims, extractor, dtype):
    block = HighFrequencyMamba(dims, 8, extractor=extractor)
    features = random(2, 8, *SIZES[dims]).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = block.to(dtype if dtype == torch.float64 else torch.float32)(features)
    assert output.dtype == dtype
    assert torch.equal(output, features)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("extractor", get_args(Extractor))
def test_a_constant_map_is_left_alone(dims, extractor):
    block = block_of(dims, gamma=3, extractor=extractor).float()
    features = torch.ones(1, 8, *SIZES[dims])
    assert torch.allclose(block(features), features, atol=3e-6)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_at_gamma_0_only_gamma_has_a_gradient_and_else_every_parameter(dims, stride):
    features = random(2, 8, *SIZES[dims])
    weight = random(2, 8, *SIZES[dims], seed=1)
    for gamma in (0, 0.5):
        block = block_of(dims, gamma=gamma, directions=2 * dims, token_stride=stride)
        (block(features) * weight).sum().backward()
        for name, parameter in block.named_parameters():
            assert bool(parameter.grad.any()) == (gamma != 0 or name == "gamma"), name


@pytest.mark.parametrize("dims", [2, 3])
def test_gradient_is_that_of_differences(dims):
    block = block_of(dims, 2, token_stride=2)
    features = random(1, 2, *(2, 3, 2)[:dims]).requires_grad_()
    assert torch.autograd.gradcheck(block, (features,))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_token_for_every_box(dims):
    block, sizes = block_of(dims, token_stride=2), (4, 6, 2)[:dims]
    features = random(2, 8, *sizes)
    high = high_frequency(features)
    pool = {2: functional.avg_pool2d, 3: functional.avg_pool3d}[dims]
    plain = block_of(dims)
    coarse = plain.attention(pool(high, 2))
    attention = functional.interpolate(coarse, sizes, mode={2: "bilinear", 3: "trilinear"}[dims])
    assert torch.allclose(block(features), features + 0.5 * attention * high, atol=1e-12)
    seen = []
    block.mixers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    block(features)
    assert seen == [math.prod(sizes) // 2**dims]


@pytest.mark.parametrize(
    ("size", "stride", "tokens"),
    [((5, 7), 2, 12), ((1, 9), 4, 3), ((3, 1, 6), 2, 6), ((1, 1, 1), 1, 1), ((2, 2, 2), 8, 1), ((5, 3, 2), 1, 30)],
    ids=str,
)
@pytest.mark.parametrize("extractor", get_args(Extractor))
def test_any_size(size, stride, tokens, extractor):
    if extractor == "haar" and stride > 1:
        stride, tokens = 3, math.prod(-(-side // 3) for side in size)
    block = block_of(len(size), extractor=extractor, token_stride=stride, directions=2 * len(size))
    seen = []
    block.mixers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    features = random(2, 8, *size)
    output = block(features)
    assert output.shape == features.shape
    assert output.isfinite().all()
    assert seen == [tokens]


def test_tokens_of_odd_sides_lie_where_the_interpolation_takes_them_to_be():
    """Boxes are placed symmetrically, so that mirrored maps have mirrored attention but for the order of the scan."""
    block = block_of(2, token_stride=2, directions=1)
    with torch.no_grad():
        block.mixers[0].contract.weight.zero_()
    high = random(1, 8, 5, 7)
    assert torch.allclose(block.attention(high.flip(2, 3)), block.attention(high).flip(2, 3), atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_checkpoint_changes_neither_values_nor_gradients(dims, autocast):
    results = []
    for checkpoint in (False, True):
        block = block_of(dims, checkpoint=checkpoint, directions=2 * dims, token_stride=2).float()
        calls = []
        block.mixers[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        features = random(2, 8, *SIZES[dims], dtype=torch.float32).requires_grad_()
        state = torch.get_rng_state()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            output = block(features)
        output.square().sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        assert len(calls) == 1 + checkpoint
        results.append([output.detach(), features.grad, *(p.grad for p in block.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("size", [(5, 6), (2, 4, 6), (1, 5, 3)], ids=str)
@pytest.mark.parametrize("extractor", get_args(Extractor))
def test_bf16_is_finite_and_near(size, extractor):
    stride = 1 if extractor == "haar" else 2
    block = block_of(len(size), 16, extractor=extractor, token_stride=stride, directions=2 * len(size)).float()
    features = random(2, 16, *size).bfloat16()
    results = []
    for autocast in (False, True):
        leaf = (features if autocast else features.float()).requires_grad_()
        block.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            output = block(leaf)
        output.float().square().sum().backward()
        results.append([output.float(), leaf.grad.float(), *(p.grad.clone() for p in block.parameters())])
    for exact, low in zip(*results, strict=True):
        assert low.isfinite().all()
        assert (low - exact).norm() < 0.1 * exact.norm() + 1e-2
    assert output.dtype == torch.bfloat16


def test_steps_and_scan_keep_float32_under_autocast(monkeypatch):
    seen = {}

    def spy(u, delta, *others):
        seen["delta"] = delta.dtype
        return torch.zeros_like(delta)

    monkeypatch.setattr("scantly.networks.mamba.selective_scan", spy)
    mixer = MambaMixer(8)
    mixer.expand.register_forward_hook(lambda *arguments: seen.update(expand=arguments[2].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixer(torch.randn(1, 5, 8))
    assert seen == {"delta": torch.float32, "expand": torch.bfloat16}


def test_parameters_without_weight_decay():
    skips = HighFrequencySkips((4, 8, 16), (1, 2), partial(HighFrequencyMamba, 3, directions=6))
    names = {id(p): name for name, p in skips.named_parameters()}
    found = [names[id(p)] for p in skips.undecayed()]
    assert len(found) == 2 * (1 + 6 * 2)
    assert sorted(found) == sorted(
        name for name in names.values() if name.split(".")[-1] in {"gamma", "A_log", "Dskip"}
    )
    assert all(isinstance(p, nn.Parameter) for p in skips.undecayed())


def test_blocks_change_the_skips_of_their_levels_only():
    torch.manual_seed(0)
    network = VNet(3, 1, 2, widths=[2, 4, 8, 16], dropout=0).eval()
    skips = HighFrequencySkips(network.widths, (3, 2), partial(HighFrequencyMamba, 3, extractor="haar"))
    images = torch.randn(1, 1, 16, 16, 8)
    features = network.encode(images)
    assert torch.equal(network.decode(skips(features)), network(images))
    for block in skips.blocks:
        nn.init.constant_(block.gamma, 0.5)
    kept = list(features)
    replaced = skips(features)
    assert all(a is b for a, b in zip(features, kept, strict=True))
    assert [a is b for a, b in zip(replaced, features, strict=True)] == [True, False, False, True]
    assert torch.equal(replaced[1], skips.blocks[0](features[1]))
    assert torch.equal(replaced[2], skips.blocks[1](features[2]))
    assert (
        parameters(HighFrequencySkips(VNet(3, 1, 2).widths, (3, 4), partial(HighFrequencyMamba, 3))) == 21_089 + 75_969
    )


@pytest.mark.parametrize("level", [0, 3, -1])
def test_a_level_without_skip_is_refused(level):
    message = (
        rf"level {level} of method\.hf_levels has no skip connection: the network has 3 levels, with skip connections "
        r"at levels 1 to 2; choose method\.hf_levels among those\."
    )
    with pytest.raises(ConfigError, match=message):
        HighFrequencySkips((4, 8, 16), (1, level), partial(HighFrequencyMamba, 2))


@pytest.mark.parametrize(
    ("dims", "directions", "known"), [(2, 6, "1, 2 or 4"), (3, 4, "1, 2 or 6"), (2, 0, "1, 2 or 4"), (3, 3, "1, 2")]
)
def test_directions_that_do_not_exist_are_refused(dims, directions, known):
    with pytest.raises(
        ConfigError, match=rf"{directions} directions do not exist in {dims}D; set method\.hf_directions"
    ):
        HighFrequencyMamba(dims, 4, directions=directions)
    with pytest.raises(ConfigError, match=f"to {known}"):
        HighFrequencyMamba(dims, 8, directions=directions)


def test_boxes_in_which_haar_leaves_nothing_are_refused():
    high = high_frequency(random(1, 2, 4, 6, 8), "haar")
    assert functional.avg_pool3d(high, 2).abs().max() < 1e-12
    message = r"boxes 2 voxels wide .* haar .* method\.hf_extractor or set method\.hf_token_stride to 1\."
    with pytest.raises(ConfigError, match=message):
        HighFrequencyMamba(3, 4, extractor="haar", token_stride=2)
