"""How each entry of ``networks.json`` is compared with our networks, and what the page says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from golden_runs import task_of
from golden_values import Compared, Entry, apart, entries, fill, image, list_apart, numbers_of, projection, pseudo
from torch import Tensor, nn

from scantly import networks
from scantly.methods import catalogue
from scantly.methods.parts import feature_perturbation

__all__ = ["NETWORKS", "Network", "compared_network"]

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """Comparison of a network.

    Attributes:
        build: Makes what has the parameters.
        run: From it and the inputs to the outputs by name.
        ours: What of Scantly it is, for the page.
    """

    build: Callable[[], nn.Module]
    run: Callable[[Any, list[Tensor]], Outputs]
    ours: str


def _plain(name: str, dims: Any, classes: int) -> Network:
    return Network(
        lambda: networks.build(name, spatial_dims=dims, in_channels=1, out_channels=classes),
        lambda network, inputs: {"logits": network(inputs[0])},
        f"`{name}`",
    )


def _method(name: str, classes: int, space: tuple[int, ...], network: str, **settings: Any) -> Callable[[], nn.Module]:
    """A method on its default network, full size."""

    def build() -> nn.Module:
        kind = catalogue.load(name)
        method: nn.Module = kind(task_of(classes, space, network, {}), kind.Config(**settings))
        return method

    return build


def _part(build: Callable[[], nn.Module], name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(build(), name)


def _scales(method: Any, inputs: list[Tensor]) -> Outputs:
    finest, *others = method._scales(inputs[0])  # of the others the coarsest first
    return {f"scale{number}": logits for number, logits in enumerate([finest, *reversed(others)], start=1)}


def _perturbed(method: Any, inputs: list[Tensor]) -> Outputs:
    """The decoders behind noise and dropped voxels; the noise is given by a rule, the share of dropped voxels fixed."""

    def drawn(shape: Any, like: Tensor, bounds: tuple[float, float], generator: torch.Generator) -> Tensor:
        low, high = bounds
        if low == high:
            return torch.full(tuple(shape), low, dtype=like.dtype)
        noise = torch.from_numpy(pseudo(np.arange(int(np.prod(shape)), dtype=np.int64) + 5000)).view(tuple(shape))
        return (high * noise).to(like.dtype)

    features = method.network.encode(inputs[0])
    outputs = {"main": method.network.decode(features)}
    with mock.patch.object(feature_perturbation, "_uniform", drawn):
        for index, name in ((0, "noise"), (2, "drop_voxels")):
            perturbed = [method.perturbations[index](level) for level in features]
            outputs[name] = method.heads[index](method.decoders[index](perturbed)[0])
    return outputs


def _both(network: Any, inputs: list[Tensor]) -> Outputs:
    return dict(zip(("logits", "distances"), network.both(inputs[0]), strict=True))


def _decoders(method: Any, inputs: list[Tensor]) -> Outputs:
    features = method.network.encode(inputs[0])
    further = [head(decoder(features)[0]) for decoder, head in zip(method.decoders, method.heads, strict=True)]
    return dict(zip(("first", "second", "third"), [method.network.decode(features), *further], strict=False))


def _verdicts(discriminator: Any, inputs: list[Tensor]) -> Outputs:
    return {"logits": discriminator(*inputs)}


_CCT: dict[str, Any] = {"dropped_above": (0.8, 0.8)}
NETWORKS: dict[str, Network] = {
    "unet_2d": _plain("unet", 2, 4),
    "unet_urpc": Network(_method("urpc", 4, (32, 48), "unet"), _scales, "`urpc` on `unet`"),
    "unet_cct": Network(_method("cct", 4, (32, 48), "unet", **_CCT), _perturbed, "`cct` on `unet`"),
    "unet_3d": _plain("unet3d", 3, 2),
    "unet_3d_urpc": Network(_method("urpc", 2, (32, 16, 16), "unet3d"), _scales, "`urpc` on `unet3d`"),
    "vnet": _plain("vnet", 3, 2),
    "vnet_uamt": _plain("vnet", 3, 2),
    "vnet_dtc": Network(_part(_method("dtc", 2, (32, 16, 16), "vnet"), "network"), _both, "`dtc` on `vnet`"),
    "vnet_sassnet": Network(
        _part(_method("sassnet", 2, (32, 16, 16), "vnet"), "network"), _both, "`sassnet` on `vnet`"
    ),
    "mc_net_2d": Network(_method("mc_net", 4, (32, 48), "unet"), _decoders, "`mc_net` on `unet`"),
    "mc_net_plus_2d": Network(_method("mc_net_plus", 4, (32, 48), "unet"), _decoders, "`mc_net_plus` on `unet`"),
    "mc_net_3d": Network(_method("mc_net", 2, (32, 16, 16), "vnet"), _decoders, "`mc_net` on `vnet`"),
    "mc_net_plus_3d": Network(_method("mc_net_plus", 2, (32, 16, 16), "vnet"), _decoders, "`mc_net_plus` on `vnet`"),
    "discriminator_2d": Network(
        _part(_method("dan", 4, (224, 224), "unet"), "judge"), _verdicts, "discriminator of `dan`"
    ),
    "discriminator_3d": Network(
        _part(_method("dan", 2, (96, 96, 96), "unet3d"), "judge"), _verdicts, "discriminator of `dan`"
    ),
    "discriminator_sassnet": Network(
        _part(_method("sassnet", 2, (112, 112, 80), "vnet"), "judge"), _verdicts, "discriminator of `sassnet`"
    ),
}


def compared_network(name: str, dtype: torch.dtype) -> Iterator[Compared]:
    """Parameters, modules by kind, and outputs; outputs relative to their standard deviation."""
    entry: Entry = entries("networks")[name]
    network = fill(NETWORKS[name].build().to(dtype))
    count = sum(parameter.numel() for parameter in network.parameters())
    yield Compared("parameters", "number", apart(count, entry["parameters"]), (count,))
    yield from _compared_kinds(network, entry["by_kind"])
    with torch.no_grad():
        outputs = NETWORKS[name].run(network, [image(shape).to(dtype) for shape in entry["input_shapes"]])
    assert outputs.keys() == entry["outputs"].keys()
    for output, theirs in entry["outputs"].items():
        ours = outputs[output]
        assert list(ours.shape) == theirs["shape"]
        flat = ours.double().flatten()
        listed = [*theirs["first"], *theirs["last"]]
        found = {
            "mean": list_apart([float(flat.mean())], [theirs["mean"]], scale=theirs["std"]),
            "standard deviation": apart(float(flat.std(correction=0)), theirs["std"]),
            "projection": list_apart([projection(ours, mean=True)], [theirs["projection"]], scale=theirs["std"]),
            "entries": list_apart(
                [*flat[: len(theirs["first"])].tolist(), *flat[-len(theirs["last"]) :].tolist()],
                listed,
                scale=theirs["std"],
            ),
        }
        for what, difference in found.items():
            yield Compared(output, what, difference, numbers_of(flat[:2]))


def _compared_kinds(network: nn.Module, theirs: Mapping[str, Mapping[str, int]]) -> Iterator[Compared]:
    ours: dict[str, list[int]] = {}
    for module in network.modules():
        own = [parameter.numel() for parameter in module.parameters(recurse=False)]
        if own:
            counts = ours.setdefault(type(module).__name__, [0, 0])
            counts[0] += 1
            counts[1] += sum(own)
    assert ours.keys() == theirs.keys()
    for kind, (modules, parameters) in ours.items():
        expected = [theirs[kind]["modules"], theirs[kind]["parameters"]]
        yield Compared(
            kind, "modules and parameters", list_apart([modules, parameters], expected), (modules, parameters)
        )
