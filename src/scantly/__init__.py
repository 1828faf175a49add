"""Scantly: medical image segmentation from a few labeled scans and many unlabeled ones.

Example:
    >>> import scantly
    >>> run = scantly.train("acdc", method="mean_teacher", labeled=7, out="runs/mt")  # doctest: +SKIP
    >>> run.evaluate("test")  # doctest: +SKIP
    >>> scantly.predict(run.folder, ["scan.nii.gz"], out="predictions")  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scantly._version import __version__

if TYPE_CHECKING:
    from scantly.data.checks import check
    from scantly.data.create import init
    from scantly.errors import ScantlyError
    from scantly.inference.predict import predict
    from scantly.methods.base import Method
    from scantly.methods.catalogue import methods
    from scantly.report import compare
    from scantly.training.folders import evaluate_folders as evaluate
    from scantly.training.resolve import plan
    from scantly.training.run import Run
    from scantly.training.train import train

__all__ = [
    "Method",
    "Run",
    "ScantlyError",
    "__version__",
    "check",
    "compare",
    "evaluate",
    "init",
    "methods",
    "plan",
    "predict",
    "train",
]

_PLACES = {
    "Method": "scantly.methods.base:Method",
    "Run": "scantly.training.run:Run",
    "ScantlyError": "scantly.errors:ScantlyError",
    "check": "scantly.data.checks:check",
    "compare": "scantly.report:compare",
    "evaluate": "scantly.training.folders:evaluate_folders",
    "init": "scantly.data.create:init",
    "methods": "scantly.methods",
    "plan": "scantly.training.resolve:plan",
    "predict": "scantly.inference.predict:predict",
    "train": "scantly.training.train:train",
}


def __getattr__(name: str) -> Any:
    """Import on first use: ``import scantly`` and ``scantly --help`` stay fast."""
    if name not in _PLACES:
        raise AttributeError(f"module 'scantly' has no attribute {name!r}")
    place, _, attribute = _PLACES[name].partition(":")
    module = import_module(place)
    value = getattr(module, attribute) if attribute else module  # the package of methods can be called
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
