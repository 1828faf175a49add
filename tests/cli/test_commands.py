"""Every command as a user meets it, on a small dataset."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml


def test_methods_lists_and_describes(scantly) -> None:
    listed = scantly("methods")
    assert "supervised" in listed.out
    assert "Tarvainen and Valpola, NeurIPS 2017" in listed.out
    entries = json.loads(scantly("methods", "--json").out)
    assert {"name", "title", "paper", "summary"} == set(entries[0])
    assert [entry["name"] for entry in entries][:2] == ["supervised", "pi_model"]

    described = scantly("methods", "mean_teacher")
    assert "ema_decay = 0.99" in described.out
    settings = json.loads(scantly("methods", "mean_teacher", "--json").out)["settings"]
    assert settings["ema_decay"]["default"] == 0.99
    assert all(setting["description"] for setting in settings.values())


def test_check_says_so_when_nothing_is_wrong(scantly, sound: Path) -> None:
    outcome = scantly("check", sound)
    assert outcome.status == 0
    assert outcome.out == "no fault found in 8 cases\n"
    document = json.loads(scantly("check", sound, "--json").out)
    assert document == {"dataset": str(sound), "cases": 8, "errors": 0, "warnings": 0, "findings": []}


def test_check_groups_findings_and_warnings_alone_are_no_failure(scantly, dataset: Path) -> None:
    (dataset / "imagesTr" / "notes.txt").write_text("read me")
    outcome = scantly("check", dataset)
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "1 warning:"
    assert "notes.txt" in lines[1]
    assert lines[-1] == "no error found in 8 cases"

    (dataset / "labelsTr" / "case0.nii.gz").write_bytes(b"no scan")
    outcome = scantly("check", dataset)
    assert outcome.status == 2
    lines = outcome.out.splitlines()
    assert lines[0].endswith(("1 error:", "errors:"))
    assert lines.index("1 warning:") > 0
    assert "no error found" not in outcome.out


def test_init_makes_a_dataset_folder_and_checks_it(scantly, sound: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    outcome = scantly("init", made, "--images", sound / "imagesTr", "--labels", sound / "labelsTr")
    assert outcome.status == 0, outcome.err
    assert "4 cases with label, 2 without" in outcome.out
    assert f"edit the channel and class names in {made / 'dataset.json'}" in outcome.out
    assert outcome.out.endswith("no fault found in 6 cases\n")
    assert all(path.is_symlink() or path.stat().st_nlink > 1 for path in (made / "imagesTr").iterdir())

    copied = tmp_path / "copied"
    assert scantly("init", copied, "--images", sound / "imagesTr", "--copy").status == 2  # no label: checked
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in (copied / "imagesTr").iterdir())


def test_init_names_the_cases_that_it_leaves_out(scantly, sound: Path, tmp_path: Path) -> None:
    labels, made = Path(shutil.copytree(sound / "labelsTr", tmp_path / "labels")), tmp_path / "made"
    (labels / "case1.nii.gz").write_bytes(b"no label")
    outcome = scantly("init", made, "--images", sound / "imagesTr", "--labels", labels)
    assert outcome.status == 2
    assert "3 cases with label, 2 without" in outcome.out
    assert outcome.out.endswith("no fault found in 5 cases\n")
    head, line = outcome.err.splitlines()[-2:]
    assert head.startswith(f"scantly: 1 case is left out; mend what is said here, remove {made} and")
    assert line.startswith(f"  case1: {labels / 'case1.nii.gz'} ")


def test_plan_prints_reasons_and_its_file_trains(scantly, sound: Path, tmp_path: Path, small) -> None:
    printed = scantly("plan", sound)
    assert printed.status == 0
    values = yaml.safe_load(printed.out)["plan"]
    assert values["spatial_dims"] == 2
    lines = printed.out.splitlines()
    for key in values:
        assert lines[lines.index(next(line for line in lines if line.startswith(f"  {key}:"))) - 1].startswith("  # ")
    document = json.loads(scantly("plan", sound, "--json").out)
    assert document["reasons"]["spatial_dims"]
    assert {key: document[key] for key in values} == values

    file = tmp_path / "plan.yaml"
    assert scantly("plan", sound, "--out", file).status == 0
    assert yaml.safe_load(file.read_text())["plan"] == values
    again = scantly("plan", sound, "--out", file)
    assert again.status == 2
    assert str(file) in again.sentence

    file.write_text(file.read_text().replace("foreground_fraction: 0.33", "foreground_fraction: 0.5"))
    run = tmp_path / "run"
    trained = scantly("train", sound, "--config", file, "--method", "supervised", "--out", run, *small)
    assert trained.status == 0, trained.err
    assert yaml.safe_load((run / "config.yaml").read_text())["plan"]["foreground_fraction"] == 0.5


def test_train_passes_every_option_on(scantly, sound: Path, tmp_path: Path, monkeypatch) -> None:
    seen = {}

    def resolve(dataset: Path, **options: object) -> None:
        seen.update(options, dataset=dataset)
        raise KeyboardInterrupt

    monkeypatch.setattr("scantly.training.resolve.resolve", resolve)
    scantly(
        *("train", sound, "--method", "mean_teacher", "--out", tmp_path / "run", "--labeled", "7"),
        *("--seed-labeled", "5", "--recipe", "acdc", "--config", "file.yaml", "--protocol", "literature"),
        *("--steps", "9", "--seed", "3", "--dims", "3", "--size", "64", "48", "32", "--device", "cpu"),
        *("--devices", "2", "--nodes", "4", "--precision", "bf16", "--workers", "6", "--store", "prepared"),
        *("--set", "a.b=1", "c.d=[2]", "--resume"),
    )
    assert seen == {
        "dataset": sound,
        "recipe": "acdc",
        "config_file": Path("file.yaml"),
        "sets": ["a.b=1", "c.d=[2]"],
        "flags": {
            "method": "mean_teacher",
            "labeled": 7,
            "seed_labeled": 5,
            "protocol": "literature",
            "steps": 9,
            "seed": 3,
            "dims": 3,
            "size": [64, 48, 32],
            "device": "cpu",
            "devices": 2,
            "nodes": 4,
            "precision": "bf16",
            "workers": 6,
            "store": "prepared",
        },
    }


def test_supervised_training_claims_no_unlabeled_cases(scantly, sound: Path, tmp_path: Path, small) -> None:
    words = ("train", sound, "--method", "supervised", "--labeled", "50%", "--out", tmp_path / "run", *small)
    assert "trained supervised, 4 iterations, on 3 labeled (3 cases) cases\n" in scantly(*words).out


def test_train_ends_with_what_to_do_next(scantly, sound: Path, tmp_path: Path, small) -> None:
    run = tmp_path / "run"
    words = ("train", sound, "--method", "mean_teacher", "--labeled", "50%", "--out", run, *small)
    outcome = scantly(*words)
    assert outcome.status == 0, outcome.err
    assert "trained mean_teacher, 4 iterations, on 3 labeled (3 cases) and 3 unlabeled cases" in outcome.out
    assert f"  scantly evaluate {run} --split test\n" in outcome.out
    assert f"  scantly predict {run} " in outcome.out
    model = (run / "model.safetensors").read_bytes()
    again = scantly(*words)
    assert again.status == 0
    assert "finished already" in again.err
    assert (run / "model.safetensors").read_bytes() == model


def test_evaluate_a_run(scantly, trained: Path) -> None:
    table = scantly("evaluate", trained, "--split", "test")
    assert table.status == 0, table.err
    lines = table.out.splitlines()
    assert lines[0] == "supervised on test: 2 cases, protocol clean"
    heads = ["class", "Dice", "Jaccard", "HD95 (voxels)", "ASD (voxels)", "HD95 (mm)", "ASD (mm)"]
    assert re.split(r" {2,}", lines[1].strip()) == [*heads, "n", "missed", "spurious", "in neither"]
    summary = json.loads(scantly("evaluate", trained, "--json").out)
    for name in ("wall", "pool"):
        row = next(line for line in lines if line.split()[:1] == [name])
        assert row.split()[1] == f"{summary['classes'][name]['dice']['mean']:.3f}"
        assert row.split()[-4:] == [
            str(summary["classes"][name][count]) for count in ("averaged", "missed", "spurious", "both_empty")
        ]
    for definition in (
        "HD95 (voxels): 95th percentile",
        "HD95 (mm): 95th percentile",
        "ASD (voxels): Mean distance",
    ):
        assert definition in table.out
    assert "Empty masks:" in table.out


def test_evaluate_predictions_of_any_origin(scantly, sound: Path, tmp_path: Path) -> None:
    predictions = tmp_path / "predictions"
    shutil.copytree(sound / "labelsTs", predictions)
    missed = nib.load(predictions / "case7.nii.gz")
    emptied = np.where(np.asarray(missed.dataobj) == 2, 0, np.asarray(missed.dataobj)).astype(np.uint8)
    nib.save(nib.Nifti1Image(emptied, missed.affine), predictions / "case7.nii.gz")
    outcome = scantly("evaluate", "--predictions", predictions, "--labels", sound / "labelsTs", "--json")
    assert outcome.status == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["classes"]["wall"]["dice"]["mean"] == 1.0
    assert summary["classes"]["pool"]["dice"]["mean"] == 0.5
    assert summary["classes"]["pool"]["missed"] == 1
    table = scantly("evaluate", "--predictions", predictions, "--labels", sound / "labelsTs")
    assert next(line for line in table.out.splitlines() if line.split()[:1] == ["pool"]).split()[-4:] == [
        "2",
        "1",
        "0",
        "0",
    ]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--split", "test"],
        ["--predictions", "p"],
        ["--labels", "l"],
        ["run", "--labels", "l"],
        ["run", "--predictions", "p", "--labels", "l"],
        ["--split", "val", "--predictions", "p", "--labels", "l"],
    ],
)
def test_evaluate_refuses_half_of_two_usages(scantly, words: list[str]) -> None:
    outcome = scantly("evaluate", *words)
    assert (outcome.status, outcome.out) == (2, "")
    assert "evaluate takes a RUN (with --split), or --predictions and --labels together" in outcome.sentence


def test_predict_writes_label_maps_in_the_geometry_of_the_input(
    scantly, trained: Path, sound: Path, tmp_path: Path
) -> None:
    out = tmp_path / "predictions"
    outcome = scantly("predict", trained, sound / "imagesTs", "--out", out, "--uncertainty", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"2 label maps written to {out}\n"
    assert sorted(path.name for path in out.iterdir()) == [
        f"case{n}{kind}.nii.gz" for n in (6, 7) for kind in ("", "_uncertainty")
    ]
    source = nib.load(sound / "imagesTs" / "case6_0000.nii.gz")
    written = nib.load(out / "case6.nii.gz")
    assert np.array_equal(written.affine, source.affine)
    assert written.shape == source.shape


def test_compare_prints_the_table_and_writes_the_report(scantly, trained: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    outcome = scantly("compare", trained, "--out", report)
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith("test cases, protocol clean\n")
    assert outcome.out.endswith(f"report: {report}\n")
    assert report.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")
    document = json.loads(scantly("compare", trained, "--out", report, "--json").out)
    assert document["report"] == str(report)
    summary = json.loads((trained / "evaluation" / "test.json").read_text())
    dice = {row["class"]: row["dice"] for row in document["table"]}
    for name in ("wall", "pool"):
        assert dice[name] == pytest.approx(summary["classes"][name]["dice"]["mean"])


def test_demo_prints_the_table_and_the_report(scantly, trained: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "demo"

    def quick_demo(folder: Path) -> Path:
        for method in ("supervised", "mean_teacher"):
            shutil.copytree(trained, folder / "runs" / method)
            config = folder / "runs" / method / "config.yaml"
            config.write_text(config.read_text().replace("name: supervised", f"name: {method}"))
        return folder / "report.html"

    monkeypatch.setattr("scantly.demo.demo", quick_demo)
    outcome = scantly("demo", "--out", out)
    assert outcome.status == 0, outcome.err
    assert "mean_teacher" in outcome.out or "Mean Teacher" in outcome.out
    assert outcome.out.endswith(f"report: {out / 'report.html'}\n")
