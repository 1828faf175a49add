"""What makes the methods small enough for tests of the whole catalogue."""

from __future__ import annotations

from typing import Any

__all__ = ["LEVELS", "SMALL"]

#: Settings that cost time and change nothing in how a method works; and the optimizer of the tests, because a method's
#: own may be too slow for thirty steps.
SMALL: dict[str, dict[str, Any]] = {
    "arco": {"dense_channels": 8, "anchors": 32, "negatives_per_anchor": 16},
    "plgcl": {"patch_budget": 16, "ema_rampup": True},
    "lclpl": {"optimizer": "recipe"},
}

#: Levels of the tests' networks, where two are too few.
LEVELS = {"urpc": 3}
