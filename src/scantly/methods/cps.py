"""CPS (Chen et al., CVPR 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import cross_entropy
from scantly.methods.base import Batch, Handles, Method, OptimizerSpec, Progress, Stage, Task
from scantly.methods.parts.agreement import foreground_dice
from scantly.methods.parts.consistency import RampConfig
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs

__all__ = ["CrossPseudoSupervision"]


class CrossPseudoSupervision(Method):
    """Two networks, begun differently, learn from each other's labels.

    Chen, Yuan, Zeng and Wang, "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021; for
    medical images as in the public code of SSL4MIS. Both networks learn from the labeled images, and on unlabeled ones
    from the most probable class that the other predicts (cross-entropy, no threshold). Each has its optimizer, whose
    poly schedule is advanced before the step, as there.

    Deviations: in the paper labeled images take part in the cross supervision too, its weight is constant (1.5), and
    images may be mixed; the public medical code, and this, take unlabeled images with a ramp up to 0.1 (``rows=all``,
    ``consistency`` and ``rampup_iterations=0`` give the paper's). Both networks have the backbone's own initialization,
    as in the 2D code; the 3D code has Kaiming's for one and Xavier's for the other. The first network predicts.
    """

    class Config(RampConfig, SupervisionConfig):
        """Settings of CPS; defaults are the public code's unless stated."""

        rows: Literal["unlabeled", "all"] = Field(
            "unlabeled", description="Where the networks supervise each other: unlabeled rows, or all (paper)."
        )
        predict_with: Literal["first", "second"] = Field("first", description="Which network predicts.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.first, self.second = task.network(), task.network()

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:  # noqa: ARG002
        """``first`` and ``second``, as the recipe says."""
        return {
            name: OptimizerSpec(getattr(self, name).parameters(), counted_first=True) for name in ("first", "second")
        }

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``supervised`` and ``cross``, each of both networks together, weighted."""
        config = self.config
        (own, unlabeled), (other_own, other_unlabeled) = (
            split_outputs(network, batch.labeled, batch.unlabeled) for network in (self.first, self.second)
        )
        if config.rows == "all":
            unlabeled = torch.cat([own[0], unlabeled])
            other_unlabeled = torch.cat([other_own[0], other_unlabeled])
        labels, other_labels = (logits.detach().argmax(1) for logits in (unlabeled, other_unlabeled))
        cross = cross_entropy(unlabeled, other_labels) + cross_entropy(other_unlabeled, labels)
        weight = config.consistency_weight(progress)
        self.log("consistency_weight", torch.tensor(weight))
        self.log("network_agreement", foreground_dice(labels, other_labels))
        supervised = [config.supervised_loss(logits, batch.labels) for logits in (own, other_own)]
        return {"supervised": supervised[0] + supervised[1], "cross": weight * cross}

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """One backward pass, as the networks have no parameter in common, then one update of each."""
        terms = self.losses(batch, progress)
        handles.backward(torch.stack(list(terms.values())).sum())
        for name in ("first", "second"):
            handles.update(name)
        return terms

    @property
    def predictor(self) -> nn.Module:
        """The first network or the second, as ``predict_with`` says."""
        return self.first if self.config.predict_with == "first" else self.second
