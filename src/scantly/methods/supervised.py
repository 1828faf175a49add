"""Supervised training on the labeled cases alone: the lower bound, with all labels the upper bound."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.supervision import SupervisionConfig, outputs

__all__ = ["Supervised"]


class Supervised(Method):
    """Cross-entropy plus soft Dice on labeled images; unlabeled cases are not loaded.

    The baseline of every comparison. ``--labeled n`` gives the lower bound; without ``--labeled``, with all
    labels, the upper bound. Loss ``(CE + Dice) / 2``, Dice with squared denominators and summed over the
    batch, as the public code of the field (SSL4MIS, UA-MT).

    Deviations: the upper bound in that code trains with the labeled batch doubled (24 instead of 12 + 12);
    here the batch is ``plan.labeled_batch_size``, set it to 24 for that.
    """

    class Config(SupervisionConfig):
        """Those of the supervised loss."""

    uses_unlabeled: ClassVar[bool] = False

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002
        """``supervised``: the loss on the labeled rows."""
        return {"supervised": self.config.supervised_loss(outputs(self.network, batch.labeled), batch.labels)}

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
