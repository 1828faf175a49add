"""Which runs are seeds of one method, which share a table, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from scantly.errors import RunError
from scantly.evaluation import save_table
from scantly.report.groups import collect
from scantly.report.tables import overview
from scantly.training.run import Run

MakeRun = Callable[..., Run]


def test_runs_that_differ_in_the_seed_only_are_one_method(make_run: MakeRun) -> None:
    runs = [
        make_run("b", seed=2, shift=3),
        make_run("mt", method="mean_teacher"),
        make_run("a", seed=1, shift=1),
    ]
    (section,) = collect(runs)
    assert [method.label for method in section.methods] == [
        "Supervised, 1 labeled",
        "Mean Teacher, 1 labeled",
    ]
    supervised = section.methods[0]
    assert [result.seed for result in supervised.results] == [1, 2]
    case, name = section.cases[0], section.classes[0]

    def dice(table: pd.DataFrame) -> float:
        return table.set_index(["case", "class"])["dice"][case, name]

    single = [dice(result.table) for result in supervised.results]
    assert single[0] != single[1]
    assert dice(supervised.table) == pytest.approx(sum(single) / 2)


def test_another_setting_is_another_method_and_names_it(make_run: MakeRun) -> None:
    runs = [
        make_run("slow", method="mean_teacher", settings={"method": {"consistency": 0.1}}),
        make_run("fast", method="mean_teacher", settings={"method": {"consistency": 0.5}}),
    ]
    (section,) = collect(runs)
    assert [method.label for method in section.methods] == [
        "Mean Teacher, 1 labeled, consistency 0.1",
        "Mean Teacher, 1 labeled, consistency 0.5",
    ]


def test_where_and_how_fast_a_run_was_made_does_not_part_seeds(make_run: MakeRun) -> None:
    runs = [
        make_run("here", seed=1, settings={"data": {"workers": 0}, "training": {"device": "cpu"}}),
        make_run("there", seed=2, settings={"data": {"workers": 4}, "training": {"device": "cuda"}}),
    ]
    assert len(collect(runs)[0].methods) == 1


def test_bounds_are_named(make_run: MakeRun) -> None:
    runs = [
        make_run("few", labeled=1),
        make_run("mt", method="mean_teacher", labeled=1),
        make_run("other", labeled=2),
        make_run("all", labeled=3),
    ]
    (section,) = collect(runs)
    assert {method.label: method.bound for method in section.methods} == {
        "Supervised, 1 labeled": "lower bound",
        "Mean Teacher, 1 labeled": "",
        "Supervised, 2 labeled": "",
        "Supervised, all 3 labeled": "upper bound",
    }


def test_labeled_counts_subjects_not_cases(make_run: MakeRun) -> None:
    cases = ["subject000", "subject001", "subject002"]
    groups = {"subject000": "p1", "subject001": "p1", "subject002": "p2"}
    run = make_run("frames", settings={"split": {"labeled": cases, "groups": groups}})
    assert collect([run])[0].methods[0].label == "Supervised, 2 labeled"


def test_protocols_never_share_a_section(make_run: MakeRun) -> None:
    literature = {"evaluation": {"protocol": "literature", "flaws": ["nearest-neighbor resizing"]}}
    runs = [make_run("a"), make_run("b", settings=literature), make_run("c", seed=3)]
    sections = collect(runs)
    assert [section.protocol for section in sections] == ["clean", "literature"]
    assert [len(section.results) for section in sections] == [2, 1]
    assert sections[0].flaws == ()
    assert sections[1].flaws == ("nearest-neighbor resizing",)


def test_same_folder_names_are_told_apart_by_their_parents(make_run: MakeRun) -> None:
    results = collect([make_run("one/run"), make_run("two/run", seed=5)])[0].results
    assert [result.name for result in results] == ["one/run", "two/run"]


def test_refuses_a_run_without_evaluation(make_run: MakeRun) -> None:
    evaluated, bare = make_run("a"), make_run("b", evaluate=False)
    with pytest.raises(RunError, match=rf"{bare.folder}.*run scantly evaluate {bare.folder} --split test first"):
        collect([evaluated, bare])
    with pytest.raises(RunError, match=rf"run scantly evaluate {bare.folder} first"):
        collect([bare])
    with pytest.raises(RunError, match="not been evaluated on 'val'"):
        collect([evaluated], "val")
    with pytest.raises(RunError, match="unknown split 'train'"):
        collect([evaluated], "train")


def test_refuses_runs_evaluated_on_different_cases(make_run: MakeRun) -> None:
    other = make_run("b", settings={"split": {"test": ["subject004", "subject005", "subject006"]}})
    with pytest.raises(RunError, match=r"different cases: subject007 \(LV\) is only in the first"):
        collect([make_run("a"), other])
    with pytest.raises(RunError, match=r"different cases: subject007"):
        collect([other, make_run("c")])


def test_refuses_nothing_and_twice_the_same(make_run: MakeRun) -> None:
    with pytest.raises(RunError, match="nothing to compare"):
        collect([])
    run = make_run("a")
    with pytest.raises(RunError, match="given twice"):
        collect([run, Run.open(run.folder / ".." / "a")])


def test_refuses_a_table_scored_by_another_convention(make_run: MakeRun) -> None:
    """As one that an older version wrote, where a class in neither mask had a Dice of 1."""
    run = make_run("a", settings={"evaluation": {"protocol": "literature"}})
    table = run.evaluation("test")
    assert table is not None
    table.loc[1, "status"], table.loc[1, "dice"] = "both_empty", 0.0
    save_table(table, run.folder / "evaluation" / "test.csv")
    assert overview(collect([run])[0])[1][0].both_empty == 1
    table.loc[1, "dice"] = 1.0
    save_table(table, run.folder / "evaluation" / "test.csv")
    with pytest.raises(RunError, match=rf"^{run.folder}, test cases: .*a Dice of 1, which is not .*'literature'"):
        collect([run])
