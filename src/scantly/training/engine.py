"""The one training loop."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from scantly.data.batches import BatchSource, PseudoLabels, RawBatch, make_loader
from scantly.data.dataset import Dataset
from scantly.data.store import Store
from scantly.errors import RunError
from scantly.inference.model import save_model
from scantly.inference.windows import predict_array
from scantly.methods.base import Batch, Method, Progress, Stage
from scantly.training.checkpoint import capture_rng, load_checkpoint, restore_rng, save_checkpoint
from scantly.training.config import RunConfig
from scantly.training.logs import RunLog
from scantly.training.optimizers import TrainingHandles
from scantly.training.progress import ProgressLine
from scantly.training.run import Run
from scantly.training.validation import validate
from scantly.views import weak

__all__ = ["Engine", "Interrupted", "StageSpan", "stage_spans"]

_LOGGER = logging.getLogger("scantly")
_WHOLE = (slice(None), slice(None), slice(None))


class Interrupted(RunError):
    """The user asked to stop; a checkpoint was written."""


@dataclass(frozen=True)
class StageSpan:
    """A stage and the iterations of the run that are its own, ``start <= iteration < stop``."""

    stage: Stage
    start: int
    stop: int


def stage_spans(stages: list[Stage], steps: int) -> list[StageSpan]:
    """Divide the budget by the stages' shares; rounding goes by the cumulated shares, so all steps are used.

    Args:
        stages: In order.
        steps: Iterations of the run.

    Raises:
        RunError: if a stage would get no iteration.
    """
    total = sum(stage.share for stage in stages)
    borders = [round(steps * share / total) for share in itertools.accumulate(stage.share for stage in stages)]
    spans = [
        StageSpan(stage, start, stop) for stage, start, stop in zip(stages, [0, *borders[:-1]], borders, strict=True)
    ]
    for span in spans:
        if span.start >= span.stop:
            raise RunError(f"stage '{span.stage.name}' would get no iteration of {steps}; raise --steps.")
    return spans


@dataclass
class _Best:
    """The best validation so far."""

    value: float = -1.0
    iteration: int = 0


@dataclass
class _Timer:
    """Seconds since the last line of the log."""

    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    steps: int = 0


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
        self.spans = stage_spans(method.stages(), config.training.steps)
        self.iteration = 0
        self.best = _Best()
        self._stop_requested = False
        method.generator = torch.Generator(device=fabric.device)
        method.generator.manual_seed(config.training.seed + fabric.global_rank)

    def fit(self) -> None:
        """Train from the last checkpoint, or from the start, to the end; then write the model.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, with a checkpoint written.
            RunError: if the loss is not finite, or a checkpoint cannot be written or read.
        """
        state = self._load()
        self.method.train()
        log = RunLog(self.run.folder / "log", resume_at=self.iteration) if self.fabric.is_global_zero else None
        title = self.spans[0].stage.name
        try:
            with (
                ProgressLine(title, self.config.training.steps, quiet=self.quiet or log is None) as line,
                self._stop_signals(),
            ):
                for span in self.spans:
                    if self.iteration < span.stop:
                        self._run_stage(span, state, log, line)
                        state = None
            self._finish()
        finally:
            if log is not None:
                log.close()

    def _run_stage(
        self, span: StageSpan, state: dict[str, Any] | None, log: RunLog | None, line: ProgressLine
    ) -> None:
        begins = self.iteration == span.start
        if state is not None:
            restore_rng(self.method.generator, state["generators"])
        pseudo_labels = self._pseudo_labels(span, begins=begins)
        if begins:
            self.method.start_stage(span.stage)
        handles = TrainingHandles(self.method, self.config.training, span.stop - span.start)
        if not begins and state is not None:
            handles.load_state_dict(state["optimizers"])
        elif begins and not span.stage.restart_optimizers and self._previous_optimizers is not None:
            handles.load_state_dict(self._previous_optimizers)
        batches = iter(self._loader(span, pseudo_labels))
        timer = _Timer()
        while self.iteration < span.stop:
            asked = time.monotonic()
            raw = next(batches)
            timer.waited += time.monotonic() - asked
            handles.set_iteration(self.iteration - span.start)
            terms = self._step(raw, span, handles)
            self.iteration += 1
            timer.steps += 1
            self._after_step(span, terms, handles, log, line, timer)
        self._previous_optimizers = handles.state_dict()

    _previous_optimizers: dict[str, Any] | None = None

    def _step(self, raw: RawBatch, span: StageSpan, handles: TrainingHandles) -> dict[str, Tensor]:
        progress = Progress(
            iteration=self.iteration - span.start,
            total=span.stop - span.start,
            stage=span.stage.name,
            run_iteration=self.iteration,
            run_total=self.config.training.steps,
        )
        batch = self._batch(raw)
        with self._autocast():
            terms = self.method.step(batch, progress, handles)
        self.method.after_step(progress)
        return terms

    def _batch(self, raw: RawBatch) -> Batch:
        """To the device, through the shared weak augmentation."""
        device = self.fabric.device
        labeled, unlabeled = (images.to(device, non_blocking=True) for images in (raw.labeled, raw.unlabeled))
        labels = raw.labels.to(device, non_blocking=True).long()
        pseudo = None if raw.pseudo_labels is None else raw.pseudo_labels.to(device, non_blocking=True).long()
        settings, generator = self.config.data.augmentation, self.method.generator
        seen = weak(settings, labeled, [labels], generator=generator)
        maps = [] if pseudo is None else [pseudo]
        unseen = weak(settings, unlabeled, maps, generator=generator) if len(unlabeled) else None
        return Batch(
            labeled=self._layout(seen.images),
            labels=seen.maps[0],
            unlabeled=self._layout(unlabeled if unseen is None else unseen.images),
            labeled_raw=labeled,
            labels_raw=labels,
            unlabeled_raw=unlabeled,
            labeled_cases=raw.labeled_cases,
            unlabeled_cases=raw.unlabeled_cases,
            pseudo_labels=unseen.maps[0] if unseen is not None and maps else None,
        )

    def _autocast(self) -> torch.autocast:
        """Mixed precision for forward passes.

        Without autocast's cache of cast weights: it would hand a gradient pass the weights that an earlier
        pass without gradient cast, which cuts them off, and go stale when a step updates weights twice.
        """
        bf16 = self.config.training.precision == "bf16"
        return torch.autocast(self.fabric.device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)

    def _layout(self, images: Tensor) -> Tensor:
        if self.config.training.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def _loader(self, span: StageSpan, pseudo_labels: PseudoLabels | None) -> Iterator[RawBatch]:
        stage, plan = span.stage, self.config.plan
        unlabeled = () if stage.labeled_only else self.split.unlabeled
        source = BatchSource(
            self.store,
            self.split.labeled,
            unlabeled,
            plan,
            labeled_batch_size=stage.labeled_batch_size or plan.labeled_batch_size,
            unlabeled_batch_size=0 if not unlabeled else stage.unlabeled_batch_size or plan.unlabeled_batch_size,
            seed=self.config.training.seed,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
            all_classes=stage.all_classes,
            pseudo_labels=pseudo_labels,
        )
        workers = self.config.data.workers
        return iter(
            make_loader(source, self.iteration, span.stop, workers, self.fabric.device.type == "cuda")
        )

    def _pseudo_labels(self, span: StageSpan, *, begins: bool) -> PseudoLabels | None:
        """The pool's labels that hold in this stage: written now, or by the latest stage that relabeled."""
        index = self.spans.index(span)
        relabeled = [i for i, other in enumerate(self.spans[: index + 1]) if other.stage.relabel]
        if not relabeled:
            return None
        folder = self.run.folder / "pseudo_labels" / f"{relabeled[-1]}-{self.spans[relabeled[-1]].stage.name}"
        if begins and relabeled[-1] == index and self.fabric.is_global_zero:
            self._relabel(PseudoLabels(folder))
        self.fabric.barrier()
        return PseudoLabels(folder)

    def _relabel(self, pseudo_labels: PseudoLabels) -> None:
        network, plan = self.method.predictor, self.config.plan
        was_training = network.training
        network.eval()
        for case in self.split.unlabeled:
            probs = predict_array(
                network,
                self.store.read_image(case, _WHOLE),
                spatial_dims=plan.spatial_dims,
                patch_size=plan.patch_size,
                device=self.fabric.device,
            )
            pseudo_labels.write(case, probs.argmax(0).astype("uint8"))
        network.train(was_training)

    def _after_step(
        self,
        span: StageSpan,
        terms: dict[str, Tensor],
        handles: TrainingHandles,
        log: RunLog | None,
        line: ProgressLine,
        timer: _Timer,
    ) -> None:
        settings = self.config.training
        logged = self.method.pop_logged()
        last = self.iteration == settings.steps
        saves = self.iteration % settings.checkpoint_interval == 0 or last or self._stop_requested
        if saves or self.iteration % settings.log_every == 0:  # before saving: no checkpoint of a diverged state
            values = self._log(span, terms, logged, handles, log, timer)
            note = ", ".join(f"{name.split('/')[1]} {value:.3g}" for name, value in values.items() if "loss/" in name)
            rate = values.get("lr/main", next(iter(handles.rates().values())))
            wait = values["time/data_wait"]
            line.update(self.iteration, title=span.stage.name, note=f"{note}, lr {rate:.2g}, data wait {wait:.0%}")
        if self.split.val and (self.iteration % settings.validation_interval == 0 or last):
            paused = time.monotonic()
            self._validate(span, log, line)
            timer.started += time.monotonic() - paused
        if saves:
            paused = time.monotonic()
            self._save(handles, log)
            timer.started += time.monotonic() - paused
        if self._stop_requested and not last:
            raise Interrupted(
                f"stopped after iteration {self.iteration} of {settings.steps}; a checkpoint was written, continue "
                "with --resume."
            )

    def _log(
        self,
        span: StageSpan,
        terms: dict[str, Tensor],
        logged: dict[str, Tensor],
        handles: TrainingHandles,
        log: RunLog | None,
        timer: _Timer,
    ) -> dict[str, float]:
        """One synchronization for all scalars; refuses a loss that is not finite."""
        names = [*(f"loss/{name}" for name in terms), *(f"method/{name}" for name in logged)]
        tensors = [value.detach().float().to(self.fabric.device) for value in (*terms.values(), *logged.values())]
        values = dict(zip(names, torch.stack(tensors).cpu().tolist(), strict=True))
        for name, value in values.items():
            if name.startswith("loss/") and not abs(value) < float("inf"):
                raise RunError(
                    f"{name} is {value} at iteration {self.iteration}; lower training.lr, set training.gradient_clip, "
                    "or use --precision 32. The last checkpoint is kept."
                )
        elapsed = max(time.monotonic() - timer.started, 1e-9)
        values |= {f"lr/{name}": rate for name, rate in handles.rates().items()}
        values["time/seconds_per_iteration"] = elapsed / max(timer.steps, 1)
        values["time/data_wait"] = timer.waited / elapsed
        timer.started, timer.waited, timer.steps = time.monotonic(), 0.0, 0
        if log is not None:
            log.write(self.iteration, span.stage.name, values)
        return values

    def _validate(self, span: StageSpan, log: RunLog | None, line: ProgressLine) -> None:
        if not self.fabric.is_global_zero:
            return
        values = validate(
            self.method.predictor,
            self.split.val,
            dataset=self.dataset,
            store=self.store,
            plan=self.config.plan,
            device=self.fabric.device,
            autocast=self._autocast(),
        )
        if log is not None:
            log.write(self.iteration, span.stage.name, values)
        score = values["val/dice"]
        line.update(self.iteration, note=f"validation Dice {score:.4f}", force=True)
        if score > self.best.value:
            self.best = _Best(score, self.iteration)
            weights = self.method.predictor.state_dict()
            save_checkpoint(
                self.run.best_checkpoint, {"iteration": self.iteration, "dice": score, "predictor": weights}
            )

    def _save(self, handles: TrainingHandles, log: RunLog | None) -> None:
        if not self.fabric.is_global_zero or log is None:
            return
        log.flush()
        state = {
            "iteration": self.iteration,
            "method": self.method.state_dict(),
            "optimizers": handles.state_dict(),
            "generators": capture_rng(self.method.generator),
            "best": {"value": self.best.value, "iteration": self.best.iteration},
        }
        save_checkpoint(self.run.last_checkpoint, state)

    def _load(self) -> dict[str, Any] | None:
        path = self.run.last_checkpoint
        for leftover in path.parent.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)
        if not path.is_file():
            return None
        state = load_checkpoint(path, self.fabric.device)
        self.iteration = int(state["iteration"])
        self.best = _Best(**state["best"])
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
        )

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""

        def request(number: int, frame: FrameType | None) -> None:
            if self._stop_requested:
                signal.default_int_handler(number, frame)
            self._stop_requested = True
            _LOGGER.info("stopping after this iteration; again to stop at once")

        try:
            previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signal handlers exist in the main thread only
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
