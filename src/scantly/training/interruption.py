"""Ctrl-C and SIGTERM during a training."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Interruption"]

_LOGGER = logging.getLogger("scantly")


class Interruption:
    """Whether the user has asked to stop.

    Attributes:
        requested: Set by the first Ctrl-C or SIGTERM.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the first Ctrl-C or SIGTERM is noted; a second one ends the process at once."""
        owner = os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            if os.getpid() != owner:  # a loader's process, forked a moment ago, that has not set its own handlers yet
                if number == signal.SIGTERM:
                    signal.signal(number, signal.SIG_DFL)
                    os.kill(os.getpid(), number)
                return
            if self.requested:
                signal.default_int_handler(number, frame)
            self.requested = True
            _LOGGER.info("stopping after this iteration; again to stop at once")

        try:
            previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signal handlers exist in the main thread only
            yield
            return
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
