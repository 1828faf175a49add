"""The selective scan: time and memory over the length of the sequence, beside the recurrence token by token.

    OMP_NUM_THREADS=1 python benchmarks/selective_scan.py --out benchmarks/results/selective-scan-cpu.json

Batch 1, 64 channels, 8 states, float32. Every measurement is a process of its own. Seconds are those of one CPU thread,
so that other work on the machine matters less (on CUDA those of the clock), and the median of some repetitions; the
naive scan runs once. Memory on a CPU is how far the highest resident memory of the process (VmHWM, Linux only) lies
above what it held with the inputs and the gradient of y in place; "beyond" is without y and the gradients of the
inputs, which any implementation has to return. On CUDA it is the allocator's peak, alike.

A second table compares chunks at the two shapes that are most frequent in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from torch import Tensor

from scantly.networks.selective_scan import naive_scan, selective_scan

LENGTHS = [1024, 2048, 4096, 10_000, 16_384, 65_536, 262_144, 1_048_576]
CHUNKS = [32, 64, 128, 256, 512, 1024]
#: (B, L, d, N): tokens of 24 x 24 pixels in 2D, of 28 x 28 x 20 voxels in 3D.
SHAPES = {"2D": (16, 576, 32, 8), "3D": (4, 15_680, 128, 8)}


def make_inputs(shape: tuple[int, int, int, int], device: torch.device) -> list[Tensor]:
    """As a Mamba mixer begins: A = -(1 .. N), steps up to 0.1."""
    batch, length, channels, states = shape
    torch.manual_seed(0)
    inputs = [
        torch.randn(batch, length, channels),
        0.1 * torch.rand(batch, length, channels),
        -torch.arange(1.0, states + 1).expand(channels, states).contiguous(),
        torch.randn(batch, length, states),
        torch.randn(batch, length, states),
        torch.ones(channels),
    ]
    return [tensor.to(device).requires_grad_() for tensor in inputs]


def status(field: str) -> float:
    """A line of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return float(line.split()[1]) * 1024
    raise LookupError(field)


def peak_growth(call: Callable[[], Any], device: torch.device) -> float | None:
    """Bytes by which memory rises above the present at most while ``call`` runs; None where it cannot be measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - before)
    if not Path("/proc/self/clear_refs").exists():
        return None
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest value begins again
    call()
    return status("VmHWM") - before


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Seconds and memory of one case in this process."""
    torch.set_num_threads(1)
    device = torch.device(case["device"])
    shape = tuple(case["shape"])
    options = {"chunk": case["chunk"]} if case["chunk"] else {}
    scan: Callable[..., Tensor] = naive_scan if case["naive"] else selective_scan

    def both(inputs: list[Tensor], gradient: Tensor) -> None:
        y = scan(*inputs, **options)
        torch.autograd.grad(y, inputs, gradient)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def forward(inputs: list[Tensor]) -> None:
        with torch.no_grad():
            scan(*inputs, **options)
        if device.type == "cuda":
            torch.cuda.synchronize()

    small = make_inputs((shape[0], 64, *shape[2:]), device)
    both(small, torch.ones_like(small[0]))  # what the first call loads is not counted
    inputs = make_inputs(shape, device)
    gradient = torch.randn_like(inputs[0]).detach()
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def seconds(call: Callable[[], Any]) -> float:
        start = clock()
        call()
        return clock() - start

    # Memory is that of the first run; of the naive scan it is the only one.
    peaks: list[float | None] = []
    first = seconds(lambda: peaks.append(peak_growth(lambda: both(inputs, gradient), device)))
    repetitions = 0 if case["naive"] else 7 if inputs[0].numel() < 2**23 else 3
    whole = statistics.median([seconds(lambda: both(inputs, gradient)) for _ in range(repetitions)] or [first])
    alone = statistics.median([seconds(lambda: forward(inputs)) for _ in range(max(repetitions, 1))])
    (peak,) = peaks
    returned = sum(tensor.numel() * tensor.element_size() for tensor in (inputs[0], *inputs))
    return {
        "seconds": whole,
        "forward_seconds": alone,
        "microseconds_per_token": whole / (shape[0] * shape[1]) * 1e6,
        "peak_mb": None if peak is None else peak / 1e6,
        "beyond_mb": None if peak is None else (peak - returned) / 1e6,
    }


def measure_apart(shape: tuple[int, ...], device: str, *, naive: bool = False, chunk: int = 0) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    case = json.dumps({"shape": shape, "device": device, "naive": naive, "chunk": chunk})
    words = [sys.executable, __file__, "--one", case]
    found: dict[str, Any] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    return found


def show(name: str, found: dict[str, Any], ending: str = "") -> None:
    memory = ["-" if found[key] is None else f"{found[key]:.0f}" for key in ("peak_mb", "beyond_mb")]
    print(
        f"{name:>16s} {found['seconds']:9.4f} {found['forward_seconds']:9.4f} {found['microseconds_per_token']:9.2f}"
        f" {memory[0]:>9s} {memory[1]:>9s} {ending}",
        flush=True,
    )


def main() -> None:
    """Measure every length and chunk, or one case in this process when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--naive-up-to", type=int, default=10_000, help="its time grows with the square of the length")
    parser.add_argument("--chunks", type=int, nargs="*", default=CHUNKS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    header = f"{'seconds':>9s} {'forward':>9s} {'us/token':>9s} {'peak MB':>9s} {'beyond':>9s}"
    print(f"{'tokens':>16s} {header} naive/ours")
    result: dict[str, Any] = {"lengths (B=1, d=64, N=8)": {}, "chunks": {}}
    for length in arguments.lengths:
        shape = (1, length, 64, 8)
        found = {"ours": measure_apart(shape, arguments.device)}
        if length <= arguments.naive_up_to:
            found["naive"] = measure_apart(shape, arguments.device, naive=True)
            found["times_as_fast"] = found["naive"]["seconds"] / found["ours"]["seconds"]
            show(f"naive {length}", found["naive"])
        show(str(length), found["ours"], f"{found['times_as_fast']:9.0f}" if "naive" in found else "")
        result["lengths (B=1, d=64, N=8)"][str(length)] = found
    print(f"\n{'chunk':>16s} {header}")
    for name, shape in SHAPES.items():
        rows = {str(chunk): measure_apart(shape, arguments.device, chunk=chunk) for chunk in arguments.chunks}
        for chunk, row in rows.items():
            show(f"{name} {chunk}", row)
        result["chunks"][f"{name}, B, L, d, N = {shape}"] = rows
    if arguments.out:
        write_result(arguments.out, result, ("torch",))


if __name__ == "__main__":
    main()
