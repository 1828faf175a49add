from __future__ import annotations

import csv
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from scantly.benchmark import published
from scantly.benchmark.published import LABELED_UNITS, LINEAGES, MEAN, METRICS, PublishedResult, published_results
from scantly.errors import ConfigError
from scantly.methods.catalogue import CATALOGUE

FOLDER = Path(str(files("scantly.benchmark"))) / "published"
ELSEWHERE = {
    *("action", "ad_mt", "bcp", "byol", "caml", "cora_net", "cross_teaching", "crossmatch", "dct", "dmd", "double_ua"),
    *("dualfete", "gbdl", "gcl", "hce", "isd", "knn_moco", "moco_v2", "mona", "mutrel", "ps_mt", "reco", "simclr"),
    *("ss_net", "tcsm", "tracoco", "triple_ua", "vicreg"),
}


def number(
    method: str, dataset: str, lineage: str, labeled: float, metric: str, *, variant: str = "", class_name: str = MEAN
) -> PublishedResult:
    """The one row that fits, or rows of several tables with the same number."""
    rows = published_results(method, dataset, lineage=lineage, metric=metric, class_name=class_name)
    rows = tuple(row for row in rows if (row.labeled, row.variant) == (labeled, variant))
    assert len({row.value for row in rows}) == 1, rows
    return rows[0]


@pytest.mark.parametrize(
    ("method", "dataset", "lineage", "labeled", "metric", "value", "unit"),
    [
        ("ua_mt", "acdc", "ssl4mis", 3, "dice", 46.04, "%"),
        ("mc_net", "acdc", "ssl4mis", 7, "dice", 86.44, "%"),
        ("mc_net_plus", "acdc", "ssl4mis", 14, "dice", 88.51, "%"),
        ("mc_net_plus", "acdc", "ssl4mis", 14, "asd", 1.54, "voxel"),
        ("unimatch", "acdc", "ssl4mis", 3, "dice", 84.38, "%"),
        ("unimatch", "acdc", "unimatch", 3, "dice", 88.9, "%"),
        ("unimatch", "acdc", "unimatch", 1, "dice", 85.4, "%"),
        ("ua_mt", "acdc", "unimatch-quoted", 3, "dice", 61.0, "%"),
        ("supervised", "acdc", "unimatch", 3, "dice", 41.5, "%"),
        ("supervised", "acdc", "ssl4mis", 70, "hd95", 4.30, "voxel"),
        ("fixmatch", "acdc", "ssl4mis", 7, "dice", 86.1, "%"),
        ("bcp", "acdc", "ssl4mis", 14, "jaccard", 81.62, "%"),
        ("crossmatch", "acdc", "ssl4mis", 3, "hd95", 1.53, "voxel"),
        ("ua_mt", "la", "uamt", 16, "dice", 88.88, "%"),
        ("ua_mt", "la", "ssnet", 8, "dice", 87.79, "%"),
        ("ua_mt", "la", "crossmatch", 8, "hd95", 18.25, "voxel"),
        ("mc_net", "la", "uamt", 8, "hd95", 9.36, "voxel"),
        ("mc_net_plus", "la", "mcnet", 16, "dice", 91.07, "%"),
        ("double_ua", "la", "uamt", 16, "dice", 89.65, "%"),
        ("tcsm", "la", "ug_mcl", 16, "hd95", 9.57, "voxel"),
        ("tcsm", "la", "ug_mcl", 16, "asd", 2.44, "voxel"),
        ("sassnet", "la", "unconfirmed", 16, "asd", 3.10, "voxel"),
        ("urpc", "pancreas_ct", "62/20", 6, "hd95", 22.57, "voxel"),
        ("cora_net", "pancreas_ct", "coranet", 12, "hd95", 7.59, "voxel"),
        ("cora_net", "pancreas_ct", "coranet", 12, "asd", 1.89, "voxel"),
        ("ua_mt", "pancreas_ct", "opmatch", 6, "dice", 53.07, "%"),
        ("triple_ua", "brats2020", "sfpc", 10, "hd95", 15.26, "mm"),
        ("cora_net", "acdc", "sfpc", 20, "asd", 2.21, "mm"),
        ("dualfete", "pancreas_ct", "dualfete", 6, "dice", 81.99, "%"),
        ("tracoco", "brats2019", "dualfete", 50, "hd95", 8.04, "voxel"),
        ("unimatch", "pancreas_ct", "dualfete", 12, "dice", 82.35, "%"),
        ("lclpl", "acdc", "plgcl", 10, "dice", 88.1, "%"),
        ("triple_ua", "kits19", "plgcl", 2.5, "hd95", 7.94, "not stated"),
        ("hce", "crag", "plgcl", 20, "asd", 2.11, "not stated"),
        ("ict", "lits", "arco", 1, "dice", 58.3, "%"),
        ("mona", "mp_mri", "arco", 10, "asd", 8.16, "voxel"),
        ("cps", "mmwhs", "arco", 5, "dice", 78.3, "%"),
        ("mean_teacher", "la", "arco", 4, "asd", 8.15, "voxel"),
    ],
)
def test_spot_values(
    method: str, dataset: str, lineage: str, labeled: float, metric: str, value: float, unit: str
) -> None:
    row = number(method, dataset, lineage, labeled, metric)
    assert (row.value, row.unit) == (value, unit)


def test_spot_values_of_classes_and_variants() -> None:
    assert number("arco", "acdc", "arco", 1, "dice", variant="SG").value == 85.5
    assert number("arco", "acdc", "arco", 7, "asd", variant="SG", class_name="LV").value == 0.839
    assert number("gcl", "mmwhs", "arco", 10, "dice", class_name="PA").value == 80.3
    assert number("ss_net", "lits", "arco", 5, "asd", class_name="Lesion").value == 38.1
    assert number("arco", "acdc", "arco", 1, "asd", variant="SAG, without horizontal flip").value == 6.70
    assert number("arco", "cityscapes", "arco", 50, "miou", variant="SG, 25 grid, ClassMix").value == 61.8
    assert number("unimatch", "acdc", "unimatch", 7, "dice", variant="last epoch").value == 89.68
    assert number("plgcl", "acdc", "plgcl", 10, "dice", variant="class confidence").value == 87.3
    assert number("plgcl", "crag", "plgcl", 10, "hd95", variant="contrast, no warm-up").value == 1.64
    assert number("caml", "la", "caml", 16, "dice", variant="best on test").value == 91.14


def test_warnings_are_carried() -> None:
    assert "42.9" in number("ua_mt", "acdc", "arco", 1, "dice").note
    assert "70.7" in number("sassnet", "lits", "arco", 1, "asd", class_name="Lesion").note
    assert "printed 76,4" in number("moco_v2", "acdc", "arco", 1, "dice", variant="NS").note
    assert "secondary copy" in number("supervised", "la", "ssnet", 80, "dice").note
    assert "not MC-Net+" in number("mc_net_plus", "la", "dualfete", 4, "dice").note


def test_number_of_rows_of_the_great_tables() -> None:
    sources = Counter(row.source.rpartition("), ")[2] for row in published_results(lineage="arco"))
    assert sources["LiTS table"] == 6 + 19 * 9 * 2
    assert sources["table of samplers in contrastive frameworks on ACDC"] == 21 * 3 * 2
    assert len(published_results(lineage="crossmatch")) == 12 * 2 * 4
    assert len(published_results(lineage="dualfete")) == (14 * 7 - 10) * 2


def test_every_row_is_sound() -> None:
    rows = published_results()
    assert len(rows) > 3000
    for row in rows:
        assert row.lineage in LINEAGES
        assert row.source
        assert row.labeled_unit in LABELED_UNITS
        assert row.unit in METRICS[row.metric][1]
        assert row.value >= 0
        if row.unit == "%":
            assert row.value <= 100
        assert row.spread is None or row.spread >= 0
    assert {row.lineage for row in rows} == set(LINEAGES)
    assert {row.metric for row in rows} == set(METRICS)


def test_dice_is_in_percent() -> None:
    # a fraction that was not converted would be at most 1; the lowest printed Dice is 10.3
    assert min(row.value for row in published_results(metric="dice")) == 10.3


def test_jaccard_is_below_dice() -> None:
    def at(row: PublishedResult) -> tuple[object, ...]:
        return (row.method, row.variant, row.dataset, row.lineage, row.labeled, row.class_name, row.source)

    dice = {at(row): row.value for row in published_results(metric="dice")}
    jaccard = {at(row): row.value for row in published_results(metric="jaccard")}
    assert set(jaccard) <= set(dice)
    for key, value in jaccard.items():
        share = dice[key] / 100
        assert 100 * share / (2 - share) - 0.2 < value < dice[key], key  # Jensen: no mean Jaccard is lower


def test_names_are_those_of_the_catalogue() -> None:
    found = {row.method for row in published_results()}
    assert found <= {entry.name for entry in CATALOGUE} | ELSEWHERE
    assert not ELSEWHERE & {entry.name for entry in CATALOGUE}


def test_rows_are_unique() -> None:
    rows = published_results()
    bare = {replace(row, value=0, decimals=0, unit="", spread=None, note="") for row in rows}
    assert len(bare) == len(rows)


def test_decimals_are_those_of_the_files() -> None:
    printed = [line["value"] for file in sorted(FOLDER.glob("*.csv")) for line in csv.DictReader(file.open())]
    assert [f"{row.value:.{row.decimals}f}" for row in published_results()] == printed


def test_filters_and_unknown_names() -> None:
    assert published_results("pi_model") == ()
    assert {row.dataset for row in published_results("plgcl", "crag")} == {"crag"}
    assert {row.class_name for row in published_results("arco", class_name="Myo")} == {"Myo"}
    with pytest.raises(ConfigError, match="did you mean 'acdc'"):
        published_results(dataset="acdcc")
    with pytest.raises(ConfigError, match="unknown lineage of published results 'ssl4miss'; did you mean 'ssl4mis'"):
        published_results(lineage="ssl4miss")
    with pytest.raises(ConfigError, match="did you mean 'dice'"):
        published_results(metric="dize")
    with pytest.raises(ConfigError, match="unknown class of published results"):
        published_results(class_name="spleen")


GOOD = {
    "method": "ua_mt",
    "variant": "",
    "dataset": "acdc",
    "lineage": "ssl4mis",
    "labeled": "3",
    "labeled_unit": "patients",
    "class": "mean",
    "metric": "dice",
    "value": "46.04",
    "unit": "%",
    "spread": "1.5",
    "source": "somewhere",
    "note": "",
}


def test_a_row_is_read_with_its_types() -> None:
    row = published._row(GOOD)
    assert (row.labeled, row.value, row.decimals, row.spread) == (3, 46.04, 2, 1.5)
    assert isinstance(row.labeled, int)
    assert published._row(GOOD | {"labeled": "2.5", "labeled_unit": "percent", "spread": ""}).labeled == 2.5


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("method", "UA-MT"),
        ("method", ""),
        ("dataset", "ACDC 2017"),
        ("lineage", "ssl4miss"),
        ("labeled", "0"),
        ("labeled", "2.5"),
        ("labeled", "few"),
        ("labeled_unit", "volumes"),
        ("class", ""),
        ("metric", "dize"),
        ("value", "146.04"),
        ("value", "-1"),
        ("value", "nan"),
        ("value", "46,04"),
        ("unit", "voxel"),
        ("spread", "-1"),
        ("source", ""),
    ],
)
def test_a_faulty_row_is_refused(column: str, value: str) -> None:
    with pytest.raises(ValueError, match=r"holds|could not convert"):
        published._row(GOOD | {column: value})


def test_a_faulty_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ",".join(GOOD)
    line = ",".join(GOOD.values())
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setattr(published, "files", lambda package: tmp_path)
    read = published._read.__wrapped__

    (folder / "some.csv").write_text(f"{head}\n{line}\n")
    assert [row.value for row in read()] == [46.04]
    (folder / "some.csv").write_text(f"{head}\n{line}\n{line}\n")
    with pytest.raises(ValueError, match=r"some\.csv, line 3: this result is there twice"):
        read()
    (folder / "some.csv").write_text(f"{head}\n{line.replace('46.04', 'many')}\n")
    with pytest.raises(ValueError, match=r"some\.csv, line 2: column value holds 'many'"):
        read()
    (folder / "some.csv").write_text(f"{head}\nua_mt,acdc\n")
    with pytest.raises(ValueError, match=r"some\.csv, line 2"):
        read()
    (folder / "some.csv").write_text("method,value\n")
    with pytest.raises(ValueError, match=r"some\.csv: the columns are"):
        read()


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from scantly.benchmark.published import published_results; published_results();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'pandas', 'monai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
