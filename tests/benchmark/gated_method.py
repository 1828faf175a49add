"""A method of another package, for tests: supervised, but it waits, fails or fills a disk where a test says so."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from scantly.methods.supervised import Supervised


class Gated(Supervised):
    """Supervised training that stops where a test wants to look."""

    class Config(Supervised.Config):
        """Where and how."""

        gate: str = Field("", description="While this file is there, the training waits.")
        at: int = Field(7, description="Iteration, from 0, from which it waits or fails.")
        fault: str = Field("", description="Kind of failure: error, loss, full or exit.")

    def losses(self, batch: Any, progress: Any) -> Any:
        terms = super().losses(batch, progress)
        if progress.run_iteration >= self.config.at:
            self._wait()
            if self.config.fault == "error":
                raise AttributeError("the method\nis broken")
            if self.config.fault == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
            if self.config.fault == "exit":
                os._exit(3)
            if self.config.fault == "loss":
                terms["supervised"] = terms["supervised"] / 0
        return terms

    def _wait(self) -> None:
        gate = Path(self.config.gate)
        if self.config.gate and gate.exists():
            mark = gate.with_name(f"{gate.name}-{os.getpid()}")
            mark.touch()
            while gate.exists():
                time.sleep(0.02)
            mark.unlink()
