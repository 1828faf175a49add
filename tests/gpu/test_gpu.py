"""On a CUDA device: the methods run there without synchronizing, and a run resumes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scantly.inference.settings import InferenceSettings
from scantly.inference.windows import predict_array
from scantly.losses import signed_distance
from scantly.methods import catalogue
from scantly.methods.base import Batch, Progress, Task
from scantly.networks import build
from scantly.settings import merge
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.training.resolve import resolve
from scantly.training.train import train_config
from scantly.views import StrongConfig, WeakConfig, strong, weak

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


NETWORKS = {
    "unet": (2, {"widths": [8, 16, 16], "dropout": [0.1, 0.1, 0.1]}),
    "vnet": (3, {"widths": [8, 16, 16]}),
    "unet3d": (3, {"widths": [8, 16, 16]}),
    "dynunet": (
        3,
        {
            "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
            "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
            "widths": [8, 16, 16],
        },
    ),
}


#: Every method as it is, and branches that its defaults leave out.
VARIANTS = [pytest.param(entry.name, {}, id=entry.name) for entry in catalogue.CATALOGUE]
VARIANTS.append(
    pytest.param(
        "arco",
        {"negatives": "rank", "equivariance_weight": 1.0, "teacher_mode": "eval", "sampler": "sag"},
        id="arco-rank",
    )
)
VARIANTS += [
    pytest.param("gapmatch", {"update": "sequential"}, id="gapmatch-sequential"),
    pytest.param("gapmatch", {"perturbation": "random", "ascent_steps": 2}, id="gapmatch-random"),
    pytest.param(
        "gapmatch",
        {"perturbation": "adaptive", "second_targets": "recomputed", "second_view": "new"},
        id="gapmatch-adaptive",
    ),
    pytest.param("diffcl", {"hf_in": ("cs", "ds"), "ds_mse": True}, id="diffcl-both"),
    pytest.param("diffcl", {"ds_pseudo": "ddim", "ds_pseudo_steps": 2}, id="diffcl-ddim"),
    pytest.param("diffcl", {"candidate_sampling": "stratified", "proj_stride": 2}, id="diffcl-stratified"),
]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_a_step_never_waits_for_the_device(name, settings, network, bf16):
    dims, arguments = NETWORKS[network]
    task = Task(1, ("background", "a", "b"), dims, (32,) * dims, network, arguments)
    method_class = catalogue.load(name)
    method = method_class(task, method_class.Config(**settings)).cuda().train()
    method.generator = torch.Generator("cuda").manual_seed(0)
    shape = (32,) * dims

    def rows(count):
        count = 2 if count is None else count
        return torch.rand(count, 1, *shape, device="cuda"), torch.randint(3, (count, *shape), device="cuda")

    for stage in method.stages():
        method.enter_stage(stage, first=True)
        handles = TrainingHandles(method, stage, TrainingSection(), 10)
        (x, y), (u, pseudo), extra = (rows(stream.count) for stream in (stage.labeled, stage.unlabeled, stage.extra))
        for iteration in range(3):
            progress = Progress(iteration, 10, stage.name)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if iteration else "default")
            try:
                seen = weak(WeakConfig(), x, [y], generator=method.generator)
                unseen = strong(StrongConfig(), u, generator=method.generator) if len(u) else u
                batch = Batch(seen.images, seen.maps[0], unseen, x, y, u)
                batch.pseudo_labels = batch.pseudo_labels_raw = pseudo
                batch.extra, batch.extra_labels = extra
                with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
                    terms = method.step(batch, progress, handles)
                method.after_step(progress)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(torch.isfinite(value) for value in terms.values()), stage.name


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_run_on_the_gpu_learns_and_is_not_trained_twice(cohort, tiny, tmp_path, precision):
    sets = merge(tiny, {"training": {"device": "cuda", "steps": 30, "precision": precision}})
    sets = merge(sets, {"data": {"store": str(tmp_path / "s"), "workers": 2}})
    run = train_config(
        resolve(cohort, flags={"method": "mean_teacher", "labeled": 2}, sets=sets), tmp_path / "run", quiet=True
    )
    losses = run.log().query("name == 'loss/supervised'")["value"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert run.environment["device"] == "cuda"


@pytest.mark.parametrize("window", ["gaussian", "uniform", "whole"])
def test_windows_on_the_gpu_give_what_the_cpu_gives(window):
    torch.manual_seed(0)
    network = build("vnet", spatial_dims=3, in_channels=1, out_channels=2, arguments={"widths": [4, 8]}).eval()
    array = np.random.default_rng(0).normal(size=(1, 40, 36, 44)).astype(np.float32)
    settings = InferenceSettings(window=window)
    probs = [
        predict_array(
            network.to(device),
            array,
            spatial_dims=3,
            patch_size=(16, 16, 16),
            device=torch.device(device),
            settings=settings,
        )
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(probs[0], probs[1], atol=2e-3)  # convolutions in TF32


@pytest.mark.parametrize("infer", ["cs", "ds", "mean"])
def test_samples_on_the_gpu_are_those_of_the_cpu(infer):
    """The noise is drawn on the CPU, so that a prediction does not depend on the device."""
    torch.manual_seed(0)
    method_class = catalogue.load("diffcl")
    task = Task(1, ("background", "a"), 2, (32, 32), "unet", {"widths": [8, 16], "dropout": [0.0, 0.0]})
    predictor = method_class(task, method_class.Config(infer=infer, sampling_steps=3)).predictor.eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        probs = [predictor.to(device)(images.to(device)).softmax(1).cpu() for device in ("cpu", "cuda")]
    torch.testing.assert_close(probs[0], probs[1], atol=5e-3, rtol=0)  # convolutions in TF32


@pytest.mark.parametrize("shape", [(6, 96, 80), (2, 24, 40, 32)])
def test_signed_distances_on_the_gpu_are_those_of_the_cpu(shape):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=generator) > torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    mask[0], mask[1] = False, True
    for empty in ("outside", "zero"):
        assert torch.equal(signed_distance(mask.cuda(), empty=empty).cpu(), signed_distance(mask, empty=empty))
