"""Diff-CL (Guo et al., 2025)."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from scantly.errors import ConfigError
from scantly.losses import masked_cross_entropy, soft_dice
from scantly.methods.base import Batch, Handles, Method, OptimizerSpec, Progress, Rows, Stage, Task
from scantly.methods.parts.agreement import foreground_dice
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.cross_prediction import CrossPredictor
from scantly.methods.parts.detail import DetailConfig
from scantly.methods.parts.propagation import LabelPropagation, PropagationConfig
from scantly.methods.parts.ramps import gaussian_rampup
from scantly.methods.parts.supervision import SupervisionConfig
from scantly.networks.diffusion import DiffusionNetwork, NoiseSchedule, signed_one_hot
from scantly.networks.skips import SkipNetwork

__all__ = ["DiffCL"]


class DiffCL(Method):
    """A convolutional and a diffusion network teach each other.

    X. Guo, L. Yu, J. Shi, N. Lei and H. Wang, "Diff-CL: A Novel Cross Pseudo-Supervision Method for Semi-supervised
    Medical Image Segmentation", arXiv 2503.09408, 2025. The convolutional network (CS) segments the image. The
    diffusion network (DS) restores label maps that were noised, given the image: the reference of labeled images, the
    CS prediction of unlabeled ones. The hard prediction of each is the pseudo-label of the other. High-frequency
    Mamba blocks in skip connections bring detail from the whole volume; a contrastive term pulls the unlabeled CS
    features most like a class's stored labeled DS features to it and pushes the least similar ones away, of those that
    CS predicts as another class.

        L_DS = L_s + mu1 L_p;   L_CS = L_s + mu2 (L_p + eta L_cl)

    From the paper: the objective and what its weights multiply, what is noised and what supervises what, where the
    contrast's two sides come from and that pairs are chosen by cosine distance and class, and what the Mamba block is
    for. Nothing was released, and neither equations, settings nor results of the paper were available.
    From related published designs: prediction of the clean map, label coding in {-1, 1}, linear schedule of 1,000
    steps, uniform t, time embedding, cross-entropy and Dice, AdamW for DS (DDPM, DDIM, Diff-UNet, DiffVNet). Everything
    else is our choice: all values of settings, backbone (that of the run, for both), the inside and place of the Mamba
    blocks, selection counts and form of the contrast, one shared embedding, the one-step DS prediction as pseudo-label,
    ramps, gradients of the contrast to CS alone, and the paper's 3D method in 2D.

    Deviations and limits: learning rates follow the recipe's schedule (the specification has poly everywhere). DS
    predicts the clean map only, not the noise. Both optimizers step together, after both losses are built; clipping is
    DS's alone unless the recipe clips.
    """

    class Config(PropagationConfig, DetailConfig, SupervisionConfig):
        """Settings of Diff-CL; defaults are our choice unless another source is named."""

        mu1: float = Field(0.1, ge=0, description="Weight of DS's pseudo-label term, after the ramp.")
        mu2: float = Field(0.1, ge=0, description="Weight of CS's pseudo-label and contrastive terms, after the ramp.")
        eta: float = Field(0.1, ge=0, description="Weight of the contrast beside CS's pseudo-label term.")
        rampup_share: float = Field(0.4, ge=0, le=1, description="Share of the iterations until mu1 and mu2 are whole.")
        contrast_start: float = Field(0.1, ge=0, le=1, description="Share of the iterations without contrast at first.")
        use_ds: bool = Field(True, description="The diffusion network; without it CS learns from labeled images alone.")
        use_cl: bool = Field(True, description="The contrast; it needs the diffusion network.")
        pseudo_confidence: float = Field(
            0.0, ge=0, le=1, description="Cross-entropy counts pseudo-labels at least so probable; 0: all."
        )
        diffusion_steps: int = Field(
            1000, ge=2, description="Steps T of the noise process (DDPM); fewer need larger betas to end in noise."
        )
        betas: tuple[float, float] = Field((1e-4, 2e-2), description="First and last beta, linear between (DDPM).")
        t_range_labeled: tuple[float, float] = Field(
            (0.0, 1.0), description="Steps of labeled maps are uniform between these shares of T (DDPM)."
        )
        t_range_unlabeled: tuple[float, float] = Field(
            (0.0, 1.0),
            description="The same of unlabeled maps; from 0.25 on little is left of the pseudo-label to be copied.",
        )
        ds_pseudo: Literal["one_step", "ddim"] = Field(
            "one_step",
            description="DS's pseudo-labels: its prediction at the noised map, or sampled from noise with the "
            "statistics of the unlabeled rows.",
        )
        ds_pseudo_steps: int = Field(10, ge=1, description="Passes of a sample for ds_pseudo=ddim (DiffVNet).")
        ds_mse: bool = Field(
            False, description="DS's supervised loss has the mean squared error of probabilities too (Diff-UNet)."
        )
        ds_optimizer: Literal["adamw", "recipe"] = Field("adamw", description="DS's optimizer (Diff-UNet), or CS's.")
        ds_lr: float = Field(1e-4, gt=0, description="Learning rate of AdamW (Diff-UNet).")
        ds_weight_decay: float = Field(1e-3, ge=0, description="Weight decay of AdamW (Diff-UNet).")
        ds_gradient_clip: float | None = Field(1.0, gt=0, description="Largest norm of DS's gradient; none: as recipe.")
        network_dropout: bool = Field(
            False, description="Keep the backbones' dropout; else pseudo-labels are deterministic."
        )
        infer: Literal["cs", "ds", "mean"] = Field(
            "cs", description="What predicts: CS, DS sampled from noise, or the mean of both's probabilities."
        )
        sampling_steps: int = Field(10, ge=1, description="Passes of DS per prediction (DiffVNet 10, Diff-UNet 50).")
        sampling_seed: int = Field(0, ge=0, description="Seed of the noise that predictions start from.")
        sampling_clip: bool = Field(
            False, description="Between the passes of a sample clip DS's logits to [-1, 1] in place of 2 softmax - 1."
        )

        @field_validator("t_range_labeled", "t_range_unlabeled")
        @classmethod
        def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
            if not 0 <= value[0] < value[1] <= 1:
                raise ValueError("give two shares from 0 to 1, the smaller first")
            return value

        @model_validator(mode="after")
        def _blocks_have_a_network(self) -> Self:
            if self.use_hf and not self.use_ds and "cs" not in self.hf_in:
                raise ValueError("hf_in names only the diffusion network, and use_ds is false; set use_hf to false")
            return self

        @field_validator("betas")
        @classmethod
        def _variances(cls, value: tuple[float, float]) -> tuple[float, float]:
            if not 0 < value[0] <= value[1] < 1:
                raise ValueError("give two numbers between 0 and 1, the smaller first")
            return value

    #: What a finished model can be asked to do differently.
    prediction_settings: ClassVar[frozenset[str]] = frozenset(
        {"infer", "sampling_steps", "sampling_seed", "sampling_clip"}
    )

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__(task, config)
        self.config = config
        self.cs = self._network("cs")
        if self.cs.backbone.deep_supervision:
            raise ConfigError("diffcl trains one resolution; remove deep_supervision from network.arguments.")
        self.ds = None
        if config.use_ds:
            schedule = NoiseSchedule(config.diffusion_steps, config.betas)
            self.ds = DiffusionNetwork(self._network("ds"), task.num_classes, schedule)
        elif config.infer != "cs":
            raise ConfigError(
                f"method.infer={config.infer} needs the diffusion network, and method.use_ds is false; set "
                "method.infer=cs, or train with method.use_ds=true."
            )
        contrasts = config.use_cl and config.use_ds
        self.contrast = LabelPropagation(config, task, self.cs.backbone.widths[0]) if contrasts else None
        self._arrived: tuple[Tensor, Tensor, Tensor] | None = None

    def _network(self, name: Literal["cs", "ds"]) -> SkipNetwork:
        config, task = self.config, self.task
        noisy_channels = task.num_classes if name == "ds" else 0
        backbone = task.encoder_decoder(in_channels=task.channels + noisy_channels)
        if not config.network_dropout:
            for module in backbone.modules():
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
        blocks = config.use_hf and name in config.hf_in
        return SkipNetwork(backbone, config.high_frequency_skips(backbone) if blocks else None)

    def stages(self) -> list[Stage]:
        """One; without the diffusion network no unlabeled images are loaded."""
        return [Stage(unlabeled=Rows() if self.ds is not None else Rows(0))]

    def optimizers(self, stage: Stage) -> dict[str, OptimizerSpec]:  # noqa: ARG002
        """``cs``, with the embedding, as the recipe says, and ``ds``."""
        embedding = [] if self.contrast is None else list(self.contrast.parameters())
        specs = {"cs": OptimizerSpec([*self.cs.parameters(), *embedding], undecayed=self.cs.undecayed())}
        if self.ds is None:
            return specs
        config, parameters, undecayed = self.config, list(self.ds.parameters()), self.ds.network.undecayed()
        if config.ds_optimizer == "recipe":
            specs["ds"] = OptimizerSpec(parameters, gradient_clip=config.ds_gradient_clip, undecayed=undecayed)
        else:
            specs["ds"] = OptimizerSpec(
                parameters,
                name="adamw",
                lr=config.ds_lr,
                weight_decay=config.ds_weight_decay,
                gradient_clip=config.ds_gradient_clip,
                undecayed=undecayed,
            )
        return specs

    def losses(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """``cs_supervised``, ``ds_supervised``, ``ds_pseudo``, ``cs_pseudo`` and ``contrast``, weighted.

        Raises:
            ConfigError: if the batch has no unlabeled rows, but with ``use_ds=false``.
        """
        config, labeled = self.config, len(batch.labeled)
        if self.ds is None:
            return {"cs_supervised": config.supervised_loss([self.cs(batch.labeled)[0]], batch.labels)}
        if not len(batch.unlabeled):
            raise ConfigError("method 'diffcl' needs unlabeled rows; set plan.unlabeled_batch_size to 1 or more.")
        ramp = gaussian_rampup(progress.iteration, config.rampup_share * progress.total)
        logits, features = self.cs(batch.images)
        cs_labels, cs_confidence = _predicted(logits[labeled:])

        clean = signed_one_hot(torch.cat([batch.labels, cs_labels]), self.task.num_classes)
        ranges = (labeled, config.t_range_labeled), (len(cs_labels), config.t_range_unlabeled)
        t = torch.cat([self._times(rows, shares) for rows, shares in ranges])
        noisy = self.ds.schedule.noised(clean, t, self._noise(clean.shape))
        ds_logits, ds_features = self.ds(batch.images, noisy, t)
        ds_labels, ds_confidence = _predicted(ds_logits[labeled:])
        if config.ds_pseudo == "ddim":
            with torch.no_grad(), without_statistics(self.ds):
                noise = self._noise(clean[labeled:].shape)
                sampled = self.ds.sample(
                    batch.unlabeled, noise, steps=config.ds_pseudo_steps, clip=config.sampling_clip
                )
            ds_labels, ds_confidence = _predicted(sampled)

        terms = {
            "cs_supervised": config.supervised_loss([logits[:labeled]], batch.labels),
            "ds_supervised": self._ds_supervised(ds_logits[:labeled], batch.labels),
            "ds_pseudo": config.mu1 * ramp * self._pseudo(ds_logits[labeled:], cs_labels, cs_confidence),
            "cs_pseudo": config.mu2 * ramp * self._pseudo(logits[labeled:], ds_labels, ds_confidence),
        }
        if self.contrast is not None:
            self.contrast.check(features[labeled:])
            if progress.iteration >= config.contrast_start * progress.total:
                contrast, watched = self.contrast.loss(features[labeled:], cs_labels, self.generator)
                terms["contrast"] = config.mu2 * ramp * config.eta * contrast
                for name, value in watched.items():
                    self.log(name, value)
            self._arrived = ds_features[:labeled].detach(), batch.labels, ds_logits[:labeled].detach().argmax(1)
        self._watch(cs_labels, ds_labels, ds_logits[:labeled], batch.labels)
        return terms

    def step(self, batch: Batch, progress: Progress, handles: Handles) -> dict[str, Tensor]:
        """One backward pass, as the two losses have no parameter in common, then one update of each network."""
        terms = self.losses(batch, progress)
        handles.backward(torch.stack(list(terms.values())).sum())
        for name in ("cs",) if self.ds is None else ("cs", "ds"):
            handles.update(name)
        return terms

    def after_step(self, progress: Progress) -> None:  # noqa: ARG002
        """Store features of labeled voxels."""
        if self.contrast is not None and self._arrived is not None:
            self.contrast.store(*self._arrived, self.generator)
            self._arrived = None

    def _times(self, rows: int, shares: tuple[float, float]) -> Tensor:
        steps = self.config.diffusion_steps
        first = min(round(shares[0] * steps), steps - 1)
        last = max(round(shares[1] * steps), first + 1)
        return torch.randint(first, last, (rows,), generator=self.generator, device=self.generator.device)

    def _noise(self, shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def _ds_supervised(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.config.supervised_loss([logits], labels)
        if self.config.ds_mse:
            target = (signed_one_hot(labels, self.task.num_classes) + 1) / 2
            loss = loss + (logits.float().softmax(1) - target).square().mean()
        return loss

    def _pseudo(self, logits: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
        """Cross-entropy, of confident voxels if so set, and Dice with the other network's labels."""
        if self.config.pseudo_confidence == 0:
            return self.config.supervised_loss([logits], labels)
        mask = confidence >= self.config.pseudo_confidence
        dice = soft_dice(logits.float().softmax(1), labels, include_background=self.config.dice_background)
        return 0.5 * (masked_cross_entropy(logits, labels, mask) + dice)

    @torch.no_grad()
    def _watch(self, cs_labels: Tensor, ds_labels: Tensor, ds_logits: Tensor, labels: Tensor) -> None:
        """Scalars that show whether the two networks have something to tell each other."""
        self.log("network_agreement", foreground_dice(cs_labels, ds_labels))
        self.log("ds_restores", foreground_dice(ds_logits.argmax(1), labels))
        if self.contrast is not None:
            self.log("bank_fill", self.contrast.fill)
        for name, gate in self.cs.gates().items():
            self.log(f"gamma/{name}", gate)

    @property
    def predictor(self) -> nn.Module:
        """CS, DS or both, as ``infer`` says; holds both, so that a finished model can be asked for either."""
        config = self.config
        return CrossPredictor(
            self.cs,
            self.ds,
            infer=config.infer,
            steps=config.sampling_steps,
            seed=config.sampling_seed,
            clip=config.sampling_clip,
        )


def _predicted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and their probabilities, ``(B, *spatial)`` each, without gradient."""
    confidence, labels = logits.detach().float().softmax(1).max(1)
    return labels, confidence
