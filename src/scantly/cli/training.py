"""``scantly train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scantly.cli.arguments import parse_labeled, parse_size
from scantly.cli.output import say

if TYPE_CHECKING:
    from scantly.training.run import Run

__all__ = ["train"]


def train(
    dataset: Annotated[Path, typer.Argument(metavar="DATASET", help="Dataset folder.")],
    *,
    out: Annotated[Path, typer.Option("--out", metavar="RUN", help="Run folder: new, or one to --resume.")],
    method: Annotated[str | None, typer.Option("--method", metavar="NAME", help="One of `scantly methods`.")] = None,
    labeled: Annotated[
        str | None,
        typer.Option("--labeled", metavar="N|N%", help="Labeled subjects; all others are unlabeled. Default: all."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="NAME", help="A published protocol by name, or a YAML file of your own."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="YAML with sections data, plan, network, ..."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE ...", help="Any setting, for instance method.consistency=0.5."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            metavar="clean|literature",
            help="clean: test labels are not used before the end; literature: as published, flaws included.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="Iterations, all stages together. Default: 30000."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of all draws. Default: 1337.")] = None,
    seed_labeled: Annotated[
        int | None,
        typer.Option("--seed-labeled", metavar="N", help="Draw the labeled subjects; default: the first ones."),
    ] = None,
    dims: Annotated[
        int | None, typer.Option("--dims", metavar="2|3", help="Slices or volumes. Default: from the data.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="H W [D]", help="Patch in voxels; time and memory grow with their number."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="auto|cpu|cuda", help="Default: a GPU where there is one."),
    ] = None,
    devices: Annotated[int | None, typer.Option("--devices", metavar="N", help="Devices per node.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", help="Nodes (torchrun or SLURM).")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="32|bf16",
            help="bf16: mixed precision, about 1.5 times as fast on CPUs with bf16 units. Default: 32.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            help="Loader processes, which do not change the result. Default: 0, on a GPU 4.",
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Folder of prepared cases. Default: user cache."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue after the last checkpoint; the result is bit-identical."),
    ] = False,
) -> None:
    """Train a method into a run folder.

    The weaker first: defaults, plan from the data, --recipe, --config, options, --set. Ctrl-C writes a
    checkpoint and stops; a killed run loses at most a twentieth of its iterations.
    """
    flags = {
        "method": method,
        "labeled": parse_labeled(labeled),
        "seed_labeled": seed_labeled,
        "protocol": protocol,
        "steps": steps,
        "seed": seed,
        "dims": dims,
        "size": parse_size(size),
        "device": device,
        "devices": devices,
        "nodes": nodes,
        "precision": precision,
        "workers": workers,
        "store": str(store) if store else None,
    }
    from scantly.training.resolve import resolve

    resolved = resolve(dataset, recipe=recipe, config_file=config, flags=flags, sets=sets or [])
    import torch.distributed as dist

    from scantly.training.train import train_config

    run = train_config(resolved, out, resume=resume)
    if not dist.is_initialized() or dist.get_rank() == 0:
        _say_result(run)


def _say_result(run: Run) -> None:
    from scantly.methods import catalogue

    config, split = run.settings, run.split
    units = len({split.groups.get(case, case) for case in split.labeled})
    uses_unlabeled = catalogue.load(config.method_name).uses_unlabeled
    rest = f" and {len(split.unlabeled)} unlabeled" if split.unlabeled and uses_unlabeled else ""
    say(
        f"trained {config.method_name}, {config.training.steps} iterations, on {len(split.labeled)} labeled "
        f"({units} {split.unit}{'' if units == 1 else 's'}){rest} cases"
    )
    seconds, waited = run.timing()
    say(f"{seconds:.3g} s per iteration, {waited:.1%} of it waiting for data")
    say(f"run folder: {run.folder}")
    say("next:")
    if split.test or (split.val and config.evaluation.selection != "best"):
        say(f"  scantly evaluate {run.folder} --split {'test' if split.test else 'val'}")
    say(f"  scantly predict {run.folder} SCAN --out predictions")
