"""Methods: one file per paper, the contract in :mod:`scantly.methods.base`, shared pieces in ``parts``.

The catalogue is read without importing torch: see :mod:`scantly.methods.catalogue`. Called, the package gives it:
``scantly.methods()``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scantly.methods.catalogue import Entry


class _Methods(ModuleType):
    """Package and public function have one name: Python sets the package on ``scantly`` whenever it is imported."""

    def __call__(self) -> dict[str, Entry]:
        """All methods by name, see :func:`scantly.methods.catalogue.methods`."""
        from scantly.methods import catalogue

        return catalogue.methods()


sys.modules[__name__].__class__ = _Methods
