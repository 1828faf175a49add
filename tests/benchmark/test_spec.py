"""The benchmark file: what it may say, and every fault in it at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grid_helpers import spec_values
from pydantic import ValidationError

from scantly.benchmark.spec import BenchmarkSpec, DatasetEntry, MethodEntry, read_spec
from scantly.errors import ConfigError


@pytest.fixture
def faults(tmp_path: Path):
    """The sentences about a benchmark file."""

    def read(values: dict[str, Any]) -> list[str]:
        path = tmp_path / "spec.yaml"
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError) as refused:
            read_spec(path)
        sentences = str(refused.value).splitlines()
        assert all(str(path) in sentence for sentence in sentences)
        return [sentence.replace(f"{path}: ", "") for sentence in sentences]

    return read


def test_a_complete_file(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "spec.yaml").write_text(
        """
title: Hearts
datasets:
  acdc: {path: ../data/acdc, recipe: acdc-cpu, labeled: [3, "7", 10%, 2.5%], split: val, steps: 1500}
  own: {path: /data/own, recipe: recipes/mine.yaml, protocol: literature, labeled: [1]}
methods:
  - supervised
  - {name: mean_teacher, label: mt-long, settings: {consistency: 0.5}, training: {lr: 0.02}, network: {name: unet}}
  - mean_teacher
"""
    )
    spec = read_spec(folder / "spec.yaml")
    assert spec.datasets["acdc"].path == str(tmp_path / "data" / "acdc")
    assert spec.datasets["acdc"].recipe == "acdc-cpu"
    assert spec.datasets["acdc"].labeled == (3, 7, "10%", "2.5%")
    assert spec.datasets["own"].path == "/data/own"
    assert spec.datasets["own"].recipe == str(folder / "recipes" / "mine.yaml")
    assert [method.row for method in spec.methods] == ["supervised", "mt-long", "mean_teacher"]
    assert spec.seeds == (1, 2, 3)
    assert (spec.lower_bound, spec.upper_bound, spec.planned, spec.nnunetv2) == (True, True, True, False)


def test_paths_of_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    values = spec_values("~/data", entry={"recipe": "~/mine.yml"})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(values))
    entry = read_spec(tmp_path / "spec.yaml").datasets["phantom"]
    assert (entry.path, entry.recipe) == (str(tmp_path / "home/data"), str(tmp_path / "home/mine.yml"))


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"labeled": [0]}, "0 is no number above 0"),
        ({"labeled": [-3]}, "-3 is no number above 0"),
        ({"labeled": [1.5]}, "1.5 is no number above 0"),
        ({"labeled": [True]}, "true is no number above 0"),
        ({"labeled": ["0%"]}, "'0%' is no number above 0"),
        ({"labeled": ["101%"]}, "'101%' is no number above 0"),
        ({"labeled": ["all"]}, "all labels are upper_bound's matter"),
        ({"labeled": [3, 7, 3, "3", 7]}, "listed more than once: 3, 7"),
        ({"labeled": ["10%", "10.0%"]}, "listed more than once: 10%"),
        ({"labeled": 3}, "write a list, for instance [3, 7]"),
        ({"labeled": []}, "at least 1"),
        ({"steps": 0}, "datasets.phantom.steps"),
        ({"split": "train"}, "datasets.phantom.split"),
        ({"protocol": "dirty"}, "datasets.phantom.protocol"),
        ({"lebeled": [3]}, "did you mean 'datasets.phantom.labeled'?"),
        ({"settings": {"data": {"labeled": 3}}}, "data.labeled is said by 'labeled'"),
        ({"settings": {"data": {"dataset": "x"}}}, "data.dataset is said by 'path'"),
        ({"settings": {"training": {"seed": 3}}}, "training.seed is said by 'seeds'"),
        ({"settings": {"method": {"name": "ict"}}}, "method.name is said by 'methods'"),
    ],
)
def test_a_fault_of_a_dataset(faults, dataset: dict[str, Any], said: str) -> None:
    (sentence,) = faults(spec_values("nowhere", entry=dataset))
    assert said in sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": []}, "at least 1"),
        ({"methods": "supervised"}, "setting 'methods' is 'supervised'"),
        ({"methods": [3]}, "methods.1 is 3; write settings"),
        ({"methods": ["ict", "ict", "ict"]}, "methods: ict: rows of one name"),
        ({"methods": ["ict", {"name": "ua_mt", "label": "ict"}]}, "methods: ict: rows of one name"),
        ({"methods": [{"name": "ict", "lable": "x"}]}, "did you mean 'methods.1.label'?"),
        ({"methods": [{"name": "ict", "label": "../x"}]}, "a method's label names a folder"),
        ({"methods": [{"name": "ict", "label": ".hidden"}]}, "a method's label names a folder"),
        ({"methods": [{"name": "ict", "label": "a b"}]}, "a method's label names a folder"),
        ({"methods": [{"name": "ict", "label": "a" * 101}]}, "100 of them at most"),
        ({"methods": [{"name": "ict", "label": "supervised"}]}, "supervised: a row that the benchmark adds"),
        ({"methods": ["supervised_planned"]}, "supervised_planned: a row that the benchmark adds"),
        ({"methods": [{"name": "ict", "label": "nnunetv2"}]}, "nnunetv2: a row that the benchmark adds"),
        ({"methods": [{"name": "ict", "training": {"seed": 1}}]}, "training.seed is said by 'seeds'"),
        ({"methods": [{"name": "ict", "settings": {"name": "x"}}]}, "method.name is said by 'methods'"),
        ({"seeds": []}, "at least 1"),
        ({"seeds": [-1]}, "-1 is no number from 0 to 2^32 - 1"),
        ({"seeds": [1, 2**32]}, "4294967296 is no number"),
        ({"seeds": [1, 2, 1, 2, 2]}, "listed more than once: 1, 2"),
        ({"seed": [1]}, "did you mean 'seeds'?"),
        ({"datasets": {}}, "at least 1"),
        ({"datasets": {"phantom": "path"}}, "datasets.phantom is 'path'; write settings"),
        ({"datasets": {"a/b": spec_values("x")["datasets"]["phantom"]}}, "dataset 'a/b' names a folder"),
    ],
)
def test_a_fault_of_the_file(faults, changes: dict[str, Any], said: str) -> None:
    (sentence,) = faults({**spec_values("nowhere"), **changes})
    assert said in sentence


def test_all_faults_are_told_at_once(faults) -> None:
    sentences = faults(
        {
            "datasets": {
                "one": {"path": "x", "labeled": [3, 3, 0], "split": "train"},
                "two": {"labeled": ["x"], "recipy": "acdc"},
            },
            "methods": ["ict", "ict", {"name": "ua_mt", "settngs": {}}, {"label": "x"}],
            "seeds": [1, 1],
            "lowr_bound": False,
        }
    )
    expected = [
        "'datasets.one.labeled' is",
        "datasets.one.split",
        "'datasets.two.path' is missing",
        "'datasets.two.labeled' is",
        "datasets.two.recipy",
        "methods.3.settngs",
        "'methods.4.name' is missing",
        "methods: ict: rows of one name",
        "'seeds'",
        "lower_bound",
    ]
    assert len(sentences) == len(expected)
    for part in expected:
        assert sum(part in sentence for sentence in sentences) == 1, part


@pytest.mark.parametrize(
    ("text", "said"),
    [("datasets: [", "is not valid YAML"), ("- a list", "holds a list, not settings"), ("", "is empty")],
)
def test_a_file_that_is_no_benchmark(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{path} {said}"):
        read_spec(path)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist"):
        read_spec(tmp_path / "nowhere.yaml")


def test_the_class_itself_refuses_rows_of_one_name() -> None:
    values = {**spec_values("x"), "methods": ["ict", {"name": "ua_mt", "label": "ict"}]}
    with pytest.raises(ValidationError, match="rows of one name"):
        BenchmarkSpec.model_validate(values)


def test_the_page_about_benchmarks(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.M | re.S)
    path = tmp_path / "hearts.yaml"
    path.write_text(shown)
    assert list(read_spec(path).datasets) == ["acdc", "own"]
    assert all(entry.row for entry in read_spec(path).methods)
    head = text.partition("| Key | Default | Meaning |")[2].partition("\n\n")[0]
    told = {name for row in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", head, re.M) for name in re.findall(r"\w+", row)}
    fields = {*BenchmarkSpec.model_fields, *DatasetEntry.model_fields, *MethodEntry.model_fields}
    assert told == fields
