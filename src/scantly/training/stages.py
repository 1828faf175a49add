"""The stages of a run: their iterations, and the pool's pseudo-labels that some of them write."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scantly.data.plan import Plan
from scantly.data.prepare import restore_label
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.store import Store
from scantly.errors import ConfigError
from scantly.imaging import write_label
from scantly.inference.settings import DEFAULT_INFERENCE, InferenceSettings
from scantly.inference.windows import predict_array
from scantly.methods.base import Method, Stage
from scantly.methods.parts.modes import evaluation_mode
from scantly.ranks import rank, world_size

__all__ = ["StageSpan", "pseudo_label_folder", "relabel", "stage_spans"]

_WHOLE = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class StageSpan:
    """A stage and the iterations of the run that are its own, ``start <= iteration < stop``.

    Attributes:
        stage: What the method declared.
        start: First iteration.
        stop: Iteration after the last one.
        schedule: Start and stop of its learning-rate schedule, which it shares with the stages that keep its
            optimizers.
    """

    stage: Stage
    start: int
    stop: int
    schedule: tuple[int, int]

    @property
    def length(self) -> int:
        """Number of iterations."""
        return self.stop - self.start


def stage_spans(stages: Sequence[Stage], steps: int) -> list[StageSpan]:
    """Divide the budget by the stages' shares.

    Rounding goes by the cumulated shares, so all steps are used.

    Args:
        stages: In order.
        steps: Iterations of the run.

    Raises:
        ConfigError: if a stage would get no iteration.

    Example:
        >>> [(s.start, s.stop) for s in stage_spans([Stage("a", share=1), Stage("b", share=2)], 10)]
        [(0, 3), (3, 10)]
    """
    total = sum(stage.share for stage in stages)
    borders = [round(steps * share / total) for share in itertools.accumulate(stage.share for stage in stages)]
    starts = [0, *borders[:-1]]
    anew = [index for index, stage in enumerate(stages) if index == 0 or stage.restart_optimizers]
    spans = []
    for index, stage in enumerate(stages):
        first = max(begin for begin in anew if begin <= index)
        after = min((begin for begin in anew if begin > index), default=len(stages))
        spans.append(StageSpan(stage, starts[index], borders[index], (starts[first], borders[after - 1])))
    for span in spans:
        if span.length < 1:
            raise ConfigError(f"stage '{span.stage.name}' would get no iteration of {steps}; raise --steps.")
    return spans


def pseudo_label_folder(run: Path, spans: Sequence[StageSpan], index: int) -> tuple[Path, int] | None:
    """Where the pseudo-labels that hold in a stage lie, and which stage wrote them; ``None``: none do."""
    writers = [i for i, span in enumerate(spans[: index + 1]) if span.stage.relabel]
    if not writers:
        return None
    return run / "pseudo_labels" / f"{writers[-1]}-{spans[writers[-1]].stage.name}", writers[-1]


def relabel(
    method: Method,
    cases: Sequence[str],
    *,
    store: Store,
    plan: Plan,
    device: torch.device,
    folder: Path,
    inference: InferenceSettings = DEFAULT_INFERENCE,
) -> PseudoLabels:
    """Predict the unlabeled pool, one case at a time, each rank its share, and write the label maps.

    Beside each map on the prepared grid lies one on the scan's own grid, ``<case>.nii.gz``, to be looked at.

    Args:
        method: Its predictor, on ``device``, predicts, and its ``pseudo_labels`` makes labels of probabilities.
        cases: Names of the pool.
        store: Prepared images.
        plan: How they were prepared.
        device: Where the network is.
        folder: Where the maps go, one file per case, each written atomically.
        inference: How whole scans are predicted; the choice of components is for reported label maps alone.
    """
    written = PseudoLabels(folder)
    network = method.predictor
    with evaluation_mode(network):
        for case in cases[rank() :: world_size()]:
            image = store.read_image(case, _WHOLE)
            probs = predict_array(
                network,
                image,
                spatial_dims=plan.spatial_dims,
                patch_size=plan.patch_size,
                device=device,
                settings=inference,
            )
            labels = method.pseudo_labels(torch.from_numpy(probs)).numpy().astype(np.int16)
            record = store.record(case)
            write_label(folder / f"{case}.nii.gz", restore_label(labels, record, plan), record.geometry)
            written.write(case, labels)
    return written
