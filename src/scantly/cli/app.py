"""The commands, in the order in which a user meets them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from scantly._version import __version__
from scantly.cli import benchmark, dataset, demonstration, info, results, training
from scantly.cli.arguments import examples
from scantly.cli.output import say
from scantly.errors import RunError

__all__ = ["app"]


class _Commands(TyperGroup):
    """The group of commands; Ctrl-C ends any of them with a sentence and status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise RunError(
                "stopped by Ctrl-C; every file that was written is whole, and the same command (train: with "
                "--resume) goes on from there."
            ) from None


app = typer.Typer(
    name="scantly",
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)


def _version(value: bool) -> None:
    if value:
        say(f"scantly {__version__}")
        raise typer.Exit


@app.callback(
    epilog=examples(
        "scantly demo",
        "scantly methods",
        "scantly train DATASET --method mean_teacher --labeled 7 --out runs/mean-teacher",
    )
)
def _scantly(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere on the command line.")
    ] = False,
) -> None:
    """Medical image segmentation from a few labeled scans and many unlabeled ones.

    Exit status: 0; 2 if you can mend it (one sentence says how); 1 for a fault of Scantly.
    """


for _command, _epilog in (
    (demonstration.demo, examples("scantly demo", "scantly demo --out my-demo")),
    (info.methods, examples("scantly methods", "scantly methods mean_teacher", "scantly methods --json")),
    (
        dataset.init,
        examples(
            "scantly init DATASET --images scans --labels annotations",
            "scantly init DATASET --images scans --labels annotations --copy",
        ),
    ),
    (dataset.check, examples("scantly check DATASET", "scantly check DATASET --json > findings.json")),
    (
        info.plan,
        examples(
            "scantly plan DATASET",
            "scantly plan DATASET --out plan.yaml",
            "scantly train DATASET --config plan.yaml --method supervised --out runs/supervised",
        ),
    ),
    (
        training.train,
        examples(
            "scantly train DATASET --method supervised --labeled 7 --out runs/supervised",
            "scantly train DATASET --method mean_teacher --labeled 10% --out runs/mean-teacher",
            "scantly train DATASET --method mean_teacher --labeled 10% --out runs/mean-teacher --resume",
            "scantly train ACDC --recipe acdc --method mean_teacher --labeled 7 --size 128 128 --out RUN",
            "scantly train DATASET --method mean_teacher --out RUN --set training.lr=0.02",
        ),
    ),
    (
        results.predict,
        examples(
            "scantly predict runs/mean-teacher scan.nii.gz --out predictions",
            "scantly predict runs/mean-teacher scans/ --out predictions --uncertainty",
            "scantly predict runs/mean-teacher scans/ --out predictions --window whole --precision bf16",
        ),
    ),
    (
        results.evaluate,
        examples(
            "scantly evaluate runs/mean-teacher",
            "scantly evaluate runs/mean-teacher --split val --json",
            "scantly evaluate --predictions predictions --labels DATASET/labelsTs",
        ),
    ),
    (
        results.compare,
        examples(
            "scantly compare runs/supervised runs/mean-teacher",
            "scantly compare runs/* --out comparison.html --json",
        ),
    ),
    (
        benchmark.benchmark,
        examples(
            "scantly benchmark acdc.yaml --out results --dry-run",
            "scantly benchmark acdc.yaml --out results --processes 2",
            "scantly benchmark acdc.yaml --out results --retry-failed",
        ),
    ),
):
    app.command(epilog=_epilog)(_command)
