"""Splits: official lists, labeled subsets, shares, draws, and that no subject is on two sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dataset_folders as folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.data.dataset import Case, Dataset
from scantly.data.splits import Split, resolve_split
from scantly.errors import ConfigError, DatasetError


def dataset(
    root: Path, labeled: list[str], unlabeled: list[str] | None = None, test: list[str] | None = None
) -> Dataset:
    """A dataset whose files need not exist: splits look at names alone."""
    file = root / "x.nii.gz"
    train = {name: Case(name, (file,), file) for name in labeled}
    train |= {name: Case(name, (file,), None) for name in unlabeled or []}
    held = {name: Case(name, (file,), file) for name in test or []}
    return Dataset(root, "d", ("c",), ("background", "a"), ".nii.gz", dict(sorted(train.items())), held, {})


def write(root: Path, **content: Any) -> None:
    (root / "splits.json").write_text(json.dumps(content))


PATIENTS = [f"p{number}" for number in (9, 3, 5, 1, 2)]
FRAMES = [f"{patient}_{frame}" for patient in PATIENTS for frame in ("ed", "es")]
GROUPS = {frame: frame[:2] for frame in [*FRAMES, "v1_ed", "v1_es"]}


@pytest.fixture
def cardiac(tmp_path: Path) -> Dataset:
    """Five training patients in an official order that is not that of their names, one for validation."""
    write(
        tmp_path,
        unit="patient",
        train=FRAMES,
        val=["v1_ed", "v1_es"],
        labeled={"2": ["p5_ed", "p5_es", "p1_ed"]},
        groups=GROUPS,
        note="ignored",
    )
    return dataset(tmp_path, [*FRAMES, "v1_ed", "v1_es"])


def test_a_listed_subset_is_used_as_listed(cardiac: Dataset) -> None:
    split = resolve_split(cardiac, labeled=2)
    assert split.labeled == ("p5_ed", "p5_es", "p1_ed")
    assert set(split.unlabeled) == set(FRAMES) - set(split.labeled)
    assert split.val == ("v1_ed", "v1_es")
    assert split.test == ()
    assert split.unit == "patient"
    assert split.groups["p5_es"] == "p5"
    assert "listed subset of 2 patients" in split.origin


def test_else_the_first_subjects_in_the_official_order(cardiac: Dataset) -> None:
    assert resolve_split(cardiac, labeled=3).labeled == tuple(FRAMES[:6])
    assert resolve_split(cardiac, labeled="1").labeled == ("p9_ed", "p9_es")
    assert resolve_split(cardiac).labeled == tuple(FRAMES)
    assert resolve_split(cardiac).unlabeled == ()


@pytest.mark.parametrize(("share", "patients"), [("20%", 1), ("39.9%", 1), ("1%", 1), ("60%", 3), ("100%", 5)])
def test_shares_are_rounded_down_but_at_least_one(cardiac: Dataset, share: str, patients: int) -> None:
    assert len({GROUPS[name] for name in resolve_split(cardiac, labeled=share).labeled}) == patients


def test_a_share_counts_units_without_labels_too(tmp_path: Path) -> None:
    names = [f"c{number:02d}" for number in range(20)]
    write(tmp_path, unit="scan", train=names)
    split = resolve_split(dataset(tmp_path, names[5:], names[:5]), labeled="10%")
    assert split.labeled == ("c05", "c06")
    assert len(split.unlabeled) == 18


def test_draws_are_of_whole_subjects_and_nested(cardiac: Dataset) -> None:
    few = resolve_split(cardiac, labeled=2, seed_labeled=1)
    assert few == resolve_split(cardiac, labeled=2, seed_labeled=1)
    assert len(few.labeled) == 4
    assert len({GROUPS[name] for name in few.labeled}) == 2
    assert set(few.labeled) <= set(resolve_split(cardiac, labeled=3, seed_labeled=1).labeled)
    draws = {resolve_split(cardiac, labeled=2, seed_labeled=seed).labeled for seed in range(20)}
    assert len(draws) > 3


@pytest.mark.parametrize("value", [0, -1, "x", "0%", "101%", "2.5", "", True])
def test_what_is_no_number_is_refused(cardiac: Dataset, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"--labeled is .*whole number above 0"):
        resolve_split(cardiac, labeled=value)


def test_too_many_names_how_many_there_are(cardiac: Dataset) -> None:
    with pytest.raises(DatasetError, match=r"--labeled 500 asks for 500 patients, but .* has 5 with labels"):
        resolve_split(cardiac, labeled=500)


def test_clean_takes_the_dev_split_and_literature_the_official_one(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    write(
        tmp_path,
        unit="scan",
        train=names,
        val=[],
        dev_split={"train": names[:4], "val": names[4:]},
        labeled={"5": names[:5], "2": ["s3", "s1"]},
    )
    scans = dataset(tmp_path, names)
    clean = resolve_split(scans, labeled=2)
    assert (clean.labeled, clean.unlabeled, clean.val) == (("s1", "s3"), ("s0", "s2"), ("s4", "s5"))
    literature = resolve_split(scans, labeled=2, protocol="literature")
    assert literature.val == ()
    assert literature.unlabeled == ("s0", "s2", "s4", "s5")
    with pytest.raises(DatasetError, match="has 4 with labels"):
        resolve_split(scans, labeled=5)
    assert len(resolve_split(scans, labeled=5, protocol="literature").labeled) == 5


def test_without_lists_a_fifth_of_ten_or_more_subjects_validates(tmp_path: Path) -> None:
    names = [f"c{number:02d}" for number in range(14)]
    ten = dataset(tmp_path, names, ["u1", "u2"], test=["t1"])
    split = resolve_split(ten, seed=3)
    assert len(split.val) == 2
    assert split.test == ("t1",)
    assert split.unlabeled == ("u1", "u2")
    assert set(split.labeled) | set(split.val) == set(names)
    assert split.unit == "case"
    assert split == resolve_split(ten, seed=3)
    assert len({resolve_split(ten, seed=seed).val for seed in range(10)}) > 3
    nine = resolve_split(dataset(tmp_path, names[:9]))
    assert nine.val == ()
    assert len(nine.labeled) == 9


def test_groups_alone_keep_subjects_together_in_a_drawn_split(tmp_path: Path) -> None:
    names = [f"p{number:02d}_{frame}" for number in range(10) for frame in "ab"]
    groups = {name: name[:3] for name in names}
    write(tmp_path, unit="patient", groups=groups)
    cohort = dataset(tmp_path, [name for name in names if name != "p04_b"], ["p04_b"])
    for seed in range(12):
        split = resolve_split(cohort, seed=seed)
        assert len({groups[name] for name in split.val}) == 2
        assert not {groups[name] for name in split.val} & {groups[name] for name in (*split.labeled, *split.unlabeled)}
        assert "p04_b" not in split.val


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": ["p9_ed", "nobody"]}, r'"train" names cases that are not in imagesTr: nobody'),
        ({"val": ["p9_es"]}, r'"train" and "val" share the patient p9'),
        ({"test": ["v1_es"]}, r'"val" and "test" share the patient v1'),
        ({"val": ["v1_ed", "v1_ed"]}, r'"val" names cases more than once: v1_ed'),
        ({"labeled": {"1": ["v1_ed"]}}, r'"labeled\.1" names cases that are not in "train": v1_ed'),
        (
            {"dev_split": {"train": ["p9_ed"], "val": ["p9_es"]}},
            r'"dev_split.train" and "dev_split.val" share',
        ),
        ({"train": "p9_ed"}, r"splits\.json: 'train' is 'p9_ed'"),
        ({"labeled": [3]}, r"splits\.json: 'labeled' is \[3\]"),
    ],
)
def test_wrong_lists_are_refused_by_name(cardiac: Dataset, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = json.loads((tmp_path / "splits.json").read_text())
    write(tmp_path, **(content | change))
    with pytest.raises(DatasetError, match=words) as caught:
        resolve_split(cardiac)
    assert "splits.json" in str(caught.value)


def test_cases_that_need_labels_must_have_them(tmp_path: Path) -> None:
    write(tmp_path, train=["a", "b"], val=["u"])
    with pytest.raises(DatasetError, match=r'"val" names cases without a label file: u'):
        resolve_split(dataset(tmp_path, ["a", "b"], ["u"]))
    (tmp_path / "splits.json").unlink()
    with pytest.raises(DatasetError, match="no labeled training case"):
        resolve_split(dataset(tmp_path, [], ["u"]))


def test_a_subject_in_both_image_folders_is_found(tmp_path: Path) -> None:
    write(tmp_path, train=["a1", "b1"], groups={"a1": "a", "a2": "a"})
    with pytest.raises(DatasetError, match="both its training and its test part: a"):
        resolve_split(dataset(tmp_path, ["a1", "b1"], test=["a2"]))


def test_plain_data_round_trips(cardiac: Dataset) -> None:
    split = resolve_split(cardiac, labeled=2)
    plain = json.loads(json.dumps(split.to_dict()))
    assert Split.from_dict(plain) == split
    del plain["val"]
    with pytest.raises(DatasetError, match="lacks or does not know val"):
        Split.from_dict(plain)


@given(
    subjects=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=25),
    share=st.integers(1, 100),
    seed=st.integers(0, 5),
)
@settings(max_examples=80)
def test_parts_never_overlap(
    tmp_path_factory: pytest.TempPathFactory, subjects: list[tuple[int, int]], share: int, seed: int
) -> None:
    root = tmp_path_factory.mktemp("split")
    labeled = [f"s{i:02d}_l{k}" for i, (count, _) in enumerate(subjects) for k in range(count)]
    unlabeled = [f"s{i:02d}_u{k}" for i, (_, count) in enumerate(subjects) for k in range(count)]
    write(root, groups={name: name[:3] for name in [*labeled, *unlabeled]})
    try:
        split = resolve_split(dataset(root, labeled, unlabeled), labeled=f"{share}%", seed=seed, seed_labeled=seed)
    except DatasetError as error:
        assert "with labels" in str(error)
        return
    training = {name[:3] for name in (*split.labeled, *split.unlabeled)}
    assert not training & {name[:3] for name in split.val}
    assert not set(split.labeled) & set(split.unlabeled)
    assert set(split.labeled) <= set(labeled)
    assert len({name[:3] for name in split.labeled}) == max(1, len(training) * share // 100)
    # nothing is lost but the unlabeled cases of validation subjects
    left = {*labeled, *unlabeled} - {*split.labeled, *split.unlabeled, *split.val}
    assert left <= set(unlabeled)


def test_real_files_give_the_same(tmp_path: Path) -> None:
    folders.make(tmp_path, ["b", "a"], ["u"], splits={"train": ["b", "u", "a"]})
    split = resolve_split(Dataset.open(tmp_path), labeled=1)
    assert (split.labeled, split.unlabeled) == (("b",), ("u", "a"))
