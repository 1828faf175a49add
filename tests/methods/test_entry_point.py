"""A method that another package adds by entry point: installed as a user would, trained, and taken away again."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from scantly.methods import catalogue
from test_docs import BLOCKS, ROOT

EXAMPLE = ROOT / "examples" / "scantly-weak-to-strong"
NAME = "weak_to_strong"
QUICK = (
    *("--steps", "3", "--device", "cpu", "--size", "32", "32", "--set", "network.arguments.widths=[4,8]"),
    *("network.arguments.dropout=[0,0]", "plan.labeled_batch_size=2", "plan.unlabeled_batch_size=2"),
)


def documented(command: str) -> list[str]:
    """The words behind ``scantly`` of that command in the example's README."""
    readme = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^scantly ({command} .+)$", readme, re.M)
    return shlex.split(line)


def scantly(*words: str | Path, packages: Path | None) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own.

    Args:
        words: What stands behind ``scantly``.
        packages: Folder of further packages on the path; ``None``: none.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-m", "scantly", *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=300)


def sentence(refused: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command prints."""
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    (line,) = refused.stderr.splitlines()
    return line.removeprefix("scantly: ")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has installed the example."""
    folder = tmp_path_factory.mktemp("packages")
    source = shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files beside the source
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    words = ["-m", "pip", "install", *options, "--target", folder / "installed", source]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, encoding="utf-8", check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder / "installed"


@pytest.fixture(scope="module")
def run(cohort: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the example's method on a generated cohort."""
    folder = tmp_path_factory.mktemp("runs") / NAME
    places = {"DATASET": cohort, "RUN": folder}
    done = scantly(*(places.get(word, word) for word in documented("train")), *QUICK, packages=packages)
    assert done.returncode == 0, done.stderr
    assert f"trained {NAME}, 3 iterations, on 2 labeled" in done.stdout
    return folder


def test_the_example_is_the_method_of_the_page() -> None:
    page = [block for block in BLOCKS if block.page.name == "new-method.md"]
    (shown,) = (block.text for block in page if block.language == "python" and "class WeakToStrong(" in block.text)
    source = (EXAMPLE / "src" / "scantly_weak_to_strong" / "__init__.py").read_text(encoding="utf-8")
    assert re.sub(r'\A""".*?"""\n\n', "", source, flags=re.S) == shown
    (toml,) = (tomllib.loads(block.text) for block in page if block.language == "toml")
    groups = [toml, tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))]
    assert [list(group["project"]["entry-points"][catalogue.ENTRY_POINTS]) for group in groups] == [[NAME], [NAME]]


def test_an_installed_package_adds_its_method(packages: Path) -> None:
    listed = scantly("methods", packages=packages)
    assert listed.returncode == 0, listed.stderr
    assert re.search(rf"^ *{NAME} +from scantly-weak-to-strong ", listed.stdout, re.M)
    described = scantly(*documented("methods"), packages=packages)
    assert described.returncode == 0, described.stderr
    assert "Confident predictions on the weak view teach the strong view of the same image." in described.stdout
    assert "  threshold = 0.95 (number)\n      Probability from which a prediction counts.\n" in described.stdout


def test_its_run_predicts_and_is_evaluated(cohort: Path, packages: Path, run: Path, tmp_path: Path) -> None:
    places = {"RUN": run, "SCANS": cohort / "imagesTs", "PREDICTIONS": tmp_path / "predictions"}
    predicted = scantly(*(places.get(word, word) for word in documented("predict")), packages=packages)
    assert predicted.returncode == 0, predicted.stderr
    names = [path.name for path in sorted((tmp_path / "predictions").iterdir())]
    assert names == [path.name for path in sorted((cohort / "labelsTs").iterdir())]
    evaluated = scantly(*(places.get(word, word) for word in documented("evaluate")), packages=packages)
    assert evaluated.returncode == 0, evaluated.stderr
    assert evaluated.stdout.startswith(f"{NAME} on test: 2 cases")


@pytest.fixture(scope="module")
def refusal(cohort: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What is said when the run is to predict where the package is not."""
    out = tmp_path_factory.mktemp("refused") / "predictions"
    said = sentence(scantly("predict", run, cohort / "imagesTs", "--out", out, packages=None))
    assert not out.exists()
    return said


def test_without_the_package_its_run_is_refused_by_name(refusal: str) -> None:
    assert f"'{NAME}'" in refusal


def test_that_refusal_names_the_cure(refusal: str) -> None:
    assert "install" in refusal
    assert "model.safetensors" in refusal


def test_a_package_that_takes_a_name_of_the_catalogue_is_refused(tmp_path: Path) -> None:
    described = tmp_path / "greedy-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n", encoding="utf-8")
    taken = f"[{catalogue.ENTRY_POINTS}]\nmean_teacher = greedy:Greedy\n"
    (described / "entry_points.txt").write_text(taken, encoding="utf-8")
    expected = "method 'mean_teacher' of greedy is already in the catalogue; rename or remove it."
    assert sentence(scantly("methods", packages=tmp_path)) == expected


def claim(folder: Path, package: str, name: str, target: str) -> None:
    """Metadata of an installed package that adds a method."""
    described = folder / f"{package}-1.0.dist-info"
    described.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    (described / "METADATA").write_text(metadata, encoding="utf-8")
    (described / "entry_points.txt").write_text(f"[{catalogue.ENTRY_POINTS}]\n{name} = {target}\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("missing_module:Thing", "No module named 'missing_module'"),
        ("broken:Thing", "has no attribute 'Thing'"),
        ("broken", "'broken'"),
        ("broken:number", "is no subclass of scantly.methods.base.Method"),
    ],
)
def test_a_broken_package_is_named(tmp_path: Path, target: str, said: str) -> None:
    (tmp_path / "broken.py").write_text("number = 1\n", encoding="utf-8")
    claim(tmp_path, "fragile", "its_method", target)
    refused = sentence(scantly("methods", "its_method", packages=tmp_path))
    assert "method 'its_method' from fragile" in refused
    assert said in refused
    assert "mend or remove that package" in refused


def test_two_packages_with_one_name_are_refused(tmp_path: Path) -> None:
    claim(tmp_path, "first", "shared_name", "first:Method")
    claim(tmp_path, "second", "shared_name", "second:Method")
    refused = sentence(scantly("methods", packages=tmp_path))
    assert refused in {
        f"method 'shared_name' of {a} is already from {b}; rename or remove it."
        for a, b in (("first", "second"), ("second", "first"))
    }
