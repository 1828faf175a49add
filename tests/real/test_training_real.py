"""The whole way on real ACDC slices: train, evaluate, predict, compare."""

from __future__ import annotations

import pytest
from finished_runs import check_a_copy_predicts_the_same

import scantly

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def runs(real_data, tmp_path_factory):
    """Both methods with one labeled patient, two validation patients, a few steps at 64 x 64."""
    out = tmp_path_factory.mktemp("runs")
    settings = ["network.arguments.widths=[8,16,32]", "network.arguments.dropout=[0,0,0.1]"]
    settings += ["plan.labeled_batch_size=4", "plan.unlabeled_batch_size=4", "training.lr=0.03"]
    return [
        scantly.train(
            real_data / "acdc_mini",
            method=method,
            labeled=2,
            recipe="acdc",
            size=(64, 64),
            steps=60,
            seed=1,
            device="cpu",
            out=out / method,
            settings=settings,
        ).evaluate("val")
        for method in ("supervised", "mean_teacher")
    ]


def test_both_learn(runs):
    for run in runs:
        log = run.log()
        losses = log[log["name"] == "loss/supervised"]["value"]
        assert losses.iloc[-1] < 0.8 * losses.iloc[0]
        assert run.config["evaluation"]["selection"] == "last"  # the dataset has no test cases
        table = run.evaluation("val")
        assert set(table["case"]) == set(run.split.val)
        assert set(table["class"]) == {"RV", "MYO", "LV"}


def test_only_the_labels_of_the_labeled_patients_are_prepared(runs):
    assert len(runs[1].split.labeled) == 4  # two frames of two patients
    assert len(runs[1].split.unlabeled) == 8
    assert not set(runs[1].split.labeled) & set(runs[1].split.unlabeled)


def test_a_copy_of_the_weights_alone_predicts_what_evaluate_predicted(runs, real_data, tmp_path):
    check_a_copy_predicts_the_same(runs[1], real_data / "acdc_mini", tmp_path)


def test_the_report_compares_them(runs, tmp_path):
    page = scantly.compare(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    for text in ("Mean Teacher", "Supervised", "RV", "MYO", "LV", "HD95", "voxels", "missed", "spurious"):
        assert text in page, text
    assert 'src="http' not in page
