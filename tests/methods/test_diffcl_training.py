"""Diff-CL: log, optimizers, training, and who predicts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffcl_steps import ISOLATED, LATE, SMALL, STEPS, at, groups, make, make_batch, open_gates, train, warmed

from scantly.inference.memory import footprint
from scantly.methods.base import Stage
from scantly.methods.parts.agreement import foreground_dice
from scantly.networks.skips import SkipNetwork
from scantly.settings import merge
from scantly.training import engine
from scantly.training.checkpoint import load_checkpoint
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.training.resolve import resolve
from scantly.training.train import train_config

# the log


def test_agreement_counts_voxels_of_the_same_structure():
    first, second = torch.tensor([[0, 1, 1, 2, 2]]), torch.tensor([[0, 1, 2, 2, 0]])
    assert foreground_dice(first, second).item() == pytest.approx(2 * 2 / (4 + 3), abs=1e-5)
    assert foreground_dice(first, first).item() == pytest.approx(1)
    assert foreground_dice(torch.zeros(1, 3), torch.zeros(1, 3)).item() == pytest.approx(1)
    assert foreground_dice(torch.ones(1, 3), torch.zeros(1, 3)).item() < 1e-4


def test_what_is_watched():
    method, batch = make(widths=(4,) * 5), make_batch(size=32)
    train(method, batch, 3)
    method.pop_logged()
    open_gates(method)
    train(method, batch, 2)
    logged = {name: value.item() for name, value in method.pop_logged().items()}
    assert set(logged) == {
        "network_agreement", "ds_restores", "bank_fill", "gamma/3", "gamma/4",
        "positive_similarity", "negative_similarity", "contrast_classes",
    }  # fmt: skip
    for name in ("network_agreement", "ds_restores", "bank_fill"):
        assert 0 <= logged[name] <= 1 + 1e-6
    assert logged["bank_fill"] > 0
    assert -1 <= logged["negative_similarity"] <= logged["positive_similarity"] <= 1
    assert logged["contrast_classes"] in {1, 2, 3}
    assert logged["gamma/3"] == pytest.approx(0.5, abs=0.1)
    assert not any(value.requires_grad for value in method.pop_logged().values())


def test_early_on_the_log_has_what_there_is():
    method = make(use_hf=False)
    method.losses(make_batch(), at(0))
    assert set(method.pop_logged()) == {"network_agreement", "ds_restores", "bank_fill"}
    plain = make(use_hf=False, use_cl=False)
    plain.losses(make_batch(), at(LATE))
    assert set(plain.pop_logged()) == {"network_agreement", "ds_restores"}


# optimizers


def sections(**values):
    return TrainingSection(**{"lr": 0.1, "weight_decay": 0.5, "momentum": 0.0, **values})


def test_each_network_has_its_optimizer_and_the_embedding_goes_with_cs():
    for settings in ({}, {"share_head": False}, {"hf_in": ("cs", "ds")}):
        method = make(**settings)
        handles = TrainingHandles(method, Stage(), sections(), 10)
        parts = groups(method)
        assert {id(p) for p in handles._parameters("cs")} == {id(p) for p in parts["cs"] + parts["head"]}
        assert {id(p) for p in handles._parameters("ds")} == {id(p) for p in parts["ds"]}
        assert isinstance(handles._optimizers["cs"], torch.optim.SGD)
        assert isinstance(handles._optimizers["ds"], torch.optim.AdamW)
        assert handles.rates() == {"cs": 0.1, "ds": 1e-4}
        handles.set_iteration(6)
        assert handles.rates() == pytest.approx({"cs": 0.1 * 0.5**0.9, "ds": 1e-4 * 0.5**0.9})


@pytest.mark.parametrize("lies", [False, True], ids=["", "a network that spares nothing"])
@pytest.mark.parametrize("ds_optimizer", ["adamw", "recipe"])
def test_decay_spares_what_the_mamba_blocks_say_and_nothing_else(ds_optimizer, lies, monkeypatch):
    if lies:  # and the test would see it
        monkeypatch.setattr(SkipNetwork, "undecayed", lambda self: [])
    method = make(hf_in=("cs", "ds"), ds_optimizer=ds_optimizer, ds_lr=0.1, ds_weight_decay=0.5)
    open_gates(method)
    handles = TrainingHandles(method, Stage(), sections(), 10)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    handles.backward(0 * sum(p.sum() for p in method.parameters()))
    for name in ("cs", "ds"):
        handles.update(name)
    for name, parameter in method.named_parameters():
        spared = name.split(".")[-1] in {"gamma", "A_log", "Dskip"} and not lies
        expected = before[name] * (1.0 if spared else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)


def test_what_is_spared_the_decay_is_trained():
    method = make(hf_in=("cs", "ds"), ds_lr=0.01)
    open_gates(method)
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    train(method, make_batch(), 2)
    for name, parameter in method.named_parameters():
        if name.split(".")[-1] in {"gamma", "A_log", "Dskip"}:
            assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("own", "recipe", "largest"), [(1.0, None, 1.0), (None, None, None), (None, 3.0, 3.0), (1.0, 3.0, 1.0)]
)
def test_the_gradient_of_ds_alone_is_clipped_unless_the_recipe_clips(own, recipe, largest):
    method = make(ds_optimizer="recipe", ds_gradient_clip=own)
    handles = TrainingHandles(method, Stage(), sections(weight_decay=0.0, gradient_clip=recipe), 10)
    parts = {"cs": groups(method)["cs"] + groups(method)["head"], "ds": groups(method)["ds"]}
    before = {name: [p.detach().clone() for p in part] for name, part in parts.items()}
    handles.backward(sum(p.sum() for p in method.parameters()))
    moved = {}
    for name, part in parts.items():
        handles.update(name)
        changes = [(p.detach() - q).flatten() for p, q in zip(part, before[name], strict=True)]
        moved[name] = torch.cat(changes).norm().item()
    numbers = {name: sum(p.numel() for p in part) for name, part in parts.items()}
    for name, limit in (("cs", recipe), ("ds", largest)):
        assert moved[name] == pytest.approx(0.1 * (math.sqrt(numbers[name]) if limit is None else limit), rel=1e-3)


def test_the_state_of_both_optimizers_is_restored():
    method, batch = make(hf_in=("cs", "ds")), make_batch()
    handles = TrainingHandles(method, Stage(), sections(momentum=0.9), STEPS)
    train(method, batch, 2, handles=handles)
    other = make(hf_in=("cs", "ds"))
    other.load_state_dict(method.state_dict())
    other.generator.set_state(method.generator.get_state())
    resumed = TrainingHandles(other, Stage(), sections(momentum=0.9), STEPS)
    resumed.load_state_dict(copy.deepcopy(handles.state_dict()))
    assert train(other, batch, 2, handles=resumed) == train(method, batch, 2, handles=handles)
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# training


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", ISOLATED[1:], ids=" ".join)
def test_every_option_trains(settings, bf16):
    method, batch = make(**settings), make_batch()
    history = train(method, batch, 12, bf16=bf16)
    assert all(math.isfinite(value) for terms in history for value in terms.values())
    assert history[-1]["cs_supervised"] < history[0]["cs_supervised"]


@pytest.mark.parametrize("dims", [2, 3])
def test_terms_under_bf16_are_single_precision_and_near_those_without(dims):
    batch, found = make_batch(dims), []
    for bf16 in (False, True):
        method = make(dims)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.losses(batch, at(LATE))
        assert {term.dtype for term in terms.values()} == {torch.float32}
        found.append(terms["cs_supervised"].item())
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_equal_generators_draw_equally_and_the_global_one_is_left_alone():
    batch, state = make_batch(), None
    histories = []
    for seed in (1, 2):
        method = make()
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        histories.append(train(method, batch, 3))
        assert torch.equal(torch.get_rng_state(), state)
    assert histories[0] == histories[1]


def test_stopped_and_resumed_it_ends_with_the_same_bytes(cohort, tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    sets = merge(tiny, {"method": SMALL, "training": {"seed": 3}})
    flags = {"method": "diffcl", "labeled": 2, "workers": 0, "store": str(tmp_path / "store")}
    config = resolve(cohort, flags=flags, sets=sets)
    whole = train_config(config, tmp_path / "whole", quiet=True)
    original = engine.Engine._step

    def stepping(self, *args):
        if self.iteration == 8:
            raise InterruptedError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(engine.Engine, "_step", stepping)
        with pytest.raises(InterruptedError):
            train_config(config, tmp_path / "stopped", quiet=True)
    resumed = train_config(config, tmp_path / "stopped", resume=True, quiet=True)
    assert resumed.model_path.read_bytes() == whole.model_path.read_bytes()
    ours, theirs = (load_checkpoint(run.last_checkpoint) for run in (resumed, whole))
    for name, value in theirs["method"].items():
        assert torch.equal(ours["method"][name], value), name
    assert theirs["method"]["contrast.banks.0.filled"] > 0
    log = whole.log()
    assert {"loss/contrast", "method/network_agreement", "lr/ds"} <= set(log["name"])


# who predicts


def predictor_of(infer="cs", dims=2, **settings):
    batch = make_batch(dims)
    method = warmed(batch, dims=dims, infer=infer, sampling_steps=3, **settings)
    return method, method.predictor.eval(), batch.unlabeled


@pytest.mark.parametrize("dims", [2, 3])
def test_the_convolutional_network_predicts_alone_by_default(dims):
    method, predictor, images = predictor_of(dims=dims)
    method.ds.register_forward_hook(lambda *_: pytest.fail("one pass is enough"))
    assert torch.equal(predictor(images), method.cs(images)[0])


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("clip", [False, True])
def test_a_sample_from_noise_of_the_seed_predicts(dims, clip):
    method, predictor, images = predictor_of("ds", dims, sampling_seed=5, sampling_clip=clip)
    noise = torch.randn(1, 3, *images.shape[2:], generator=torch.Generator().manual_seed(5))
    expected = method.ds.sample(images, noise.repeat(2, *[1] * (dims + 1)), steps=3, clip=clip)
    assert torch.equal(predictor(images), expected)
    assert not torch.allclose(expected, method.cs(images)[0])


def test_the_mean_is_that_of_the_probabilities():
    method, predictor, images = predictor_of("mean")
    noise = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    expected = (method.cs(images)[0].softmax(1) + method.ds.sample(images, noise, steps=3).softmax(1)) / 2
    torch.testing.assert_close(predictor(images).softmax(1), expected)
    torch.testing.assert_close(predictor(images).exp(), expected)


@pytest.mark.parametrize("infer", ["ds", "mean"])
def test_samples_are_the_same_every_time_and_for_a_row_in_any_batch(infer):
    _, predictor, images = predictor_of(infer)
    images = torch.cat([images, images.flip(2)])
    state = torch.get_rng_state()
    together = predictor(images)
    assert torch.equal(predictor(images), together)
    assert torch.equal(torch.get_rng_state(), state)
    for row in range(4):
        torch.testing.assert_close(predictor(images[row : row + 1])[0], together[row], atol=1e-4, rtol=1e-4)
    predictor.seed = 1
    assert not torch.allclose(predictor(images), together)


def test_both_networks_are_in_the_weights_of_the_predictor():
    method = make()
    names = set(method.predictor.state_dict())
    assert names == {f"cs.{name}" for name in method.cs.state_dict()} | {
        f"ds.{name}" for name in method.ds.state_dict()
    }
    assert not any(name.startswith("ds.") for name in make(use_ds=False).predictor.state_dict())


@pytest.mark.parametrize("infer", ["cs", "ds", "mean"])
def test_it_predicts_under_autocast(infer):
    _, predictor, images = predictor_of(infer)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predictor(images)
    assert mixed.isfinite().all()
    assert mixed.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("infer", ["cs", "ds", "mean"])
def test_the_memory_of_a_prediction_can_be_counted_beforehand(infer):
    """Else too large a window ends the process without a word."""
    counted = footprint(make(infer=infer).predictor.eval(), 1, (64, 64))
    assert counted is not None
    assert counted.classes == 3
