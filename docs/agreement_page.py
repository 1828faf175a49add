"""Writes ``docs/agreement.md``: what of Scantly agrees with public code, from the tables of ``tests/golden``.

    python docs/agreement_page.py

A test holds the page to what this writes; other tests hold Scantly to what the page says.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scantly.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = Path(__file__).with_name("agreement.md")
GOLDEN = ROOT / "tests" / "golden"
_markdown = runpy.run_path(str(Path(__file__).with_name("protocol_page.py")))
_table, _wrapped, _item = (_markdown[name] for name in ("_table", "_wrapped", "_item"))

INTRODUCTION = (
    "Scantly's methods are written from papers and formulas. That they compute what the public code of the field "
    "computes is tested against numbers: that code was executed on inputs made by formula, in double precision, and "
    "its losses, gradients, schedules, network outputs, distance maps and metrics were written down "
    "([how](../tests/golden/README.md)). The tests in `tests/golden` give our methods the same inputs and compare; "
    "this page is made from their tables by `python docs/agreement_page.py`.",
    "Losses are those of the methods themselves (`Method.losses` with networks that answer with the given logits), for "
    "contrastive methods the functions they are made of, with default settings but for those named. Of a gradient the "
    "norm, ten entries and a projection that sees every entry are compared, for every input, and that no other input, "
    "nor a teacher's answer, has one. Networks have every parameter filled by a rule, and are compared in evaluation "
    "mode.",
    "The columns *float64* and *float32* are what the largest difference of an entry stays below on any processor, "
    "relative to the value; for gradients to their norm or largest entry (in float32 1e-5); for outputs of networks to "
    "their standard deviation; for distance maps absolute. float32 is the code as it is; for float64 its "
    "conversions to float32 are made to give double. When the page was first made, on an x86 processor, the largest in "
    "float64 were 3e-15 for losses and 4e-14 for networks, in float32 1.2e-6 and 2.4e-5.",
)
KINDS = {"losses": "Entry", "networks": "Network", "sdf": "Distance map of the mask", "metrics": "Metrics of"}
DEFAULTS = (
    "Beyond these, the settings named in the tables are those with which Scantly agrees where its default is another "
    "choice; the [page of the method](methods/index.md) says which and why. ARCO's nearest neighbors are compared with "
    "the roles of teacher and student that the paper has; in the public training they are swapped.",
)
LEFT_OUT = (
    "Dropout, augmentation and sampling are random by nature; draws that a loss needs were given. The decoder of CCT "
    "behind dropout, ARCO's pretraining network as a whole and its variance-reduced samplers, and PLGCL's selection of "
    "hard negatives are not compared. GapMatch, Diff-CL and the Pi-model have no public code. LCLPL's numbers come "
    "from a transcription of its TensorFlow code by hand, so that agreement means that two readings agree.",
)


def page() -> str:
    """The page, Markdown."""
    sys.path.insert(0, str(GOLDEN))
    try:
        losses, networks, values, deviations = map(
            importlib.import_module,
            ("loss_comparisons", "network_comparisons", "golden_values", "known_deviations"),
        )
    finally:
        sys.path.remove(str(GOLDEN))
    scale = {**losses.LOSSES, **losses.SCHEDULES}
    blocks = ["# Agreement with public code", *map(_wrapped, INTRODUCTION)]
    blocks += ["## Losses, gradients and schedules", _entries("losses", scale, values, deviations)]
    blocks += ["## Networks", _entries("networks", networks.NETWORKS, values, deviations)]
    blocks += ["## Distance maps and metrics", _masks(values, deviations)]
    blocks += ["## Known deviations", "\n".join(_deviations(deviations.KNOWN_DEVIATIONS))]
    blocks += map(_wrapped, DEFAULTS)
    blocks += ["## Not compared", *map(_wrapped, LEFT_OUT)]
    return "\n\n".join(blocks) + "\n"


def _entries(kind: str, comparisons: Mapping[str, Any], values: Any, deviations: Any) -> str:
    rows = []
    for name, entry in values.entries(kind).items():
        bounds = [_bound(kind, name, entry, deviations, precision) for precision in ("float64", "float32")]
        deviates = "below" if (kind, name) in deviations.KNOWN_DEVIATIONS else ""
        rows.append((f"`{name}`", _source(entry), comparisons[name].ours, *bounds, deviates))
    return str(_table(("entry", "public code", "Scantly", "float64", "float32", "deviation"), rows))


def _bound(kind: str, name: str, entry: Mapping[str, Any], deviations: Any, precision: str) -> str:
    """Of values; where one term has a bound of its own, both."""
    plain = getattr(deviations.BOUNDS[kind], precision)
    own = {
        term: getattr(bounds, precision)
        for term in entry.get("terms", {})
        if (bounds := deviations.BOUNDS.get(f"{kind} {name} {term}"))
    }
    others = [f"`{term}` {_power(bound)}" for term, bound in own.items() if bound != plain]
    return ", ".join([_power(plain), *others])


def _source(entry: Mapping[str, Any]) -> str:
    """Repositories, files and commits; an entry of several schedules has several."""
    found = [entry] if "source" in entry else [value for value in entry.values() if isinstance(value, dict)]
    sources = [each["source"] for each in found if "source" in each]
    said = {}
    for source in sources:
        said.setdefault((source["repository"], source["commit"][:7]), []).append(Path(source["file"]).name)
    return "; ".join(
        f"{repository} {commit}, {', '.join(f'`{file}`' for file in dict.fromkeys(files))}"
        for (repository, commit), files in said.items()
    )


def _masks(values: Any, deviations: Any) -> str:
    maps, metrics = values.golden("sdf"), values.golden("metrics")
    both = {"source": maps["source"][0]}, {"source": maps["source"][1]}
    rows = [
        (
            f"{len(maps['masks'])} masks, 2D and 3D",
            "; ".join(map(_source, both)),
            "`signed_distance`, `empty=zero`",
            *(_power(getattr(deviations.BOUNDS["sdf"], precision)) for precision in ("float64", "float32")),
            "below" if any(kind == "sdf" for kind, _ in deviations.KNOWN_DEVIATIONS) else "",
        ),
        (
            f"{len(metrics['pairs'])} pairs of masks, 2D and 3D, in voxels and mm",
            f"{metrics['source']['package']}, `medpy.metric.binary`",
            "Dice, Jaccard, HD95, ASD both ways, ASSD, by `score_case` too; HD by `surface_distances`",
            _power(deviations.BOUNDS["metrics"].float64),
            "",
            "",
        ),
    ]
    return str(_table(("what", "public code", "Scantly", "float64", "float32", "deviation"), rows))


def _deviations(known: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    if not known:
        yield "None."
    for (kind, name), deviation in known.items():
        terms = ", ".join(f"`{term}`" for term in deviation.values)
        ours = ". ".join(
            f"`{term}`: {_numbers(numbers)}" for term, numbers in deviation.values.items() if len(numbers) <= 4
        )
        shown = f" Scantly has {ours}." if ours else ""
        yield _item(f"{KINDS[kind]} `{name}`, {terms}: {deviation.reason}{shown}")


def _power(bound: float) -> str:
    return f"{bound:.0e}".replace("e-0", "e-")


def _numbers(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:,}" if isinstance(number, int) else f"{number:.6g}" for number in numbers)


if __name__ == "__main__":
    write_text(PAGE, page())
