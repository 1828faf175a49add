import numpy as np
import pytest
from filelock import FileLock

from scantly.errors import RunError
from scantly.settings import merge
from scantly.training.checkpoint import load_checkpoint
from scantly.training.logs import RunLog
from scantly.training.resolve import resolve
from scantly.training.run import Run
from scantly.training.train import train, train_config


@pytest.fixture
def config(cohort, tiny, tmp_path):
    return resolve(cohort, flags={"method": "supervised", "labeled": 2, "store": str(tmp_path / "store")}, sets=tiny)


def test_a_run_of_another_configuration_is_refused_with_the_difference(config, cohort, tiny, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    other = resolve(
        cohort,
        flags={"method": "supervised", "labeled": 2, "store": str(tmp_path / "store")},
        sets=merge(tiny, {"training": {"lr": 0.5}}),
    )
    with pytest.raises(RunError, match=r"(?s)another configuration.*training\.lr: 0\.01 -> 0\.5"):
        train_config(other, run.folder, quiet=True, resume=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before


def test_what_does_not_change_the_result_may_differ(config, cohort, tiny, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True)
    other = resolve(
        cohort,
        flags={"method": "supervised", "labeled": 2, "workers": 2, "store": str(tmp_path / "elsewhere")},
        sets=tiny,
    )
    assert train_config(other, run.folder, quiet=True).finished


def test_a_run_of_before_published_lengths_is_taken_up(config, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True)
    path = run.folder / "config.yaml"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    older = [line for line in lines if "published_steps" not in line]
    assert len(older) == len(lines) - 1
    path.write_text("".join(older), encoding="utf-8")
    assert Run.open(run.folder).settings.training.published_steps is None
    published = config.training.model_copy(update={"published_steps": 100})
    again = config.model_copy(update={"training": published})
    assert train_config(again, run.folder, quiet=True).finished


def test_a_folder_with_something_else_in_it_is_refused_untouched(config, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("years of work")
    with pytest.raises(RunError, match="not empty"):
        train_config(config, out, quiet=True)
    assert (out / "chapter1.txt").read_text(encoding="utf-8") == "years of work"


def test_a_folder_that_was_only_claimed_may_be_claimed_anew(config, cohort, tiny, tmp_path):
    """A bad scan ends a run before anything is trained; mending the split must not cost the folder's name."""
    run = Run(tmp_path / "run")
    with run.locked():
        run.claim(config, {"threads": 1}, resume=False)
    other = resolve(cohort, flags={"method": "supervised", "labeled": 3, "store": str(tmp_path / "store")}, sets=tiny)
    finished = train_config(other, run.folder, quiet=True)
    assert finished.config["data"]["labeled"] == 3
    assert finished.environment["threads"] >= 1


def test_an_unfinished_run_needs_resume(config, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True)
    run.model_path.unlink()
    with pytest.raises(RunError, match="--resume"):
        train_config(config, run.folder, quiet=True)
    assert train_config(config, run.folder, quiet=True, resume=True).finished


def test_two_runs_in_one_folder(config, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(RunError, match="another process is training"):
        train_config(config, out, quiet=True)


def test_the_run_folder_holds_what_the_design_lists(config, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True).evaluate("test")
    for name in (
        "config.yaml",
        "environment.json",
        "log/metrics.csv",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model.safetensors",
        "evaluation/test.csv",
        "evaluation/test.json",
    ):
        assert (run.folder / name).is_file(), name
    assert list((run.folder / "log" / "tensorboard").iterdir())
    assert sorted(p.name for p in run.predictions("test").iterdir()) == [
        f"{name}.nii.gz" for name in sorted(run.split.test)
    ]
    assert run.settings == config
    assert run.environment["threads"] >= 1
    log = run.log()
    names = set(log["name"])
    assert {"loss/supervised", "lr/main", "val/dice", "time/data_wait", "time/seconds_per_iteration"} <= names
    assert not list(run.folder.rglob(".tmp-*"))


def test_the_timing_of_a_run_weighs_each_line_of_the_log_by_its_iterations(tmp_path):
    (tmp_path / "log").mkdir()
    lines = ["iteration,stage,name,value"]
    for iteration, seconds, wait in ((10, 1.0, 0.5), (12, 4.0, 0.0)):  # 10 s, half of it waiting; 8 s without
        lines += [
            f"{iteration},train,time/seconds_per_iteration,{seconds}",
            f"{iteration},train,time/data_wait,{wait}",
        ]
    lines.insert(3, "11,train,val/dice,0.5")
    (tmp_path / "log" / "metrics.csv").write_text("\n".join(lines) + "\n")
    assert Run(tmp_path).timing() == pytest.approx((18 / 12, 5 / 18))


def test_cases_that_chose_the_checkpoint_are_not_reported_on(config, tmp_path):
    run = train_config(config, tmp_path / "run", quiet=True)
    assert config.evaluation.selection == "best"
    with pytest.raises(RunError, match="chosen on its val cases"):
        run.evaluate("val")


def test_the_best_iteration_is_the_model_where_the_protocol_selects_it(config, tmp_path):
    from safetensors.torch import load_file

    from scantly.training.checkpoint import load_checkpoint

    run = train_config(config, tmp_path / "run", quiet=True)
    best = load_checkpoint(run.best_checkpoint)
    log = run.log()
    scores = log[log["name"] == "val/dice"].set_index("iteration")["value"]
    assert best["iteration"] == scores.idxmax()
    assert best["dice"] == pytest.approx(scores.max())
    for name, value in load_file(run.model_path).items():
        assert (value == best["predictor"][name]).all()


def test_validation_cases_without_any_structure_choose_some_iteration(cohort, tiny, tmp_path, monkeypatch):
    """Neither labels nor predictions hold a class: no Dice is defined, and the run must still end with a model."""
    monkeypatch.setattr("scantly.training.validation.dice_per_class", lambda *_, **__: np.full(3, np.nan))
    config = resolve(cohort, flags={"method": "supervised", "labeled": 2, "store": str(tmp_path / "store")}, sets=tiny)
    assert config.evaluation.selection == "best"
    run = train_config(config, tmp_path / "run", quiet=True)
    assert run.finished
    log = run.log()
    assert log.loc[log["name"] == "val/dice", "value"].isna().all()


def test_validation_does_not_change_the_training(cohort, tiny, tmp_path):
    weights = []
    for every in (2, 12):
        sets = merge(
            tiny,
            {
                "training": {"validate_every": every},
                "evaluation": {"selection": "last"},
                "data": {"store": str(tmp_path)},
            },
        )
        config = resolve(cohort, flags={"method": "mean_teacher", "labeled": 2}, sets=sets)
        weights.append(train_config(config, tmp_path / f"run{every}", quiet=True).model_path.read_bytes())
    assert weights[0] == weights[1]


def test_poisoned_labels_of_unlabeled_cases_change_nothing(cohort, tiny, tmp_path):
    """The labels of the unlabeled pool are replaced by nonsense: the weights must not know."""
    import shutil

    import nibabel as nib
    import numpy as np

    weights = []
    for name in ("clean", "poisoned"):
        root = tmp_path / name / "cohort"
        shutil.copytree(cohort, root)
        sets = merge(tiny, {"data": {"store": str(tmp_path / name)}, "evaluation": {"selection": "last"}})
        config = resolve(root, flags={"method": "mean_teacher", "labeled": 2}, sets=sets)
        if name == "poisoned":
            for case in config.split["unlabeled"]:
                path = root / "labelsTr" / f"{case}.nii.gz"
                image = nib.load(path)
                nib.save(nib.Nifti1Image(np.full(image.shape, 3, np.uint8), image.affine, image.header), path)
        weights.append(train_config(config, tmp_path / name / "run", quiet=True).model_path.read_bytes())
    assert weights[0] == weights[1]


def test_the_python_api_trains_in_one_call(cohort, tiny, tmp_path):
    sets = {"plan": tiny["plan"], "network": tiny["network"], "data": {"store": str(tmp_path / "s")}}
    run = train(cohort, method="supervised", labeled=2, out=tmp_path / "run", steps=2, seed=5, settings=sets)
    assert (run.config["training"]["steps"], run.config["training"]["seed"]) == (2, 5)


def test_not_a_run(tmp_path):
    with pytest.raises(RunError, match=r"no config\.yaml"):
        Run.open(tmp_path)


def test_the_log_is_cut_back_to_the_checkpoint_and_a_torn_last_line_dropped(tmp_path):
    log = RunLog(tmp_path, resume_at=0)
    for iteration in (1, 2, 3):
        log.write(iteration, "train", {"loss/a": 0.5})
    log.close()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text(encoding="utf-8") + "4,tra")
    RunLog(tmp_path, resume_at=2).close()
    assert path.read_text(encoding="utf-8").splitlines() == [
        "iteration,stage,name,value",
        "1,train,loss/a,0.5",
        "2,train,loss/a,0.5",
    ]


@pytest.mark.parametrize(("every", "kept"), [(1, True), (12, False)])
def test_a_checkpoint_is_spoken_of_only_where_there_is_one(config, tmp_path, monkeypatch, every, kept):
    training = config.training.model_copy(update={"checkpoint_every": every})
    steps = []

    def losses(self, batch, progress):
        steps.append(progress.iteration)
        return {"supervised": self.predictor(batch.labeled).sum() * (float("nan") if len(steps) == 3 else 0.0)}

    monkeypatch.setattr("scantly.methods.supervised.Supervised.losses", losses)
    with pytest.raises(RunError, match=r"loss/supervised is nan at iteration 3; lower training\.lr") as caught:
        train_config(config.model_copy(update={"training": training}), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() == kept
    assert ("The last checkpoint is kept." in str(caught.value)) == kept


def test_a_checkpoint_that_is_gone_is_called_missing(tmp_path):
    with pytest.raises(RunError, match=r"best\.ckpt is missing; restore it, or train the run again with another --out"):
        load_checkpoint(tmp_path / "best.ckpt")
