"""The one training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from scantly.data.batches import RawBatch
from scantly.data.dataset import Dataset
from scantly.data.loader import make_loader
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.store import Store
from scantly.errors import DeviceError, RunError, ScantlyError
from scantly.inference.memory import is_out_of_memory
from scantly.inference.model import save_model
from scantly.methods.base import Method, Progress
from scantly.ranks import any_rank, mean_over_ranks
from scantly.training.checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint
from scantly.training.config import RunConfig
from scantly.training.feed import batch_source, make_batch
from scantly.training.interruption import Interruption
from scantly.training.logs import RunLog
from scantly.training.optimizers import TrainingHandles
from scantly.training.progress import ProgressLine
from scantly.training.run import Run
from scantly.training.stages import StageSpan, pseudo_label_folder, relabel, stage_spans
from scantly.training.validation import validate

__all__ = ["Engine", "RunInterruptedError"]

_LOGGER = logging.getLogger("scantly")


class RunInterruptedError(RunError):
    """The user asked to stop; a checkpoint was written."""


@dataclass
class _Best:
    """The best validation so far."""

    value: float = -1.0
    iteration: int = 0


@dataclass
class _Loop:
    """What the loop of one stage works with; the clock runs since the last line of the log."""

    span: StageSpan
    handles: TrainingHandles
    log: RunLog | None
    line: ProgressLine
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: int = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training."""
        begun = time.monotonic()
        yield
        self.started += time.monotonic() - begun


class Engine:
    """Train one method into one run folder.

    Args:
        run: The claimed run folder.
        config: Its configuration.
        method: The method, on the device.
        dataset: The dataset folder.
        store: Prepared cases.
        fabric: Devices and precision.
        quiet: Show no progress.
    """

    def __init__(
        self,
        run: Run,
        config: RunConfig,
        method: Method,
        *,
        dataset: Dataset,
        store: Store,
        fabric: Fabric,
        quiet: bool = False,
    ) -> None:
        self.run, self.config, self.method = run, config, method
        self.dataset, self.store, self.fabric, self.quiet = dataset, store, fabric, quiet
        self.split = run.split
        self.selects_best = config.evaluation.selection == "best"
        self.spans = stage_spans(method.stages(), config.training.steps)
        self.iteration = 0
        self.best = _Best()
        self._interruption = Interruption()
        method.generator = torch.Generator(device=fabric.device)
        method.generator.manual_seed(config.training.seed + fabric.global_rank)

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, to the end; then write the model.

        Raises:
            RunInterruptedError: after Ctrl-C or SIGTERM, with a checkpoint written.
            RunError: if the loss is not finite, or a checkpoint cannot be written or read.
        """
        state = self._load()
        self.method.train()
        log = RunLog(self.run.folder / "log", resume_at=self.iteration) if self.fabric.is_global_zero else None
        title = self.spans[0].stage.name
        try:
            with (
                ProgressLine(title, self.config.training.steps, quiet=self.quiet or log is None) as line,
                self._interruption.watched(),
            ):
                for span in self.spans:
                    if self.iteration < span.stop:
                        self._run_stage(span, state, log, line)
                        state = None
            self._finish()
        finally:
            if log is not None:
                log.close()

    def _run_stage(self, span: StageSpan, state: dict[str, Any] | None, log: RunLog | None, line: ProgressLine) -> None:
        begins = self.iteration == span.start
        if state is not None:
            restore_rng(self.method.generator, state["generators"])
        if begins and span.stage.from_best and self.selects_best:
            self._go_back_to_best(span)
        if begins and span.start == span.schedule[0]:
            self.best = _Best()
        if begins and len(self.spans) > 1:
            number, count = self.spans.index(span) + 1, len(self.spans)
            _LOGGER.info("stage '%s' (%d of %d), to iteration %d", span.stage.name, number, count, span.stop)
        pseudo_labels = self._pseudo_labels(span, begins=begins)
        self.method.enter_stage(span.stage, first=begins)
        first, after = span.schedule
        handles = TrainingHandles(self.method, span.stage, self.config.training, after - first)
        if not begins and state is not None:
            handles.load_state_dict(state["optimizers"])
        elif begins and not span.stage.restart_optimizers and self._previous_optimizers is not None:
            handles.load_state_dict(self._previous_optimizers)
        batches = self._loader(span, pseudo_labels)
        loop = _Loop(span, handles, log, line)
        while self.iteration < span.stop:
            asked = time.monotonic()
            raw = self._next(batches, loop)
            loop.waited += time.monotonic() - asked
            handles.set_iteration(self.iteration - first)
            terms = self._step(raw, span, handles)
            self.iteration += 1
            loop.steps += 1
            self._after_step(loop, terms)
        self._previous_optimizers = handles.state_dict()

    _previous_optimizers: dict[str, Any] | None = None

    def _next(self, batches: Iterator[RawBatch], loop: _Loop) -> RawBatch:
        """The next batch; if its files are damaged, what was trained so far is saved first.

        Not so on several ranks: a checkpoint takes all of them, and the others are in the next iteration already.
        """
        try:
            return next(batches)
        except ScantlyError:
            if self.iteration > loop.span.start and self.fabric.world_size == 1:
                self._save(loop)
            raise

    def _step(self, raw: RawBatch, span: StageSpan, handles: TrainingHandles) -> dict[str, Tensor]:
        progress = Progress(
            iteration=self.iteration - span.start,
            total=span.length,
            stage=span.stage.name,
            run_iteration=self.iteration,
            run_total=self.config.training.steps,
        )
        try:
            batch = make_batch(
                raw,
                self.config.data.augmentation,
                self.method.generator,
                channels_last=self.config.training.channels_last,
            )
            with self._autocast():
                terms = self.method.step(batch, progress, handles)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceError(
                f"{self.fabric.device} has too little memory for {len(raw.labeled)} + {len(raw.unlabeled)} rows of "
                f"{self.config.plan.patch_size}; lower plan.labeled_batch_size and plan.unlabeled_batch_size, choose a "
                "smaller --size, or use --precision bf16."
            ) from error
        self.method.after_step(progress)
        return terms

    def _autocast(self) -> torch.autocast:
        """Mixed precision for forward passes.

        Without autocast's cache of cast weights: it would hand a gradient pass the weights that an earlier
        pass without gradient cast, which cuts them off, and go stale when a step updates weights twice.
        """
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.fabric.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)

    def _loader(self, span: StageSpan, pseudo_labels: PseudoLabels | None) -> Iterator[RawBatch]:
        source = batch_source(
            self.store,
            self.split,
            self.config.plan,
            span.stage,
            seed=self.config.training.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            pseudo_labels=pseudo_labels,
        )
        workers = self.config.data.workers
        return make_loader(source, self.iteration, span.stop, workers, self.fabric.device.type == "cuda")

    def _pseudo_labels(self, span: StageSpan, *, begins: bool) -> PseudoLabels | None:
        """The pool's labels that hold in this stage: written now, or by the latest stage that relabeled."""
        index = self.spans.index(span)
        place = pseudo_label_folder(self.run.folder, self.spans, index)
        if place is None:
            return None
        folder, writer = place
        if begins and writer == index:
            _LOGGER.info("stage '%s': predicting %d unlabeled cases", span.stage.name, len(self.split.unlabeled))
            relabel(
                self.method,
                self.split.unlabeled,
                store=self.store,
                plan=self.config.plan,
                device=self.fabric.device,
                folder=folder,
                inference=self.config.evaluation.inference,
            )
        self.fabric.barrier()
        return PseudoLabels.open(folder)

    def _after_step(self, loop: _Loop, terms: dict[str, Tensor]) -> None:
        settings = self.config.training
        logged = self.method.pop_logged()
        last = self.iteration == settings.steps
        border = self.iteration == loop.span.stop
        (stops,) = any_rank(self._interruption.requested)
        saves = self.iteration % settings.checkpoint_interval == 0 or border or stops
        if saves or self.iteration % settings.log_every == 0:  # before saving: no checkpoint of a diverged state
            self._log(loop, terms, logged)
        validates = self.iteration % settings.validation_interval(self.config.plan.spatial_dims) == 0
        if self.split.val and (validates or last or (border and self._next_goes_back(loop.span))):
            with loop.paused():
                self._validate(loop)
        if saves:
            with loop.paused():
                self._save(loop)
        if stops and not last:
            raise RunInterruptedError(
                f"stopped after iteration {self.iteration} of {settings.steps}; a checkpoint was written, continue "
                "with --resume."
            )

    def _log(self, loop: _Loop, terms: dict[str, Tensor], logged: dict[str, Tensor]) -> None:
        """One synchronization for all scalars, which are the ranks' means; refuses a loss that is not finite."""
        names = [*(f"loss/{name}" for name in terms), *(f"method/{name}" for name in logged)]
        tensors = [value.detach().float().to(self.fabric.device) for value in (*terms.values(), *logged.values())]
        values = dict(zip(names, mean_over_ranks(torch.stack(tensors)).cpu().tolist(), strict=True))
        for name, value in values.items():
            if name.startswith("loss/") and not math.isfinite(value):
                raise self._diverged(f"{name} is {value} at iteration {self.iteration}")
        note = ", ".join(f"{name[5:]} {value:.3g}" for name, value in values.items() if name.startswith("loss/"))
        elapsed = max(time.monotonic() - loop.started, 1e-9)
        wait = loop.waited / elapsed
        rates = loop.handles.rates()
        values |= {f"lr/{name}": rate for name, rate in rates.items()}
        values |= {"time/seconds_per_iteration": elapsed / max(loop.steps, 1), "time/data_wait": wait}
        loop.started, loop.waited, loop.steps = time.monotonic(), 0.0, 0
        if loop.log is not None:
            loop.log.write(self.iteration, loop.span.stage.name, values)
        note += f", lr {next(iter(rates.values())):.2g}, data wait {wait:.1%}"
        loop.line.update(self.iteration, title=loop.span.stage.name, note=note)

    def _validate(self, loop: _Loop) -> None:
        values = validate(
            self.method.predictor,
            self.split.val,
            dataset=self.dataset,
            store=self.store,
            plan=self.config.plan,
            device=self.fabric.device,
            autocast=self._autocast(),
            inference=self.config.evaluation.inference,
            convention=self.config.evaluation.protocol,
        )
        if loop.log is not None:
            loop.log.write(self.iteration, loop.span.stage.name, values)
        score = values["val/dice"]
        loop.line.update(self.iteration, note=f"validation Dice {score:.4f}", force=True)
        if score > self.best.value or self.best.iteration == 0:
            self.best = _Best(-1.0 if math.isnan(score) else score, self.iteration)
            if not self.fabric.is_global_zero:
                return
            state = self._state(loop) if self.selects_best and self._goes_back else {"iteration": self.iteration}
            weights = self.method.predictor.state_dict()
            save_checkpoint(self.run.best_checkpoint, {**state, "dice": self.best.value, "predictor": weights})

    @property
    def _goes_back(self) -> bool:
        return any(span.stage.from_best for span in self.spans)

    def _next_goes_back(self, span: StageSpan) -> bool:
        following = self.spans[self.spans.index(span) + 1 :]
        return bool(following) and following[0].stage.from_best and self.selects_best

    def _go_back_to_best(self, span: StageSpan) -> None:
        """Continue from the best validation so far.

        It is kept in a file of its own: a kill inside the stage may come after a better validation there, and the
        stage must begin again with what it began with.
        """
        path = self.run.stage_checkpoint(self.spans.index(span))
        if not path.is_file() and self.fabric.is_global_zero:
            save_checkpoint(path, load_checkpoint(self.run.best_checkpoint))
        self.fabric.barrier()
        state = load_checkpoint(path, self.fabric.device)
        self.method.load_state_dict(state["method"], strict=True)
        self._previous_optimizers = state["optimizers"]
        _LOGGER.info("stage '%s' begins from iteration %d, the best validation", span.stage.name, state["iteration"])

    def _save(self, loop: _Loop) -> None:
        generators = capture_rng(self.method.generator)
        weights = [value for value in self.method.state_dict().values() if value.is_floating_point()]
        if not bool(torch.stack([value.isfinite().all() for value in weights]).all()):
            raise self._diverged(f"the weights are not finite after iteration {self.iteration}")
        if loop.log is not None:
            loop.log.flush()
            save_checkpoint(self.run.last_checkpoint, {**self._state(loop), "generators": generators})

    def _diverged(self, what: str) -> RunError:
        """The error for a training that is no longer finite; it speaks of a checkpoint only where there is one."""
        kept = " The last checkpoint is kept." if self.run.last_checkpoint.is_file() else ""
        cure = "lower training.lr, set training.gradient_clip, or use --precision 32, with another --out"
        return RunError(f"{what}; {cure}.{kept}")

    def _state(self, loop: _Loop) -> dict[str, Any]:
        return {
            "iteration": self.iteration,
            "method": self.method.state_dict(),
            "optimizers": loop.handles.state_dict(),
        }

    def _load(self) -> dict[str, Any] | None:
        path = self.run.last_checkpoint
        if self.fabric.is_global_zero:
            self.run.clear_leftovers()
        self.fabric.barrier()
        if not path.is_file():
            return None
        state = load_checkpoint(path, self.fabric.device)
        self.iteration = int(state["iteration"])
        if self.run.best_checkpoint.is_file():  # the score that belongs to the weights there, also if it is a later one
            best = load_checkpoint(self.run.best_checkpoint)
            first, after = next(span.schedule for span in self.spans if self.iteration <= span.stop)
            if first < best["iteration"] <= after:  # else that of other stages, which search for their own
                self.best = _Best(best["dice"], best["iteration"])
        self.method.load_state_dict(state["method"], strict=True)
        if self.iteration in {span.start for span in self.spans}:
            self._previous_optimizers = state["optimizers"]
        _LOGGER.info("resuming after iteration %d of %d", self.iteration, self.config.training.steps)
        return state

    def _finish(self) -> None:
        """Write the weights of the iteration that the protocol selects."""
        if not self.fabric.is_global_zero:
            return
        weights = self.method.predictor.state_dict()
        if self.config.evaluation.selection == "best":
            weights = load_checkpoint(self.run.best_checkpoint)["predictor"]
        save_model(
            self.run.model_path,
            weights,
            task=self.method.task,
            plan=self.config.plan,
            method=self.config.method_name,
            configuration=self.config.method_settings,
            inference=self.config.evaluation.inference,
        )
