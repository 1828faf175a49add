"""Ramps, learning rates and the teacher's average, each as a method's settings and the training's handles have them."""

from __future__ import annotations

from typing import Any

from golden_runs import method_of
from golden_values import Entry, array
from torch import from_numpy, nn

from scantly.methods.base import Method, Progress
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

_LA: dict[str, Any] = {"rampup_iterations": 6000, "published_iterations": 6000}


def ramps(entry: Entry) -> dict[str, list[float]]:
    """Weights and thresholds at the entry's iterations."""
    volume = (16, 16, 16)
    flat = method_of("mean_teacher", 4, (16, 16))
    certain = method_of("ua_mt", 4, (16, 16), official=True)
    return {
        "weight_2d": _weights(entry, flat, 30000),
        "weight_la": _weights(entry, method_of("ua_mt", 2, volume, **_LA), 6000),
        "threshold_2d": [certain.threshold(Progress(iteration, 30000)) for iteration in entry["iterations"]],
        "weight_mc_net_2d": _weights(entry, method_of("mc_net", 4, (16, 16)), 30000),
        "weight_mc_net_la": _weights(entry, method_of("mc_net", 2, volume, consistency=1.0, **_LA), 6000),
    }


def _weights(entry: Entry, method: Method, total: int) -> list[float]:
    config: Any = method.config
    return [config.consistency_weight(Progress(iteration, total)) for iteration in entry["iterations"]]


#: Schedule of the file -> method, optimizer, and the schedule of section ``training``.
SCHEDULES = {
    "poly": ("supervised", "main", "poly"),
    "poly_unimatch": ("unimatch", "main", "poly"),
    "poly_counted_first": ("cps", "second", "poly"),
    "step": ("ua_mt", "main", "step"),
    "step_dtc": ("dtc", "main", "step"),
    "step_sassnet": ("sassnet", "network", "step"),
    "constant_mc_net": ("mc_net", "main", "constant"),
}


def learning_rates(entry: Entry) -> dict[str, list[float]]:
    """Rates of the updates that a schedule lists; where the file has a rule alone, at the iterations of poly."""
    ours = {}
    for name, (method_name, optimizer, schedule) in SCHEDULES.items():
        listed = entry[name] if "iterations" in entry[name] else entry["poly"]
        method = method_of(method_name, 2, (16, 16))
        handles = TrainingHandles(method, method.stages()[0], TrainingSection(schedule=schedule), listed["total"])
        ours[name] = []
        for iteration in listed["iterations"]:
            handles.set_iteration(iteration)
            ours[name].append(handles.rates()[optimizer])
    return ours


def learning_rates_expected(entry: Entry) -> dict[str, list[float]]:
    """Their values; the two rules without values are UniMatch's, that of ``poly``, and MC-Net's, 0.01 throughout."""
    theirs = {name: list(entry[name]["values"]) for name in SCHEDULES if "values" in entry[name]}
    return theirs | {"poly_unimatch": theirs["poly"], "constant_mc_net": [0.01] * len(theirs["poly"])}


def moving_average(entry: Entry) -> dict[str, list[float]]:
    """Decays and the teacher's weights after each update."""
    method = method_of("mean_teacher", 2, (16, 16), teacher_buffers="own")
    config: Any = method.config
    student, teacher = (nn.Linear(4, 1, bias=False).requires_grad_(False) for _ in range(2))
    teacher.weight.copy_(from_numpy(array(entry["inputs"]["teacher"])))
    one, other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    decays, weights = [], list[float]()
    for row, iteration in zip(array(entry["inputs"]["student"]), entry["iterations"], strict=True):
        progress = Progress(iteration, 30000)
        student.weight.copy_(from_numpy(row)[None])
        config.update_teacher(teacher, student, progress)
        weights += teacher.weight[0].tolist()
        nn.init.zeros_(one.weight)
        nn.init.ones_(other.weight)
        config.update_teacher(other, one, progress)  # what is left of 1 is the decay
        decays.append(other.weight.item())
    return {"decays": decays, "teacher_after": weights}
