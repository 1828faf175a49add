"""The page: self-contained, escaped, well-formed, and honest about what it compares."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scantly.errors import RunError
from scantly.report import compare
from scantly.training.run import Run

MakeRun = Callable[..., Run]
VOID = {"meta", "br", "img", "input", "link", "hr"}
LITERATURE = {"evaluation": {"protocol": "literature", "flaws": ["Images are resized by nearest neighbor."]}}


class Checker(HTMLParser):
    """Collects tags, attributes and text; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def parse(path: Path) -> Checker:
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.stack == []
    return checker


@pytest.fixture(scope="module")
def report(shared_runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page, read by several tests."""
    return compare(shared_runs, tmp_path_factory.mktemp("page") / "new" / "report.html")


def test_page_has_everything_a_reader_needs(report: Path) -> None:
    page = parse(report)
    for sentence in (
        "Supervised and Mean Teacher",
        "Results: clean protocol, 4 test cases",
        "Supervised, 1 labeled (lower bound)",
        "Supervised, all 3 labeled (upper bound)",
        "95th percentile (linear interpolation)",
        "in mm, with the case's own spacing",
        "within 2 mm of the other surface",
        "Missed, spurious, in neither",
        "percentile bootstrap",
        "first minus second method, 4 subjects",
        "standard deviation over seeds",
        "standard deviation over cases",
        "With fewer than 20 subjects",
        "All weights are of the last iteration.",
        "training.seed",
        "method.consistency",
        "patch_size: fits",
    ):
        assert sentence in page.text, sentence
    assert "No supervised run" not in page.text
    assert "tolerance in mm named" not in page.text
    headings = [tag for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


def test_page_is_self_contained(report: Path) -> None:
    page = parse(report)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(names)
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data") and value
    ]
    assert len(references) > 10
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in references)
    styles = report.read_text(encoding="utf-8")
    assert "@import" not in styles
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", styles))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_links_resolve(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("lit", method="mean_teacher", settings=LITERATURE)]
    page = parse(compare(runs, tmp_path / "report.html"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {v[1:] for _, a in page.tags for n, v in a.items() if n.endswith("href") and v and v[0] == "#"}
    labeled_by = {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert targets | labeled_by <= set(ids)


def test_tables_are_accessible(report: Path) -> None:
    page = parse(report)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    pictures = [a for tag, a in page.tags if a.get("role") in ("img", "group")]
    assert len(pictures) > 10
    assert all(attributes.get("aria-label") for attributes in pictures)


def test_equal_runs_give_an_equal_page(report: Path, shared_runs: list[Run], tmp_path: Path) -> None:
    assert compare(shared_runs, tmp_path / "again.html").read_bytes() == report.read_bytes()


def test_names_and_settings_are_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>"
    run = make_run("<img src=x onerror=alert(1)>", settings={"method": {"note": evil}, "recipe": evil})
    other = make_run("b", settings={"method": {"note": "plain"}})
    page = parse(compare([run, other], tmp_path / "report.html"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert evil in page.text


def test_protocols_are_apart_with_a_warning_and_their_flaws(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a"), make_run("b", settings=LITERATURE, lose="subject005")]
    page = parse(compare(runs, tmp_path / "report.html"))
    assert "Two kinds of protocol." in page.text
    assert "do not compare across them" in page.text
    assert "Results: clean protocol, 4 test cases" in page.text
    assert "Results: literature protocol, 4 test cases" in page.text
    assert "Images are resized by nearest neighbor." in page.text
    assert "which flatters them" in page.text
    assert page.text.count("There is one method only") == 2


def test_missing_lower_bound_and_moved_dataset_are_said(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run("a", method="mean_teacher", settings={"data": {"dataset": "/nowhere/cohort"}})
    page = parse(compare([run], tmp_path / "report.html"))
    assert "No supervised run with the same labeled cases" in page.text
    assert "The scans of a cannot be shown: /nowhere/cohort" in page.text


def test_seeds_with_other_labeled_cases_are_said(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [make_run("a", seed=0), make_run("b", seed=1, settings={"split": {"labeled": ["subject002"]}})]
    page = parse(compare(runs, tmp_path / "report.html"))
    assert "The seeds of Supervised, 1 labeled were trained on different labeled cases" in page.text


def test_refusal_leaves_an_earlier_page_alone(make_run: MakeRun, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("earlier")
    with pytest.raises(RunError, match="scantly evaluate"):
        compare([make_run("a", evaluate=False)], out)
    assert out.read_text(encoding="utf-8") == "earlier"


def test_importing_the_report_costs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, scantly.report; print(sorted({'torch', 'matplotlib', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
