"""A run that is killed with SIGKILL anywhere and resumed ends with the weights of an undisturbed one."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.fabric import Fabric

from scantly import imaging
from scantly.data.batches import BatchSource
from scantly.data.dataset import Dataset
from scantly.data.pseudo_labels import PseudoLabels
from scantly.errors import DatasetError, DeviceError, RunError
from scantly.methods.base import Method, MethodConfig, Rows, Stage
from scantly.settings import merge
from scantly.training import checkpoint, engine
from scantly.training import train as train_module
from scantly.training.checkpoint import load_checkpoint
from scantly.training.resolve import resolve
from scantly.training.run import Run
from scantly.training.train import build_method, train_config

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scantly.training.train"])


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train(config: Any, out: Path, kill_at: int | None, kill_in_save: int | None) -> None:
    """Runs in a child process; kills itself before an iteration, or half-way through writing a checkpoint."""
    torch.set_num_threads(1)
    step, save = engine.Engine._step, torch.save
    saves = 0

    def stepping(self: Any, *args: Any) -> Any:
        if self.iteration == kill_at:
            _kill()
        return step(self, *args)

    def saving(state: Any, path: Path) -> None:
        nonlocal saves
        saves += "method" in state
        save(state, path)
        if saves == kill_in_save:
            Path(path).write_bytes(Path(path).read_bytes()[:1000])
            _kill()

    engine.Engine._step = stepping  # type: ignore[method-assign]
    checkpoint.torch.save = saving  # type: ignore[assignment]
    train_config(config, out, resume=True, quiet=True)


def run_process(config: Any, out: Path, *, kill_at: int | None = None, kill_in_save: int | None = None) -> int:
    process = PROCESSES.Process(target=_train, args=(config, out, kill_at, kill_in_save))
    process.start()
    process.join(180)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode


#: Volumes by the V-Net: patches smaller than the cases, and dropout of whole channels.
VOLUMES: dict[str, Any] = {
    "plan": {"spatial_dims": 3, "spacing": [10, 5, 5], "size": None, "patch_size": [16, 16, 16]},
    "network": {"name": "vnet", "arguments": {"widths": [4, 8], "blocks": [1, 1], "dropout": 0.5}},
}


#: Methods in several stages: settings that save time, and the borders of their stages in 12 iterations.
STAGED: dict[str, tuple[dict[str, Any], list[int]]] = {
    "arco": ({"dense_channels": 8, "anchors": 16, "negatives_per_anchor": 8}, [6]),
    "plgcl": ({"patch_budget": 8}, [4]),
    "lclpl": ({"seg_rows": 4, "pairs": 4}, [3, 6, 9]),
}


def configuration(cohort: Path, tiny: dict[str, Any], method: str, workers: int, store: Path) -> Any:
    return resolve(
        cohort,
        flags={"method": method, "labeled": 2, "workers": workers, "store": str(store)},
        sets=merge(tiny, {"training": {"seed": 3}}),
    )


@pytest.mark.parametrize(
    ("method", "dims", "workers"),
    [
        *itertools.product(["supervised", "mean_teacher"], (2, 3), (0, 2)),
        *itertools.product(["gapmatch", "diffcl"], (2,), (0,)),
        *itertools.product(["gapmatch", "diffcl"], (3,), (2,)),
    ],
)
def test_killed_anywhere_and_resumed_is_bit_identical(cohort, tiny, tmp_path, method, dims, workers):
    store = tmp_path / "store"
    if dims == 3:
        tiny = merge(tiny, VOLUMES)
    config = configuration(cohort, tiny, method, workers, store)
    undisturbed = tmp_path / "undisturbed"
    assert run_process(config, undisturbed) == 0

    rng = random.Random(f"{method}{workers}")
    out = tmp_path / "killed"
    # before the first checkpoint (after 3), at random, while the second new one is written, at random again
    for kill in (
        {"kill_at": rng.choice([0, 1, 2])},
        {"kill_at": rng.choice([4, 5])},
        {"kill_in_save": 2},
        {"kill_at": rng.choice([7, 8, 10, 11])},
    ):
        assert run_process(config, out, **kill) == -signal.SIGKILL
        assert not Run.open(out).finished
    assert run_process(config, out) == 0

    assert_same(out, undisturbed)


@pytest.mark.parametrize(("dims", "workers"), [(2, 0), (3, 2)], ids=str)
@pytest.mark.parametrize("method", STAGED)
def test_killed_inside_stages_and_exactly_at_their_borders(cohort, tiny, tmp_path, method, dims, workers):
    settings, borders = STAGED[method]
    if dims == 3:
        tiny = merge(tiny, VOLUMES)
    sets = merge(tiny, {"method": settings, "evaluation": {"selection": "best"}, "training": {"checkpoint_every": 5}})
    config = configuration(cohort, sets, method, workers, tmp_path / "store")
    undisturbed = tmp_path / "undisturbed"
    assert run_process(config, undisturbed) == 0
    out = tmp_path / "killed"
    for kill_at in (2, *sorted({*borders, *(border + 1 for border in borders)}), 11):
        assert run_process(config, out, kill_at=kill_at) == -signal.SIGKILL
    assert run_process(config, out) == 0
    assert_same(out, undisturbed)
    stages = Run.open(undisturbed).log()["stage"].unique()
    assert len(stages) == len(borders) + 1


def assert_same(out: Path, undisturbed: Path) -> None:
    """Model, all of the last state, and log."""
    assert (out / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    ours, theirs = (load_checkpoint(folder / "checkpoints/last.ckpt") for folder in (out, undisturbed))
    for name, value in theirs["method"].items():
        assert torch.equal(ours["method"][name], value), name
    logs = [Run.open(folder).log() for folder in (out, undisturbed)]
    timeless = [log[~log["name"].str.startswith("time/")].reset_index(drop=True) for log in logs]
    pd.testing.assert_frame_equal(*timeless)


class TwoStages(Method):
    """A first stage on labels, then pseudo-labels with fresh optimizers, drawing from every generator."""

    def __init__(self, task: Any, config: MethodConfig) -> None:
        super().__init__(task, config)
        self.network = task.network()
        self.register_buffer("relabeled", torch.zeros(()))

    def stages(self) -> list[Stage]:
        return [
            Stage("labels", share=2, labeled=Rows(3), unlabeled=Rows(0)),
            Stage("more", share=1, restart_optimizers=False, labeled=Rows(classes=4)),
            Stage("pseudo", share=3, relabel=True),
        ]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        if first:
            torch.nn.init.normal_(self.network.head.bias)  # from the global generator, as new heads would be

    def losses(self, batch: Any, progress: Any) -> dict[str, torch.Tensor]:
        assert (progress.stage == "pseudo") == (batch.pseudo_labels is not None)
        assert len(batch.labeled) == (3 if progress.stage == "labels" else 2)
        logits = self.network(batch.labeled + torch.rand(1, generator=self.generator))
        terms = {"labeled": torch.nn.functional.cross_entropy(logits, batch.labels)}
        if batch.pseudo_labels is not None:
            self.relabeled += 1
            assert batch.pseudo_labels.shape == batch.unlabeled[:, 0].shape
            terms["pseudo"] = torch.nn.functional.cross_entropy(self.network(batch.unlabeled), batch.pseudo_labels)
        return terms

    @property
    def predictor(self) -> torch.nn.Module:
        return self.network


def stop_and_resume(config: Any, out: Path, stop: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train, stopped before an iteration without any farewell, then to the end."""
    original = engine.Engine._step

    def stepping(self: Any, *args: Any) -> Any:
        if self.iteration == stop:
            raise InterruptedError
        return original(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(engine.Engine, "_step", stepping)
        with pytest.raises(InterruptedError):
            train_config(config, out, quiet=True)
    train_config(config, out, resume=True, quiet=True)
    return out


def test_stages_share_the_budget_and_resume_at_their_borders(cohort, tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: TwoStages)
    config = configuration(cohort, merge(tiny, {"training": {"checkpoint_every": 1}}), "supervised", 0, tmp_path / "s")
    whole = train_config(config, tmp_path / "whole", quiet=True)
    log = whole.log()
    assert log.groupby("stage", sort=False)["iteration"].agg(["min", "max"]).to_numpy().tolist() == [
        [1, 4],
        [5, 6],
        [7, 12],
    ]
    for stop in (3, 4, 6, 9):  # inside a stage and exactly at each border
        out = stop_and_resume(config, tmp_path / f"stopped-{stop}", stop, monkeypatch)
        assert (out / "model.safetensors").read_bytes() == whole.model_path.read_bytes(), stop
    state = load_checkpoint(whole.last_checkpoint)
    assert state["method"]["relabeled"] == 6
    assert len(list((whole.folder / "pseudo_labels" / "2-pseudo").glob("*.b2nd"))) == len(config.split["unlabeled"])


class Rounds(Method):
    """A baseline, then two rounds of self-training that begin with the best validation and a second labeled group."""

    def __init__(self, task: Any, config: MethodConfig) -> None:
        super().__init__(task, config)
        self.network = task.network()
        self.register_buffer("began", torch.zeros(3, task.num_classes))

    def stages(self) -> list[Stage]:
        rows = {"labeled": Rows(2, classes=3), "unlabeled": Rows(3, classes=2), "extra": Rows(1, classes=4)}
        return [
            Stage("baseline", unlabeled=Rows(0)),
            Stage("round1", from_best=True, relabel=True, **rows),
            Stage("round2", from_best=True, relabel=True, restart_optimizers=False, **rows),
        ]

    def enter_stage(self, stage: Stage, *, first: bool) -> None:
        if first:
            self.began[[s.name for s in self.stages()].index(stage.name)] = self.network.head.bias.detach()

    def pseudo_labels(self, probs: torch.Tensor) -> torch.Tensor:
        labels = probs.argmax(0)
        labels[:, :2, :2] = 3  # a mark that only this method makes
        return labels

    def losses(self, batch: Any, progress: Any) -> dict[str, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(self.network(batch.labeled), batch.labels)
        if progress.stage == "baseline":
            assert batch.extra is None
            return {"labeled": loss}
        assert batch.extra.shape == (1, *batch.labeled.shape[1:])
        assert len(batch.extra_labels.unique()) >= 3
        assert len(batch.unlabeled) == 3
        assert (batch.pseudo_labels_raw[:, :2, :2] == 3).all()
        extra = torch.nn.functional.cross_entropy(self.network(batch.extra), batch.extra_labels)
        pseudo = torch.nn.functional.cross_entropy(self.network(batch.unlabeled), batch.pseudo_labels)
        return {"labeled": loss, "extra": extra, "pseudo": pseudo}

    @property
    def predictor(self) -> torch.nn.Module:
        return self.network


def test_stages_begin_with_the_best_validation_wherever_the_run_was_killed(cohort, tiny, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    validated = []

    def validate(network: Any, *args: Any, **options: Any) -> dict[str, float]:
        """A score that jumps about, and depends on the weights alone."""
        bias = network.head.bias.detach().clone()
        validated.append((float(bias.sum() * 1e4 % 1), bias))
        return {"val/dice": validated[-1][0]}

    monkeypatch.setattr(engine, "validate", validate)
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: Rounds)
    rare = {"training": {"checkpoint_every": 100, "validate_every": 1}, "evaluation": {"selection": "best"}}
    config = configuration(cohort, merge(tiny, rare), "supervised", 0, tmp_path / "s")
    whole = train_config(config, tmp_path / "whole", quiet=True)
    began = load_checkpoint(whole.last_checkpoint)["method"]["began"]
    assert len(validated) == 12
    best = [max(validated[:4]), max(validated[4:8]), max(validated[4:])]
    assert any(score > validated[i][0] for score, i in ((best[0][0], 3), (best[1][0], 7)))  # not merely the last
    assert torch.equal(began[1], best[0][1])
    assert torch.equal(began[2], best[1][1])
    final = load_checkpoint(whole.best_checkpoint)["predictor"]["head.bias"]
    assert torch.equal(final, best[2][1])  # of the rounds alone, which share their optimizers

    for stop in range(1, 12):
        out = stop_and_resume(config, tmp_path / f"stopped-{stop}", stop, monkeypatch)
        assert (out / "model.safetensors").read_bytes() == whole.model_path.read_bytes(), stop


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_run_stopped_while_it_relabels_begins_the_stage_again(cohort, tiny, tmp_path, monkeypatch, number):
    torch.set_num_threads(1)
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: Rounds)
    rare = {"training": {"checkpoint_every": 100, "validate_every": 2}, "evaluation": {"selection": "best"}}
    config = configuration(cohort, merge(tiny, rare), "supervised", 0, tmp_path / "s")
    whole = train_config(config, tmp_path / "whole", quiet=True)
    assert len(config.split["unlabeled"]) == 3  # so the rounds relabel with writes 1 to 3 and 4 to 6
    write, written = PseudoLabels.write, []

    def writing(self: Any, case: str, array: Any) -> None:
        written.append(case)
        if len(written) == number:
            raise InterruptedError
        write(self, case, array)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        patched.setattr(PseudoLabels, "write", writing)
        with pytest.raises(InterruptedError):
            train_config(config, out, quiet=True)
    train_config(config, out, resume=True, quiet=True)
    assert (out / "model.safetensors").read_bytes() == whole.model_path.read_bytes()


def test_without_its_last_checkpoint_a_run_begins_anew(cohort, tiny, tmp_path, monkeypatch):
    """Left-over files of the life before must not decide what a stage begins with."""
    torch.set_num_threads(1)
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: Rounds)
    sets = merge(tiny, {"evaluation": {"selection": "best"}})
    config = configuration(cohort, sets, "supervised", 0, tmp_path / "s")
    run = train_config(config, tmp_path / "run", quiet=True)
    model = run.model_path.read_bytes()
    run.model_path.unlink()
    run.last_checkpoint.unlink()
    for path in run.last_checkpoint.parent.glob("stage-*.ckpt"):
        state = load_checkpoint(path)
        state["method"]["network.head.bias"] += 1
        checkpoint.save_checkpoint(path, state)
    train_config(config, run.folder, resume=True, quiet=True)
    assert run.model_path.read_bytes() == model


def test_a_run_judged_by_its_last_iteration_never_goes_back(cohort, tiny, tmp_path, monkeypatch):
    """Its validation cases are reported on, so they must not choose what later stages begin with."""
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: Rounds)
    config = configuration(cohort, merge(tiny, {"evaluation": {"selection": "last"}}), "supervised", 0, tmp_path / "s")
    weights = []
    enter = Rounds.enter_stage

    def entering(self: Any, stage: Stage, *, first: bool) -> None:
        weights.append(self.network.head.bias.detach().clone())
        enter(self, stage, first=first)

    monkeypatch.setattr(Rounds, "enter_stage", entering)
    step, after = engine.Engine._step, []

    def stepping(self: Any, *args: Any) -> Any:
        terms = step(self, *args)
        after.append(self.method.network.head.bias.detach().clone())
        return terms

    monkeypatch.setattr(engine.Engine, "_step", stepping)
    run = train_config(config, tmp_path / "run", quiet=True)
    assert torch.equal(weights[1], after[3])
    assert torch.equal(weights[2], after[7])
    assert not list((run.folder / "checkpoints").glob("stage-*"))


def test_pseudo_labels_can_be_looked_at_on_the_scans_own_grid(cohort, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: Rounds)
    config = configuration(cohort, merge(tiny, {"plan": {"size": [16, 16]}}), "supervised", 0, tmp_path / "s")
    run = train_config(config, tmp_path / "run", quiet=True)
    dataset = Dataset.open(cohort)
    for folder in ("1-round1", "2-round2"):
        for case in config.split["unlabeled"]:
            label = imaging.read_label(run.folder / "pseudo_labels" / folder / f"{case}.nii.gz")
            image = dataset.read_image(case)
            assert label.array.shape == image.array.shape[1:]
            np.testing.assert_allclose(label.geometry.affine, image.geometry.affine, atol=1e-4)
            assert (label.array[:, :4, :4] == 3).all()


def test_doubtful_voxels_have_no_label_in_self_training_and_a_resumed_round_is_the_same(
    cohort, tiny, tmp_path, monkeypatch
):
    torch.set_num_threads(1)
    with_rounds = merge(
        tiny, {"training": {"checkpoint_every": 1}, "method": {"form": "rounds", "rounds_threshold": 0.268}}
    )
    config = configuration(cohort, with_rounds, "pseudo_label", 0, tmp_path / "s")
    whole = train_config(config, tmp_path / "whole", quiet=True)
    folder, shares = whole.folder / "pseudo_labels" / "1-round1", []
    for case in config.split["unlabeled"]:
        stored = PseudoLabels.open(folder).read(case, (slice(None),) * 3)
        shown = imaging.read_label(folder / f"{case}.nii.gz").array
        assert set(np.unique(shown)) <= {-1, 0, 1, 2, 3}
        shares.append((stored == -1).mean())
    assert 0 < np.mean(shares) < 1
    log = whole.log()
    assert log.loc[log["name"] == "method/confident", "value"].between(0, 1, inclusive="neither").any()
    out = stop_and_resume(config, tmp_path / "stopped", 9, monkeypatch)
    assert (out / "model.safetensors").read_bytes() == whole.model_path.read_bytes()


def test_learning_rate_schedule_runs_anew_only_where_the_stage_says_so(cohort, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("scantly.methods.catalogue.load", lambda name: TwoStages)
    config = configuration(cohort, tiny, "supervised", 0, tmp_path / "s")
    log = train_config(config, tmp_path / "run", quiet=True).log()
    rates = log[log["name"] == "lr/main"].set_index("iteration")["value"]
    # the stage "more" (iterations 4 and 5) keeps the optimizers of "labels" (0 to 3): one schedule over six
    assert rates[1] == rates[7] == pytest.approx(0.01)
    assert rates[5] == pytest.approx(0.01 * (1 - 3 / 6) ** 0.9)
    assert rates[6] == pytest.approx(0.01 * (1 - 4 / 6) ** 0.9)


def test_the_best_weights_keep_the_score_that_is_theirs(cohort, tiny, tmp_path):
    """A run killed between a better validation and the next checkpoint must not pair its weights with an old score."""
    config = configuration(cohort, tiny, "supervised", 0, tmp_path / "s")
    run = train_config(config, tmp_path / "run", quiet=True)
    run.model_path.unlink()
    later = {**load_checkpoint(run.best_checkpoint), "iteration": 12, "dice": 0.99}
    checkpoint.save_checkpoint(run.best_checkpoint, later)
    method = build_method(config)
    fabric = Fabric(accelerator="cpu", devices=1)
    store = train_module.prepare_store(config, quiet=True)
    resumed = engine.Engine(run, config, method, dataset=Dataset.open(cohort), store=store, fabric=fabric, quiet=True)
    resumed.fit()
    assert (resumed.best.value, resumed.best.iteration) == (0.99, 12)


def test_damaged_data_end_the_run_with_what_was_trained_saved(cohort, tiny, tmp_path, monkeypatch):
    config = configuration(cohort, merge(tiny, {"training": {"checkpoint_every": 12}}), "supervised", 0, tmp_path / "s")
    whole = train_config(config, tmp_path / "whole", quiet=True)
    original = BatchSource.__getitem__

    def damaged(self: Any, iteration: int) -> Any:
        if iteration == 7:
            raise DatasetError("a.b2nd is damaged.")
        return original(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(BatchSource, "__getitem__", damaged)
        with pytest.raises(DatasetError, match="is damaged"):
            train_config(config, tmp_path / "run", quiet=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["iteration"] == 7
    resumed = train_config(config, tmp_path / "run", resume=True, quiet=True)
    assert resumed.model_path.read_bytes() == whole.model_path.read_bytes()


def test_running_out_of_memory_on_the_cpu_is_told_with_the_cure(cohort, tiny, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes.")

    config = configuration(cohort, tiny, "supervised", 0, tmp_path / "s")
    for owner, place in ((engine, "make_batch"), (engine.Engine, "_autocast")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, full)
            with pytest.raises(DeviceError, match=r"too little memory for 2 \+ 0 rows .*--size"):
                train_config(config, tmp_path / place, quiet=True)


def test_a_checkpoint_of_another_kind_of_device_is_refused():
    state = checkpoint.capture_rng(torch.Generator())
    state["method"] = state["method"][:16]  # the size of a GPU generator's state
    with pytest.raises(RunError, match="another kind of device"):
        checkpoint.restore_rng(torch.Generator(), state)


def test_a_finished_run_is_not_trained_again(cohort, tiny, tmp_path, monkeypatch):
    config = configuration(cohort, tiny, "supervised", 0, tmp_path / "s")
    run = train_config(config, tmp_path / "run", quiet=True)
    before = run.model_path.stat().st_mtime_ns
    monkeypatch.setattr(engine.Engine, "fit", lambda self: pytest.fail("trained again"))
    assert train_config(config, tmp_path / "run", quiet=True).model_path.stat().st_mtime_ns == before


def test_the_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(cohort, tiny, tmp_path):
    config = configuration(cohort, merge(tiny, {"training": {"lr": 1e9}}), "supervised", 0, tmp_path / "s")
    with pytest.raises(RunError, match=r"lower training\.lr"):
        train_config(config, tmp_path / "run", quiet=True)


def test_a_damaged_checkpoint_is_told(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(RunError, match=r"last\.ckpt cannot be read"):
        load_checkpoint(path)
