import re

import numpy as np
import pytest
import torch
from torch import nn

from scantly import networks
from scantly.data import parallel
from scantly.errors import DeviceError
from scantly.inference import fitting
from scantly.inference.memory import available_bytes, footprint, is_out_of_memory, megabytes
from scantly.inference.settings import InferenceSettings
from scantly.inference.windows import predict_array

CPU = torch.device("cpu")
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("Unable to allocate 40.0 GiB"),
]


class Fails(nn.Module):
    """Runs without data, and fails on more than ``most`` voxels."""

    factors = (8, 8, 8)

    def __init__(self, error, most):
        super().__init__()
        self.error, self.most, self.conv = error, most, nn.Conv3d(1, 2, 1)

    def forward(self, x):
        if x.device.type != "meta" and x.numel() > self.most:
            raise self.error
        return self.conv(x)


def attempt(network, shape, patch, **values):
    array = np.zeros((1, *shape), np.float32)
    settings = InferenceSettings(**values)
    return predict_array(network, array, spatial_dims=3, patch_size=patch, device=CPU, settings=settings)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "numpy"])
def test_too_large_a_batch_names_one_that_fits(error):
    network = Fails(error, 3 * 16**3)
    with pytest.raises(DeviceError, match=r"too little memory for 6 x windows of 16 x 16 x 16 \(z, y, x\)") as caught:
        attempt(network, (32, 32, 32), (16, 16, 16), batch=6)
    (batch,) = re.findall(r"a batch of (\d+) fits: --batch \1 \(evaluation\.inference\.batch\)", str(caught.value))
    assert attempt(network, (32, 32, 32), (16, 16, 16), batch=int(batch)).shape == (2, 32, 32, 32)


@pytest.mark.parametrize("error", ERRORS, ids=["gpu", "cpu", "numpy"])
def test_too_large_a_patch_names_one_that_fits(error):
    network = Fails(error, 16 * 16 * 24)
    with pytest.raises(DeviceError, match="too little memory for windows of 16 x 32 x 24") as caught:
        attempt(network, (32, 32, 32), (16, 32, 24))
    assert "\n" not in str(caught.value)
    (size,) = re.findall(r"windows of 16 x 16 x 24 \(z, y, x\) fit: --size ([\d ]+) \(", str(caught.value))
    height, width, depth = map(int, size.split())
    assert attempt(network, (32, 32, 32), (16, 32, 24), patch_size=(depth, height, width)).shape == (2, 32, 32, 32)


def test_a_whole_that_does_not_fit_names_windows():
    network = Fails(ERRORS[1], 16**3)
    with pytest.raises(DeviceError, match=r"one pass over the whole of 32 x 40 x 40") as caught:
        attempt(network, (32, 40, 40), (16, 16, 16), window="whole")
    assert "windows of 16 x 16 x 16 (z, y, x) fit: --window gaussian (evaluation.inference)" in str(caught.value)
    assert attempt(network, (32, 40, 40), (16, 16, 16)).shape == (2, 32, 40, 40)


def test_other_errors_are_not_about_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(Fails(RuntimeError("shapes do not fit"), 0), (16, 16, 16), (16, 16, 16))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_what_cannot_fit_is_refused_before_any_pass(monkeypatch):
    """512 x 512 x 200 voxels in one pass of the V-Net, with 4 GB free; nothing of that size is made."""
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 4 * 10**9)
    network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval()
    demand = fitting.Demand(network, CPU, 1, (208, 512, 512), 1, (80, 112, 112), True, 0, (200, 512, 512))
    with pytest.raises(DeviceError, match=r"about \d\d\.\d GB are needed, 4\.0 GB are free.*--window gaussian"):
        demand.check()
    fitting.Demand(network, CPU, 1, (80, 112, 112), 1, (80, 112, 112), False, 0, (88, 200, 200)).check()


def test_a_prediction_checks_its_memory_first(monkeypatch):
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 10**6)
    network = Fails(AssertionError("must not run"), 0)
    with pytest.raises(DeviceError, match="1 MB are free"):
        attempt(network, (64, 64, 64), (16, 16, 16), window="whole")
    monkeypatch.setattr(fitting, "available_bytes", lambda device: None)
    with pytest.raises(AssertionError, match="must not run"):
        attempt(network, (64, 64, 64), (16, 16, 16), window="whole")


def test_a_smaller_window_is_named_until_it_fits(monkeypatch):
    network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval()
    free = footprint(network, 1, (32, 32, 32)).peak
    monkeypatch.setattr(fitting, "available_bytes", lambda device: free)
    demand = fitting.Demand(network, CPU, 1, (96, 96, 96), 1, (96, 96, 96), False, 0, (96, 96, 96))
    sides = re.findall(r"windows of (\d+) x (\d+) x (\d+) \(z, y, x\) fit", demand.sentence())[0]
    assert np.prod([int(side) for side in sides]) <= 32**3
    assert all(int(side) % 16 == 0 for side in sides)
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 1000)
    assert "no window of this network fits" in demand.sentence()


def test_sums_over_the_volume_count_however_small_the_windows(monkeypatch):
    """160 x 200 x 200 voxels, 2 classes and the weights: 77 MB of sums; a window takes next to nothing."""
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 60 * 10**6)
    with pytest.raises(DeviceError, match=r"about 7\d MB are needed, 60 MB are free.*predict scans of fewer voxels"):
        attempt(Fails(AssertionError("must not run"), 0), (160, 200, 200), (8, 16, 16))
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 80 * 10**6)
    with pytest.raises(AssertionError, match="must not run"):
        attempt(Fails(AssertionError("must not run"), 0), (160, 200, 200), (8, 16, 16))


def test_sums_that_would_crowd_a_gpu_count_in_the_main_memory(monkeypatch):
    """77 MB of sums beside 100 MB of free GPU memory are kept in the main memory."""
    free = {"cuda": 100 * 10**6, "cpu": 100 * 10**6}
    monkeypatch.setattr(fitting, "available_bytes", lambda device: free[device.type])
    network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval()
    window = (16, 32, 32)
    peak = footprint(network, 1, window).peak
    free["cuda"] = peak + 1
    assert peak < 4 * 2 * 160 * 200 * 200
    demand = fitting.Demand(
        network, torch.device("cuda"), 1, window, 1, window, False, 160 * 200 * 200, (160, 200, 200)
    )
    demand.check()
    free["cpu"] = 60 * 10**6
    with pytest.raises(DeviceError, match=r"cpu has too little memory for the sums .* 160 x 200 x 200"):
        demand.check()


def test_the_sums_of_windows_count_in_the_cure_for_one_pass(monkeypatch):
    """A window of 16 x 16 x 16 alone would fit into 60 MB, the sums over 160 x 208 x 208 voxels do not."""
    network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval()
    patch, whole = (16, 16, 16), (160, 208, 208)
    free = footprint(network, 1, patch).peak + 10**6
    monkeypatch.setattr(fitting, "available_bytes", lambda device: free)
    assert (
        "no window of this network fits" in fitting.Demand(network, CPU, 1, whole, 1, patch, True, 0, whole).sentence()
    )
    free += 4 * 3 * 160 * 208 * 208
    assert "--window gaussian (" in fitting.Demand(network, CPU, 1, whole, 1, patch, True, 0, whole).sentence()


def test_the_cure_exceeds_neither_scan_nor_training_patch(monkeypatch):
    network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval()
    monkeypatch.setattr(fitting, "available_bytes", lambda device: 2 * 10**9)
    with pytest.raises(DeviceError, match="windows of 320 x 1248 x 1248") as caught:
        attempt(network, (23, 41, 37), (32, 32, 32), patch_size=(320, 1248, 1248))
    assert "windows of 32 x 32 x 32 (z, y, x) fit: --size 32 32 32 (" in str(caught.value)
    with pytest.raises(DeviceError, match="windows of 96 x 1248 x 1248") as caught:
        attempt(network, (23, 41, 37), (96, 96, 96), patch_size=(96, 1248, 1248))
    assert "windows of 32 x 48 x 48 (z, y, x) fit: --size 48 48 32 (" in str(caught.value)


def test_footprint_counts_the_tensors_alive_at_once():
    """x (not counted: 4 n) -> a (8 n) -> b (12 n, a alive) -> logits (8 n, b alive, a gone)."""

    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Conv3d(1, 2, 1), nn.Conv3d(2, 3, 1), nn.Conv3d(3, 2, 1)

        def forward(self, x):
            x = self.first(x)
            x = self.second(x)
            return self.third(x)

    counted = footprint(Three(), 1, (8, 8, 8))
    voxels = 8**3
    assert counted.classes == 2
    assert counted.peak == pytest.approx(1.4 * 4 * voxels * (1 + 2 + 3), rel=1e-3)  # input held by the caller
    assert footprint(Three(), 1, (8, 8, 8), bf16=True).peak == pytest.approx(0.75 / 1.4 * counted.peak, rel=1e-3)


def test_a_network_that_needs_data_is_not_counted():
    class Looks(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    assert footprint(Looks(), 1, (8, 8, 8)) is None


def test_free_memory_is_known_on_linux_and_bounded_by_the_container(monkeypatch, tmp_path):
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 50 kB\n",
        "/proc/self/cgroup": "0::/job\n",
        "/sys/fs/cgroup/job/memory.max": "40960\n",
        "/sys/fs/cgroup/job/memory.current": "20480\n",
        "/sys/fs/cgroup/job/memory.stat": "anon 10\ninactive_file 1024\n",
    }
    monkeypatch.setattr(parallel, "_read", lambda path: files.get(str(path), ""))
    assert available_bytes(CPU) == 40960 - 20480 + 1024
    files["/sys/fs/cgroup/job/memory.max"] = "max\n"
    assert available_bytes(CPU) == 50 * 1024
    files.clear()
    assert available_bytes(CPU) is None


def test_bytes_in_words():
    assert megabytes(21_000_000_000) == "21.0 GB"
