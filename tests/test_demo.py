import pytest
from filelock import FileLock

from scantly import demo as module
from scantly.errors import RunError
from scantly.training import resolve as resolving


@pytest.fixture
def quick(monkeypatch):
    """The demo's own settings, but a few iterations on small slices."""
    read = resolving.read_recipe

    def shortened(name):
        recipe = read(name)
        recipe["training"] |= {"steps": 4, "device": "cpu"}
        recipe["plan"] |= {"size": [32, 32], "patch_size": [32, 32]}
        recipe["network"] = {"arguments": {"widths": [4, 8], "dropout": [0, 0.1]}}
        return recipe

    monkeypatch.setattr(resolving, "read_recipe", shortened)
    monkeypatch.setattr(module, "SUBJECTS", 6)
    monkeypatch.setattr(module, "TEST", 2)


def test_from_nothing_to_a_report_and_again_without_training(quick, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    report = module.demo(out)
    page = report.read_text(encoding="utf-8")
    assert "Mean Teacher" in page
    assert "Supervised" in page
    runs = module.train_pair(out / "dataset", out / "runs", seed=0)
    supervised, teacher = (run.settings for run in runs)
    assert supervised.training == teacher.training
    assert supervised.split["labeled"] == teacher.split["labeled"]
    assert len(supervised.split["labeled"]) == module.LABELED
    assert not set(supervised.split["test"]) & {*teacher.split["labeled"], *teacher.split["unlabeled"]}
    monkeypatch.setattr("scantly.training.engine.Engine.fit", lambda self: pytest.fail("trained again"))
    assert module.demo(out).read_text(encoding="utf-8") == page


def test_an_interrupted_generation_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SUBJECTS", 4)
    monkeypatch.setattr(module, "TEST", 1)
    half = tmp_path / ".dataset" / "imagesTr"
    half.mkdir(parents=True)
    (half / "half.nii.gz").touch()
    dataset = module.generate(tmp_path, seed=0)
    assert len(list((dataset / "imagesTr").iterdir())) == 3
    assert not (tmp_path / ".dataset").exists()


def test_a_folder_with_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match=r"thesis\.txt"):
        module.generate(tmp_path, seed=0)
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_demos_in_one_folder_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(RunError, match="another process is running the demo in"):
        module.demo(tmp_path / "out")
    assert [item.name for item in (tmp_path / "out").iterdir()] in ([], [".lock"])
