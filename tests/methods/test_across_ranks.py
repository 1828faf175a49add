"""Two processes with half of the batch each learn what one process with all of it learns."""

from __future__ import annotations

import pytest
import rank_runs
import torch
from rank_runs import Case, gradients, states

from scantly.methods.catalogue import CATALOGUE
from two_ranks import run_on_two_ranks

ARCO = {"dense_channels": 6, "queue_length": 36, "global_channels": 8, "anchors": 8, "negatives_per_anchor": 4}
ALL_DRAWS = {"anchors": 16}
PERTURBED = {"confidence_threshold": 0.4, "rampup_share": 0.0, "mask_normalization": "masked", "epsilon": 0.1}
NAMED = [
    Case("supervised"),
    Case("supervised", {"dice_background": False}, dims=3),
    Case("mean_teacher"),
    Case("mean_teacher", {"teacher_buffers": "own"}, dims=3),
    Case("arco", ARCO, whole=ALL_DRAWS),
    Case("arco", {**ARCO, "negatives": "rank", "equivariance_weight": 1.0}, whole=ALL_DRAWS),
    Case("arco", {**ARCO, "negatives": "rank", "bank_size": 100, "bank_size_background": 50}, dims=3, whole=ALL_DRAWS),
    Case("mc_net_plus"),
    Case("mc_net_plus", dims=3),
    Case("gapmatch", PERTURBED),
    Case("gapmatch", {**PERTURBED, "update": "sequential", "ascent_steps": 2}, dims=3),
    Case("gapmatch", {**PERTURBED, "perturbation_source": "total", "ema_decay": 0.9}),
]
TRUSTED = {"confidence_threshold": 0.4}
PAIRS = {"pairs": 4, "seg_rows": 2, "elastic_sigma": 0.0, "rounds": 1, "optimizer": "recipe"}
ALL_PATCHES = {"patch_budget": 96, "optimizer": "recipe", "warmup_share": 0.5}
#: The rest of the catalogue, without Diff-CL's contrast and PLGCL's in the joint stage: each rank ranks candidates of
#: its own.
OTHERS = [
    Case("pi_model"),
    Case("ua_mt", {"passes": 3}),
    Case("ua_mt", {"passes": 2, "official": True}, dims=3),
    Case("ict", unlabeled=4),
    Case("entropy_minimization", {"rows": "all"}),
    Case("pseudo_label", {**TRUSTED, "mask_normalization": "masked", "dice_weight": 1.0}),
    Case("pseudo_label", {"form": "rounds"}),
    Case("cps"),
    Case("dan"),
    Case("cct"),
    Case("urpc", levels=3),
    Case("urpc", levels=3, dims=3),
    Case("dtc", {"steepness": 20.0}),  # at 1500 rounding grows a hundredfold with each step
    Case("sassnet"),
    Case("mc_net", {"supervised": "ce_dice"}),
    Case("fixmatch", TRUSTED),
    Case("unimatch", {**TRUSTED, "feature_dropout": 0.0}),
    Case("plgcl", {"contrast_weight": 0.0, "supervised": "ce_dice", "optimizer": "recipe"}),
    Case("plgcl", ALL_PATCHES, whole={"patch_budget": 192}, stages=("warmup",), every_class=True),
    Case(
        "plgcl",
        {**ALL_PATCHES, "contrast": "discrete"},
        3,
        1,
        2,
        {"patch_budget": 192},
        2,
        ("warmup",),
        every_class=True,
    ),
    Case("lclpl", PAIRS),
    Case("lclpl", {**PAIRS, "variant": "intra", "normalization": "released", "segmentation_loss": "cross_entropy"}),
    Case("lclpl", {**PAIRS, "batches": "apart"}, dims=3),
    Case("diffcl", {"use_cl": False, "pseudo_confidence": 0.4, "ds_mse": True}),
]
CONTRAST = {"queue": 32, "pushed": 8, "anchors": 4, "candidates": 40, "positives": 3, "negatives": 6, "embedding": 5}
PATCHES = {"patch_budget": 12, "queue": 64, "optimizer": "recipe"}
NONE_ON_THE_FIRST = ({"confidence_threshold": 1.0}, {"confidence_threshold": 0.0})
#: Every method, with settings that hold state or depend on what a rank finds.
STATES = [
    *(Case(name) for name in ("supervised", "pi_model", "mean_teacher", "ua_mt", "entropy_minimization", "cps")),
    *(Case(name) for name in ("dan", "cct", "dtc", "sassnet", "mc_net", "mc_net_plus")),
    Case("ict", unlabeled=4),
    Case("urpc", levels=3),
    Case("pseudo_label", {"mask_normalization": "masked"}, by_rank=NONE_ON_THE_FIRST),
    Case("fixmatch", by_rank=NONE_ON_THE_FIRST),
    Case("unimatch", by_rank=NONE_ON_THE_FIRST),
    Case("gapmatch", {"mask_normalization": "masked", "rampup_share": 0.0}, by_rank=NONE_ON_THE_FIRST),
    Case("gapmatch", {"perturbation": "random", "rampup_share": 0.0}, by_rank=NONE_ON_THE_FIRST),
    Case("arco", {**ARCO, "equivariance_weight": 1.0}, by_rank=NONE_ON_THE_FIRST),
    Case("arco", {**ARCO, "negatives": "rank", "bank_size": 100, "anchor_probability": 0.34}, dims=3),
    Case("plgcl", PATCHES),
    Case("plgcl", {**PATCHES, "sampling_metric": "cosine", "coverage_filter": "repaired", "contrast": "discrete"}),
    Case("plgcl", {**PATCHES, "sampling_metric": "cosine", "coverage_filter": "published"}, blind=True),
    Case("lclpl", {"pairs": 4, "seg_rows": 2, "optimizer": "recipe"}),
    Case("diffcl", CONTRAST),
]


def all_gradients(cases):
    return [gradients(case) for case in cases]


def all_states(cases):
    return [states(case) for case in cases]


@pytest.fixture(scope="module")
def named():
    return run_on_two_ranks(all_gradients, NAMED)


def compare(case, one, other):
    """Gradients of both ranks against those of one process, relative to the largest of each tensor."""
    whole = gradients(case)
    assert set(whole) == set(one) == set(other)
    for stage, expected in whole.items():
        assert len(expected["gradients"]) == len(one[stage]["gradients"]) >= rank_runs.STEPS
        for number, step in enumerate(expected["gradients"]):
            largest = max(gradient.abs().max().item() for gradient in step.values())
            assert largest > 1e-4, (stage, number)
            for key, gradient in step.items():
                found = one[stage]["gradients"][number][key]
                assert torch.equal(found, other[stage]["gradients"][number][key]), (stage, number, key)
                scale = max(gradient.abs().max().item(), 1e-3 * largest)  # of biases before a norm rounding is left
                assert (found - gradient).abs().max().item() < 1e-9 * scale, (stage, number, key)
        for key, value in one[stage]["state"].items():
            assert torch.equal(value, other[stage]["state"][key]), (stage, key)
            if "bank" not in key and "queue" not in key:
                torch.testing.assert_close(value, expected["state"][key], rtol=1e-9, atol=1e-10, msg=f"{stage} {key}")


@pytest.mark.parametrize("index", range(len(NAMED)), ids=[str(case) for case in NAMED])
def test_gradients_of_the_five_named_methods_are_those_of_the_whole_batch(named, index):
    compare(NAMED[index], *(answers[index] for answers in named))
    if NAMED[index].name == "arco":
        assert any(rank_runs.seen)  # a class of which one rank has no anchor


@pytest.fixture(scope="module")
def others():
    return run_on_two_ranks(all_gradients, OTHERS)


@pytest.mark.parametrize("index", range(len(OTHERS)), ids=[str(case) for case in OTHERS])
def test_gradients_of_the_other_methods_are_those_of_the_whole_batch(others, index):
    compare(OTHERS[index], *(answers[index] for answers in others))


@pytest.fixture(scope="module")
def held():
    return run_on_two_ranks(all_states, STATES)


@pytest.mark.parametrize("index", range(len(STATES)), ids=[str(case) for case in STATES])
def test_what_a_method_holds_is_the_same_on_every_rank(held, index):
    one, other = (answers[index] for answers in held)
    assert set(one) == set(other)
    for stage, digests in one.items():
        assert {key for key, value in digests.items() if other[stage][key] != value} == set(), stage


def test_every_method_of_the_catalogue_is_tested():
    names = {entry.name for entry in CATALOGUE}
    assert {case.name for case in STATES} == names
    assert {case.name for case in NAMED + OTHERS} == names
