"""How the process's memory is managed while a command runs."""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGE = 1 << 30
_USERS_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> None:
    """Let glibc use freed blocks again instead of returning each to the system.

    By default glibc maps every large block anew and unmaps it when it is freed, and the system clears each page
    before it is used: a third of the CPU time of a 3D training step (``benchmarks/allocator.py``). Results do not
    change. Nothing is done where the user has chosen an allocator or its thresholds, or with another C library.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _USERS_OWN):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGE)
