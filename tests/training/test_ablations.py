"""The switches of the papers' ablations, as a user sets them, through a whole run."""

from __future__ import annotations

import pytest
import torch

from scantly.settings import merge
from scantly.training.resolve import resolve
from scantly.training.train import train_config

SMALL = {
    "arco": {"dense_channels": 8, "anchors": 16, "negatives_per_anchor": 8},
    "plgcl": {"patch_budget": 8},
    "lclpl": {"seg_rows": 4, "pairs": 4},
    "gapmatch": {"confidence_threshold": 0.5},
}
#: The term that each method is about.
TERM = {"arco": "contrast", "plgcl": "contrast", "lclpl": "contrast", "gapmatch": "unsupervised"}
ABLATIONS = [
    ("arco", "sampler=naive"),
    ("arco", "sampler=sag"),
    ("arco", "contrast_weight=0"),
    ("arco", "contrast_weight=0 nearest_neighbor_weight=0 unsupervised_weight=0"),
    ("arco", "pretraining_share=0"),
    ("arco", "instance_global_weight=0"),
    ("arco", "instance_local_weight=0"),
    ("arco", "negatives=rank"),
    ("arco", "equivariance_weight=1"),
    ("plgcl", "contrast_weight=0"),
    ("plgcl", "warmup_share=0"),
    ("plgcl", "warmup_share=0 contrast_weight=0"),
    ("plgcl", "sampling_metric=confidence"),
    ("plgcl", "sampling_metric=cosine"),
    ("plgcl", "sampling_metric=random"),
    ("plgcl", "contrast=discrete"),
    ("lclpl", "contrast_weight=0"),
    ("lclpl", "variant=intra"),
    ("lclpl", "rounds=1 crf=none"),
    ("lclpl", "normalization=released"),
    ("lclpl", "include_background=true"),
    ("gapmatch", "alpha=0"),
    ("gapmatch", "epsilon=0"),
    ("gapmatch", "update=sequential"),
    ("gapmatch", "perturbation=layer_relative"),
    ("gapmatch", "perturbation=adaptive perturbed=weights"),
    ("gapmatch", "perturbation=random ascent_steps=2"),
    ("gapmatch", "perturbation_source=total perturbation_start=0.5"),
    ("gapmatch", "second_targets=recomputed second_view=new"),
    ("gapmatch", "second_statistics=updated replay_dropout=false"),
    ("gapmatch", "consistency_loss=ce mask_normalization=masked"),
    ("gapmatch", "consistency_loss=dice hard_labels=false"),
    ("gapmatch", "ema_decay=0.9 pseudo_label_mode=eval"),
    ("gapmatch", "strong_views=2 alpha_rampup_share=0.5"),
]


@pytest.mark.parametrize(("method", "switches"), ABLATIONS)
def test_it_trains_to_the_end_and_its_terms_are_those_that_are_left(cohort, tiny, tmp_path, method, switches):
    torch.set_num_threads(1)
    sets = merge(tiny, {"method": SMALL[method], "data": {"store": str(tmp_path / "store")}})
    chosen = dict(switch.split("=") for switch in switches.split())
    typed = {key: {"true": True, "false": False}.get(value, value) for key, value in chosen.items()}
    config = resolve(cohort, flags={"method": method, "labeled": 1}, sets=merge(sets, {"method": typed}))
    log = train_config(config, tmp_path / "run", quiet=True).log()
    losses = log[log["name"].str.startswith("loss/")]
    assert losses["value"].notna().all()
    for term in ("contrast", "nearest_neighbor", "unsupervised", "instance_global", "instance_local"):
        if chosen.get(f"{term}_weight") == "0":
            assert f"loss/{term}" not in set(losses["name"])
    if chosen.get(f"{TERM[method]}_weight") != "0":
        assert f"loss/{TERM[method]}" in set(losses["name"])
