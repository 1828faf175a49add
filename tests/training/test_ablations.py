"""The switches of the papers' ablations, as a user sets them, through a whole run."""

from __future__ import annotations

import pytest
import torch

from scantly.settings import merge
from scantly.training.resolve import parse_sets, resolve
from scantly.training.train import train_config

SMALL = {
    "arco": {"dense_channels": 8, "anchors": 16, "negatives_per_anchor": 8},
    "plgcl": {"patch_budget": 8},
    "lclpl": {"seg_rows": 4, "pairs": 4},
    "gapmatch": {"confidence_threshold": 0.5},
    "diffcl": {"queue": 64, "pushed": 8, "anchors": 8, "candidates": 64, "positives": 4, "negatives": 8},
}
#: The term that each method is about.
TERM = {
    **dict.fromkeys(("gapmatch", "fixmatch"), "unsupervised"),
    **dict.fromkeys(("arco", "plgcl", "lclpl", "diffcl"), "contrast"),
    **dict.fromkeys(("ua_mt", "ict"), "consistency"),
    "entropy_minimization": "entropy",
    "cps": "cross",
    "pseudo_label": "pseudo",
    **dict.fromkeys(("dan", "sassnet"), "adversarial"),
    **dict.fromkeys(("pi_model", "cct", "dtc", "mc_net", "mc_net_plus"), "consistency"),
    "unimatch": "strong",
}
#: Switches without which that term is gone.
WITHOUT = ("form=rounds", "contrast_weight=0", "use_ds=false", "use_cl=false")
ABLATIONS = [
    ("arco", "sampler=naive"),
    ("arco", "sampler=sag"),
    ("arco", "contrast_weight=0"),
    ("arco", "contrast_weight=0 nearest_neighbor_weight=0 unsupervised_weight=0"),
    ("arco", "pretraining_share=0"),
    ("arco", "instance_global_weight=0"),
    ("arco", "instance_local_weight=0"),
    ("arco", "negatives=rank"),
    ("arco", "negatives=released"),
    ("arco", "nearest_neighbor_weight=1"),
    ("arco", "equivariance_weight=1"),
    ("plgcl", "contrast_weight=0"),
    ("plgcl", "warmup_share=0"),
    ("plgcl", "warmup_share=0 contrast_weight=0"),
    ("plgcl", "sampling_metric=confidence"),
    ("plgcl", "sampling_metric=cosine"),
    ("plgcl", "sampling_metric=random"),
    ("plgcl", "contrast=discrete"),
    ("plgcl", "guessed_share=1"),
    ("lclpl", "contrast_weight=0"),
    ("lclpl", "variant=intra"),
    ("lclpl", "rounds=1 crf=none"),
    ("lclpl", "normalization=released"),
    ("lclpl", "include_background=true"),
    ("ua_mt", "official=true passes=3"),
    ("ua_mt", "teacher_buffers=own predict_with=student"),
    ("ict", "beta=1"),
    ("entropy_minimization", "rows=unlabeled"),
    ("pseudo_label", "dice_weight=1 mask_normalization=masked"),
    ("pseudo_label", "form=rounds rounds=2"),
    ("cps", "rows=all predict_with=second"),
    ("dan", "judge_lr=0.001"),
    ("pi_model", "rows=unlabeled noisy_passes=2"),
    ("dtc", "empty_distance=zero steepness=100"),
    ("sassnet", "distance_weight=0 judge_lr=0.001"),
    ("cct", "official=true supervised_auxiliary=false"),
    ("mc_net", "supervised=ce_dice detach_targets=true"),
    ("mc_net_plus", "normalized_sharpening=true"),
    ("unimatch", "feature_dropout=0 confidence_threshold=0.5"),
    ("fixmatch", "cutmix.probability=0 confidence_threshold=0.5"),
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
    ("diffcl", "use_ds=false"),
    ("diffcl", "use_hf=false"),
    ("diffcl", "use_cl=false"),
    ("diffcl", "use_ds=false use_hf=false use_cl=false"),
    ("diffcl", "hf_in=[cs,ds] hf_levels=[1] hf_directions=4"),
    ("diffcl", "hf_extractor=haar hf_checkpoint=true"),
    ("diffcl", "hf_extractor=fft hf_token_stride=2"),
    ("diffcl", "ds_pseudo=ddim ds_pseudo_steps=2"),
    ("diffcl", "t_range_unlabeled=[0.25,1] ds_mse=true"),
    ("diffcl", "pseudo_confidence=0.5 ds_optimizer=recipe"),
    ("diffcl", "share_head=false pair_level=anchor"),
    ("diffcl", "candidate_sampling=uniform proj_stride=2"),
    ("diffcl", "network_dropout=true"),
    ("diffcl", "infer=ds sampling_steps=2"),
    ("diffcl", "infer=mean sampling_steps=2"),
]


@pytest.mark.parametrize(("method", "switches"), ABLATIONS)
def test_it_trains_to_the_end_and_its_terms_are_those_that_are_left(cohort, tiny, tmp_path, method, switches):
    torch.set_num_threads(1)
    sets = merge(tiny, {"method": SMALL.get(method, {}), "data": {"store": str(tmp_path / "store")}})
    chosen = switches.split()
    typed = parse_sets([f"method.{switch}" for switch in chosen])
    config = resolve(cohort, flags={"method": method, "labeled": 1}, sets=merge(sets, typed))
    log = train_config(config, tmp_path / "run", quiet=True).log()
    losses = log[log["name"].str.startswith("loss/")]
    assert losses["value"].notna().all()
    for term in ("contrast", "nearest_neighbor", "unsupervised", "instance_global", "instance_local"):
        if f"{term}_weight=0" in chosen:
            assert f"loss/{term}" not in set(losses["name"])
    assert (f"loss/{TERM[method]}" in set(losses["name"])) == (not set(chosen) & set(WITHOUT))
