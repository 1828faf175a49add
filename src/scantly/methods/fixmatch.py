"""FixMatch (Sohn et al., NeurIPS 2020)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from scantly.losses import masked_cross_entropy
from scantly.methods.base import Batch, Method, Progress, Task
from scantly.methods.parts.strong_views import StrongViewConfig, WeakLabels
from scantly.methods.parts.supervision import SupervisionConfig, split_outputs

__all__ = ["FixMatch"]


class FixMatch(Method):
    """Confident labels of the weak view supervise the strong view.

    Sohn et al., "FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence", NeurIPS 2020, voxel
    by voxel as in the public code of UniMatch (Yang et al., CVPR 2023): cross-entropy of the strong view with the most
    probable class of the weak one where its probability reaches ``confidence_threshold``, divided by all voxels, and
    ``(L_x + L_u) / 2`` without a ramp. Labeled and weak rows pass the network in one batch, the strong view in a
    second one. It changes intensities and shows boxes of other images (CutMix).

    Deviations: the variant of SSL4MIS is not offered. Its masking normalizes probabilities voxel by voxel first, so
    that it hardly ever acts, and where it acts it teaches background; its negative term takes ``1 - p`` for logits.
    Boxes show other images of the batch, not of a second one. In 3D, for which there is no public code, the strong view
    has less blur, and noise.
    """

    class Config(StrongViewConfig, SupervisionConfig):
        """Settings of FixMatch; defaults are those of UniMatch's code unless stated."""

        confidence_threshold: float = Field(0.95, ge=0, description="From which a pseudo-label counts; above 1: never.")
        supervised_weight: float = Field(0.5, gt=0, description="Weight of the supervised loss.")
        unsupervised_weight: float = Field(0.5, ge=0, description="Weight of the loss on strong views.")

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.network = task.network()

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002
        """``supervised`` on labeled rows, ``unsupervised`` on strong views of unlabeled rows, weighted.

        Raises:
            ConfigError: if there are no unlabeled rows.
        """
        config = self.config
        view = config.strong_view(batch.unlabeled, self.generator)
        labeled, weak = split_outputs(self.network, batch.labeled, batch.unlabeled)
        confidence, labels = weak.detach().float().softmax(1).max(1)
        shown = view.paste(WeakLabels(labels, confidence >= config.confidence_threshold))
        self.log("confident", shown.mask.float().mean())
        supervised = config.supervised_loss(labeled, batch.labels)
        unsupervised = masked_cross_entropy(self.network(view.images), shown.targets, shown.mask)
        return {
            "supervised": config.supervised_weight * supervised,
            "unsupervised": config.unsupervised_weight * unsupervised,
        }

    @property
    def predictor(self) -> nn.Module:
        """The network."""
        return self.network
