"""The options of ``predict`` and ``evaluate`` that say how whole scans are predicted."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import typer

from scantly.cli.arguments import parse_size
from scantly.errors import ConfigError

__all__ = [
    "Batch",
    "Flips",
    "LargestComponent",
    "MethodSettings",
    "Overlap",
    "Precision",
    "Size",
    "Stride",
    "Window",
    "method_settings",
    "overrides",
]

Window: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--window",
        metavar="gaussian|uniform|whole",
        help="Overlapping windows with Gaussian or equal weights, or one pass over the whole scan (fastest, most "
        "memory). Default of this and the next options: as the run says.",
    ),
]
Overlap: TypeAlias = Annotated[
    float | None, typer.Option("--overlap", metavar="SHARE", help="Overlap of neighboring windows, 0 to below 1.")
]
Stride: TypeAlias = Annotated[
    str | None,
    typer.Option("--stride", metavar="H W [D]", help="Distance of windows in voxels, instead of --overlap."),
]
Size: TypeAlias = Annotated[
    str | None,
    typer.Option("--size", metavar="H W [D]", help="Window in voxels instead of the training patch: less memory."),
]
Flips: TypeAlias = Annotated[
    bool | None,
    typer.Option("--flips/--no-flips", help="Average over all flips: 4 (2D) or 8 (3D) times the time."),
]
LargestComponent: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--largest-component/--all-components", help="Keep the largest component of each foreground class only."
    ),
]
Batch: TypeAlias = Annotated[
    int | None, typer.Option("--batch", metavar="N", help="Windows per pass: speed and memory only.")
]
Precision: TypeAlias = Annotated[
    str | None, typer.Option("--precision", metavar="32|bf16", help="bf16: 2 to 3 times faster. Default: 32.")
]


MethodSettings: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="method.KEY=VALUE ...",
        help="What a finished model can be asked to do differently, for instance method.infer=ds of Diff-CL.",
    ),
]


def method_settings(assignments: list[str] | None) -> dict[str, Any]:
    """The values of ``--set method.KEY=VALUE``.

    Raises:
        ConfigError: for anything else than settings of the method.
    """
    from scantly.training.resolve import parse_sets

    values = parse_sets(assignments or [])
    for section, settings in values.items():
        if section != "method" or not isinstance(settings, dict):
            raise ConfigError(f"--set {section} is nothing that a finished model can change; only method.* is.")
    return dict(values.get("method", {}))


def overrides(
    *,
    window: str | None,
    overlap: float | None,
    stride: str | None,
    size: str | None,
    flips: bool | None,
    largest_component: bool | None,
    batch: int | None,
) -> dict[str, Any]:
    """The given ones as settings of :class:`~scantly.inference.settings.InferenceSettings`.

    Raises:
        ConfigError: for a stride or size that is not two or three numbers.
    """
    values = {
        "window": window,
        "overlap": overlap,
        "stride": _depth_first(parse_size(stride, "--stride")),
        "patch_size": _depth_first(parse_size(size)),
        "flips": flips,
        "largest_component": largest_component,
        "batch": batch,
    }
    return {name: value for name, value in values.items() if value is not None}


def _depth_first(sides: list[int] | None) -> list[int] | None:
    """The literature's H W [D] in the order of our arrays."""
    return [sides[2], *sides[:2]] if sides is not None and len(sides) == 3 else sides
