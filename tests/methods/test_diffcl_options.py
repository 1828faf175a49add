"""Diff-CL: steps of the noise, options, and parts switched off."""

from __future__ import annotations

import copy

import pytest
import torch
from diffcl_steps import CLASSES, LATE, Watch, at, make, make_batch, seg, train
from torch import nn
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.methods.base import Task
from scantly.methods.diffcl import DiffCL

# steps of the noise


def test_every_row_has_a_step_of_its_own_within_its_range():
    method = make(t_range_labeled=(0.0, 0.1), t_range_unlabeled=(0.25, 1.0))
    watch = Watch(method)
    for seed in range(10):
        method.losses(make_batch(seed=seed), at(0))
    t = torch.stack([values[1] for values in watch.noised])
    assert (t[:, :2] < 100).all()
    assert (t[:, 2:] >= 250).all()
    assert t.max() < 1000
    assert len(t[:, 2:].unique()) > 10
    assert (t[:, 2] != t[:, 3]).any()
    noises = torch.stack([values[2] for values in watch.noised]).flatten(0, 1).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(40)).abs().max() < 0.25


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [((0.0, 1.0), 1000, (0, 999)), ((0.25, 1.0), 1000, (250, 999)), ((0.0, 0.5), 4, (0, 1)), ((0.5, 0.501), 4, (2, 2))],
)
def test_steps_are_uniform_between_the_shares(shares, steps, expected):
    method = make(diffusion_steps=steps)
    t = method._times(20_000, shares)
    low, high = expected
    assert (t.min().item(), t.max().item()) == expected
    assert t.float().mean().item() == pytest.approx((low + high) / 2, abs=max(0.02 * (high - low), 1e-9))


@pytest.mark.parametrize(("steps", "shares"), [(2, (0.8, 1.0)), (1000, (0.9996, 1.0))])
def test_a_range_at_the_very_end_stays_within_the_schedule(steps, shares):
    t = make(diffusion_steps=steps)._times(10, shares)
    assert t.max() < steps


@pytest.mark.parametrize("value", [(0.9, 0.1), (-0.1, 1.0), (0.0, 1.1)])
@pytest.mark.parametrize("name", ["t_range_labeled", "t_range_unlabeled", "betas"])
def test_ranges_that_are_none_are_refused(name, value):
    with pytest.raises(ValueError, match="the smaller first"):
        DiffCL.Config(**{name: value})


def test_betas_may_be_constant_and_ranges_not_be_empty():
    assert DiffCL.Config(betas=(0.02, 0.02)).betas == (0.02, 0.02)
    with pytest.raises(ValueError, match="two shares"):
        DiffCL.Config(t_range_labeled=(0.5, 0.5))


# options


def test_doubtful_pseudo_labels_can_be_left_out_of_the_cross_entropy():
    method, batch = make(pseudo_confidence=0.36), make_batch()
    watch = Watch(method)
    terms = method.losses(batch, at(500))
    ((_, ds),), (cs,) = watch.ds, watch.cs
    for name, learner, teacher in (("ds_pseudo", ds[2:], cs[2:]), ("cs_pseudo", cs[2:], ds[2:])):
        confidence, labels = teacher.softmax(1).max(1)
        trusted = confidence >= 0.36
        assert 0 < trusted.float().mean() < 1
        entropy = (functional.cross_entropy(learner, labels, reduction="none") * trusted).mean()
        dice = 2 * seg(learner, labels) - functional.cross_entropy(learner, labels)
        assert terms[name].item() == pytest.approx(0.1 * 0.5 * (entropy + dice).item(), rel=1e-4), name


def test_a_confidence_that_all_have_changes_nothing():
    batch = make_batch()
    all_of_them, by_mask = (make(pseudo_confidence=value).losses(batch, at(500)) for value in (0.0, 0.01))
    for name in ("ds_pseudo", "cs_pseudo"):
        assert by_mask[name].item() == pytest.approx(all_of_them[name].item(), rel=1e-5)


def test_sampled_pseudo_labels_are_those_of_a_sample(monkeypatch):
    method, batch, sampled = make(ds_pseudo="ddim", ds_pseudo_steps=3), make_batch(), []
    original = method.ds.sample

    def spy(images, noise, **options):
        assert torch.equal(images, batch.unlabeled)
        assert options == {"steps": 3, "clip": False}
        assert not torch.is_grad_enabled()
        sampled.append(original(images, noise, **options))
        return sampled[-1]

    monkeypatch.setattr(method.ds, "sample", spy)
    watch = Watch(method)
    terms = method.losses(batch, at(500))
    expected = 0.1 * seg(watch.cs[0][2:], sampled[0].argmax(1)).item()
    assert terms["cs_pseudo"].item() == pytest.approx(expected, rel=1e-4)
    assert len(watch.ds) == 1 + 3
    one_step = 0.1 * seg(watch.cs[0][2:], watch.ds[0][1][2:].argmax(1)).item()
    assert terms["cs_pseudo"].item() != pytest.approx(one_step, rel=1e-4)


def test_sampling_pseudo_labels_leaves_the_running_averages_alone():
    batch, states = make_batch(), []
    for kind in ("one_step", "ddim"):
        method = make(ds_pseudo=kind)
        method.losses(batch, at(500))
        states.append({name: value.clone() for name, value in method.ds.named_buffers()})
        norms = [m for m in method.ds.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(norm.track_running_stats and norm.training for norm in norms)
        assert {int(norm.num_batches_tracked) for norm in norms} == {1}
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_squared_error_is_added_exactly():
    batch, terms = make_batch(), []
    for ds_mse in (False, True):
        method = make(ds_mse=ds_mse)
        watch = Watch(method)
        terms.append(method.losses(batch, at(500)))
    probs = watch.ds[0][1][:2].softmax(1)
    target = functional.one_hot(batch.labels, 3).movedim(-1, 1)
    squared = (probs - target).square().mean().item()
    added = terms[1]["ds_supervised"].item() - terms[0]["ds_supervised"].item()
    assert added == pytest.approx(squared, abs=1e-6)
    for name in ("cs_supervised", "ds_pseudo", "cs_pseudo"):
        assert terms[0][name] == terms[1][name]


@pytest.mark.parametrize(("network", "dims"), [("unet", 2), ("vnet", 3), ("unet3d", 3)])
def test_the_backbones_drop_nothing_unless_told_to(network, dims):
    for keep in (False, True):
        method = make(dims, network, network_dropout=keep)
        for part in (method.cs, method.ds):
            rates = {m.p for m in part.modules() if isinstance(m, nn.Dropout | nn.Dropout2d | nn.Dropout3d)}
            assert rates
            assert any(rates) == keep
    images = make_batch(dims).labeled
    method = make(dims, network)
    assert torch.equal(method.cs(images)[0], method.cs(images)[0])


@pytest.mark.parametrize(("count", "levels"), [(2, {1}), (3, {2}), (4, {3}), (5, {3, 4}), (6, {3, 4})], ids=str)
def test_the_mamba_blocks_are_on_levels_3_and_4_or_the_deepest_there_is(count, levels):
    method = make(widths=(4,) * count, size=32)
    assert set(method.cs.gates()) == levels
    assert method.ds.network.skips is None


def test_the_mamba_blocks_go_where_they_are_told():
    method = make(widths=(4, 8, 16), hf_in=("cs", "ds"), hf_levels=(1, 2))
    assert set(method.cs.gates()) == set(method.ds.network.gates()) == {1, 2}
    only = make(hf_in=("ds",))
    assert only.cs.skips is None
    assert set(only.ds.network.gates()) == {1}
    none = make(use_hf=False, hf_in=("cs", "ds"))
    assert none.cs.skips is None
    assert none.ds.network.skips is None
    for method in (only, none):
        train(method, make_batch(), 2)
    with pytest.raises(ConfigError, match=r"level 2 of method\.hf_levels has no skip connection"):
        make(hf_levels=(2,))


def test_settings_of_the_mamba_blocks_reach_them():
    method = make(
        3, hf_directions=6, hf_state=3, hf_reduction=4, hf_token_stride=3, hf_extractor="fft", hf_cutoff=0.3,
        hf_checkpoint=True,
    )  # fmt: skip
    (block,) = method.cs.skips.blocks
    assert (len(block.mixers), block.token_stride, block.extractor, block.cutoff) == (6, 3, "fft", 0.3)
    assert block.checkpoint
    assert block.reduce.out_channels == 1
    assert block.mixers[0].A_log.shape[1] == 3


def test_the_networks_begin_alike_with_and_without_the_parts():
    """Ablations compare like with like."""
    whole, bare = make(), make(use_ds=False, use_hf=False)
    for name, value in bare.cs.backbone.state_dict().items():
        assert torch.equal(value, whole.cs.backbone.state_dict()[name]), name


# switches


def test_without_the_diffusion_network_it_is_supervised_training():
    method, batch = make(use_ds=False, use_hf=False), make_batch(unlabeled=0)
    (stage,) = method.stages()
    assert stage.unlabeled.count == 0
    assert (method.ds, method.contrast) == (None, None)
    expected = seg(copy.deepcopy(method.cs)(batch.labeled)[0], batch.labels).item()
    terms = method.losses(batch, at(LATE))
    assert list(terms) == ["cs_supervised"]
    assert terms["cs_supervised"].item() == pytest.approx(expected, rel=1e-5)
    assert list(method.optimizers(stage)) == ["cs"]
    history = train(method, batch, 8)
    assert history[-1]["cs_supervised"] < history[0]["cs_supervised"]
    assert make().stages()[0].unlabeled.count is None


def test_what_needs_the_missing_network_is_refused():
    for infer in ("ds", "mean"):
        with pytest.raises(ConfigError, match=f"infer={infer} needs the diffusion network, and method.use_ds is false"):
            make(use_ds=False, infer=infer)


def test_a_batch_without_unlabeled_rows_is_refused():
    with pytest.raises(ConfigError, match=r"needs unlabeled rows; set plan\.unlabeled_batch_size"):
        make().losses(make_batch(unlabeled=0), at(0))


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"remove deep_supervision from network\.arguments"):
        make(2, "dynunet", widths=(4, 8, 16, 16), arguments={"deep_supervision": True})
    with pytest.raises(ConfigError, match="gives logits only"):
        DiffCL(Task(1, CLASSES, 2, (32, 32), "AttentionUnet", {"channels": [4, 8], "strides": [2]}), DiffCL.Config())
    with pytest.raises(ConfigError, match=r"told the step behind normalizations.*network\.arguments\.norm"):
        make(3, "vnet", arguments={"norm": "none"})


def test_fewer_voxels_than_pairs_are_refused():
    method = make(positives=100, negatives=500, candidates=600)
    with pytest.raises(ConfigError, match=r"have 512 voxels .*= 600; lower these"):
        method.losses(make_batch(), at(LATE))


def test_specified_settings_are_the_defaults():
    config = DiffCL.Config()
    assert (config.mu1, config.mu2, config.eta, config.rampup_share, config.contrast_start) == (0.1, 0.1, 0.1, 0.4, 0.1)
    assert (config.diffusion_steps, config.betas, config.t_range_labeled) == (1000, (1e-4, 0.02), (0, 1))
    assert (config.t_range_unlabeled, config.ds_pseudo, config.pseudo_confidence) == ((0, 1), "one_step", 0)
    assert (config.ds_optimizer, config.ds_lr, config.ds_weight_decay) == ("adamw", 1e-4, 1e-3)
    assert (config.ds_gradient_clip, config.ds_mse, config.network_dropout) == (1.0, False, False)
    assert (config.temperature, config.embedding, config.queue, config.pushed) == (0.1, 32, 2048, 256)
    assert (config.anchors, config.candidates, config.positives, config.negatives) == (64, 1024, 32, 256)
    assert (config.pair_level, config.candidate_sampling, config.correct_only) == ("class", "stratified", True)
    assert (config.share_head, config.proj_stride) == (True, 1)
    assert (config.hf_in, config.hf_extractor, config.hf_directions, config.hf_token_stride) == (
        ("cs",),
        "avgpool",
        2,
        1,
    )
    assert (config.hf_reduction, config.hf_state, config.hf_cutoff) == (2, 8, 0.125)
    assert (config.infer, config.sampling_steps, config.sampling_seed, config.sampling_clip) == ("cs", 10, 0, False)
