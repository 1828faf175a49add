"""Freed memory is used again, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ROUNDS, MEGABYTES = 20, 64
COUNT_FAULTS = f"""
import resource
import numpy as np
from scantly.cli.allocator import keep_freed_memory
keep_freed_memory()
np.full({MEGABYTES} << 20, 1, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    np.full({MEGABYTES} << 20, 1, np.uint8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() >> 20)
"""


def faulted_megabytes(**environment: str) -> int:
    """Memory that the system had to hand out, page by page, to fill one large array after the other."""
    # arrays are not put into huge pages, of which one fault brings in hundreds
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    own = {**clean, "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True, env=own)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the allocator on Linux")
def test_freed_memory_is_used_again() -> None:
    assert faulted_megabytes() < MEGABYTES
    assert faulted_megabytes(MALLOC_TRIM_THRESHOLD_="0") >= ROUNDS * MEGABYTES / 2  # the user's own choice
