"""The whole way on real left-atrium volumes: train, evaluate, predict."""

from __future__ import annotations

import numpy as np
import pytest
from finished_runs import check_a_copy_predicts_the_same

import scantly

pytestmark = pytest.mark.real

STEPS = 40


@pytest.fixture(scope="module")
def runs(real_data, tmp_path_factory):
    """Both methods with one labeled scan and a narrow V-Net on patches of 64 x 64 x 32, as the literature writes it."""
    out = tmp_path_factory.mktemp("volumes")
    settings = ["network.arguments.widths=[4,8,16,32]", "network.arguments.dropout=0.1", "training.lr=0.03"]
    return [
        scantly.train(
            real_data / "la_mini",
            method=method,
            labeled=1,
            recipe="la",
            size=(64, 64, 32),
            steps=STEPS,
            seed=1,
            device="cpu",
            out=out / method,
            settings=settings,
        ).evaluate("val")
        for method in ("supervised", "mean_teacher")
    ]


def test_both_learn_from_patches(runs):
    for run in runs:
        log = run.log()
        losses = log[log["name"] == "loss/supervised"]["value"]
        assert losses.iloc[-1] < 0.8 * losses.iloc[0]
        assert run.config["network"]["name"] == "vnet"
        assert run.config["plan"]["patch_size"] == [32, 64, 64]
        assert (run.config["plan"]["labeled_batch_size"], run.config["plan"]["unlabeled_batch_size"]) == (2, 2)
        assert set(run.evaluation("val")["case"]) == set(run.split.val)


def test_distances_are_in_voxels_and_in_millimeters(runs):
    table = runs[0].evaluation("val")
    for metric in ("hd95", "asd"):
        # cubes of 1.25 mm
        np.testing.assert_allclose(table[f"{metric}_mm"], 1.25 * table[f"{metric}_voxels"], rtol=1e-6)
    assert {"dice", "jaccard"} <= set(table)


def test_a_copy_of_the_weights_alone_predicts_what_evaluate_predicted(runs, real_data, tmp_path):
    check_a_copy_predicts_the_same(runs[1], real_data / "la_mini", tmp_path)
