"""The method of Scantly's page on new methods, in a package of its own."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from scantly.losses import cross_entropy_dice
from scantly.methods.base import Batch, Method, MethodConfig, Progress, Task
from scantly.views import StrongConfig, strong


class WeakToStrong(Method):
    """Confident predictions on the weak view teach the strong view of the same image."""

    class Config(MethodConfig):
        threshold: float = Field(0.95, ge=0, le=1, description="Probability from which a prediction counts.")
        weight: float = Field(1.0, ge=0, description="Weight of the unsupervised term.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with torch.no_grad():
            confidence, pseudo_labels = self.network(batch.unlabeled).float().softmax(1).max(1)
        accepted = (confidence >= self.config.threshold).float()
        views = strong(StrongConfig(), batch.unlabeled, generator=self.generator)
        logits = self.network(torch.cat([batch.labeled, views]))
        labeled, unlabeled = logits.split([len(batch.labeled), len(views)])
        per_voxel = F.cross_entropy(unlabeled.float(), pseudo_labels, reduction="none")
        self.log("accepted", accepted.mean())
        return {
            "supervised": cross_entropy_dice(labeled, batch.labels),
            "unsupervised": self.config.weight * (accepted * per_voxel).mean(),
        }

    @property
    def predictor(self) -> nn.Module:
        return self.network
