"""Steps that no memory could hold are refused before anything is prepared."""

import re

import pytest
import torch

from scantly.data import parallel
from scantly.errors import DeviceError
from scantly.settings import merge
from scantly.training import memory
from scantly.training.resolve import resolve

VOLUMES = {"plan": {"spatial_dims": 3, "spacing": [5, 5, 5], "labeled_batch_size": 2, "unlabeled_batch_size": 3}}


def configuration(cohort, size, method="mean_teacher", **sets):
    flags = {"method": method, "labeled": 2, "size": size}
    return resolve(cohort, flags=flags, sets=merge(VOLUMES, sets))


def test_bytes_of_a_step(cohort):
    voxels = 64 * 64 * 32
    plain = memory.step_bytes(configuration(cohort, [64, 64, 32]))
    assert plain == 5 * voxels * 1050
    assert memory.step_bytes(configuration(cohort, [64, 64, 32], method="supervised")) == 2 * voxels * 1050
    half = configuration(cohort, [64, 64, 32], network={"name": "vnet", "arguments": {"widths": [8, 8, 8, 8, 8]}})
    assert memory.step_bytes(half) == plain / 2
    assert memory.step_bytes(configuration(cohort, [64, 64, 32], training={"precision": "bf16"})) == 0.6 * plain


def test_what_cannot_fit_is_told_with_patch_need_and_memory(cohort, monkeypatch):
    monkeypatch.setattr(memory, "_memory", lambda device: int(16e9))
    device = torch.device("cpu")
    memory.check_memory(configuration(cohort, [112, 112, 80]), device)
    with pytest.raises(
        DeviceError, match=r"2 \+ 3 rows of 512 x 512 x 512 by network vnet .* 705 GB, but cpu has 16 GB"
    ) as told:
        memory.check_memory(configuration(cohort, [512, 512, 512]), device)
    width, height, depth = map(int, re.search(r"--size (\d+) (\d+) (\d+)", str(told.value)).groups())
    memory.check_memory(configuration(cohort, [height, width, depth]), device)  # the cure helps
    with pytest.raises(DeviceError, match="over 2 rows of"):  # supervised loads no unlabeled rows
        memory.check_memory(configuration(cohort, [512, 512, 512], method="supervised"), device)


def test_a_container_has_its_limit_and_those_above_it(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 90 kB\n",
        "/proc/self/cgroup": "0::/slurm/job/step\n",
        "/sys/fs/cgroup/slurm/job/step/memory.max": "max\n",
        "/sys/fs/cgroup/slurm/job/memory.max": "51200\n",
        "/sys/fs/cgroup/slurm/job/memory.current": "30000\n",
        "/sys/fs/cgroup/slurm/memory.max": "81920\n",
    }
    monkeypatch.setattr(parallel, "_read", lambda path: files.get(str(path), ""))
    assert parallel.total_memory() == 51200
    assert parallel.available_memory() == 51200 - 30000
    files.pop("/sys/fs/cgroup/slurm/job/memory.max")
    assert (parallel.total_memory(), parallel.available_memory()) == (81920, 90 * 1024)


def test_the_machine_knows_its_memory(cohort):
    memory.check_memory(configuration(cohort, [16, 16, 16]), torch.device("cpu"))
    with pytest.raises(DeviceError, match="choose for instance --size"):
        memory.check_memory(configuration(cohort, [8192, 8192, 4096]), torch.device("cpu"))
