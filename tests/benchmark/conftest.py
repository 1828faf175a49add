"""A phantom cohort, a method that waits at a gate, and the results of cells that nobody interrupted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grid_helpers import Here, gated_row, install, opened, results, write_spec

from scantly.data.phantom import write_phantom


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve generated subjects: seven to train, two to validate, three to test; to be read only."""
    return write_phantom(tmp_path_factory.mktemp("benchmark") / "phantom", subjects=12, val=2, test=3, size=(3, 32, 32))


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package whose method is ``gated``."""
    folder = tmp_path_factory.mktemp("packages")
    shutil.copy(Path(__file__).with_name("gated_method.py"), folder)
    described = folder / "gated-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: gated\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[scantly.methods]\ngated = gated_method:Gated\n")
    return folder


@pytest.fixture
def gated(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method ``gated`` is installed."""
    install(packages, monkeypatch)


@pytest.fixture(scope="session")
def gate_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the gate is, since its name is in the configuration."""
    return tmp_path_factory.mktemp("gate") / "gate"


@pytest.fixture
def gate(gate_path: Path) -> Iterator[Path]:
    """A closed gate; remove the file to open it."""
    gate_path.touch()
    yield gate_path
    gate_path.unlink(missing_ok=True)


@pytest.fixture
def gated_spec(phantom: Path, gate_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a benchmark file with the rows ``supervised`` and ``gated``; its ``row`` is the latter."""

    class Write:
        row = gated_row(gate_path)

        def __call__(self, **changes: object) -> Path:
            rows = ["supervised", self.row]
            return write_spec(tmp_path / "gated.yaml", phantom, **{"methods": rows, "seeds": [1, 2], **changes})

    return Write()


@pytest.fixture(scope="session")
def undisturbed(
    phantom: Path, packages: Path, gate_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """Cell -> its results, for every cell of ``gated_spec``, worked on without interruption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = ["supervised", gated_row(gate_path)]
    with pytest.MonkeyPatch.context() as patch:
        install(packages, patch)
        gate_path.unlink(missing_ok=True)
        grid = opened(write_spec(folder / "spec.yaml", phantom, methods=rows, seeds=[1, 2]), folder / "out")
        state = grid.work(Here(), threads=1, quiet=True)
    assert len(state.done) == len(grid.cells) == 4
    return {cell.name: results(grid.run_folder(cell)) for cell in grid.cells}
