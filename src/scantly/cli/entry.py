"""The entry point: arguments made ready for the parser, errors turned into sentences and exit statuses."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType

from typer.main import get_command

from scantly.cli.allocator import keep_freed_memory
from scantly.cli.app import app
from scantly.cli.arguments import join_values, take_debug
from scantly.cli.output import log_to_stderr, warn
from scantly.errors import PeerError, ScantlyError

__all__ = ["main"]

_USER_FAULT = 2
_OF_THE_SYSTEM = {
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space within your quota",
    errno.EFBIG: "raise the limit on file sizes or choose another disk",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: Words after ``scantly``; ``None``: those of the process.

    Raises:
        SystemExit: always. Status 0; 2 for what the user can mend. An exception that no user can mend passes
            through; the interpreter then prints a request to report it and exits with status 1.
    """
    keep_freed_memory()
    words, debug = take_debug(sys.argv[1:] if arguments is None else arguments)
    if not debug:
        sys.excepthook = _report_fault
        # what torch's own layer below Python says of a process that is gone is told in a sentence of ours
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with log_to_stderr(), warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")  # libraries' advice to programmers; ours goes through the logger
        try:
            get_command(app).main(join_values(words), prog_name="scantly")
        except PeerError as error:
            _refuse(str(error), debug=debug, quiet=True)
        except ScantlyError as error:
            _refuse(str(error), debug=debug, quiet=_another_tells())
        except OSError as error:
            if error.errno not in _OF_THE_SYSTEM:
                raise
            place = error.filename or "a file"
            _refuse(f"cannot use {place}: {error.strerror}; {_OF_THE_SYSTEM[error.errno]}.", debug=debug)


def _refuse(sentence: str, *, debug: bool, quiet: bool = False) -> None:
    if debug:
        traceback.print_exc()
    if not quiet:
        warn(sentence)
    sys.exit(_USER_FAULT)


def _another_tells() -> bool:
    """Whether torchrun's first process on this machine meets the same fault: before the processes have met, all do."""
    distributed = sys.modules.get("torch.distributed")
    met = distributed is not None and distributed.is_initialized()
    return not met and os.environ.get("LOCAL_RANK", "0") != "0"


def _report_fault(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:  # pragma: no cover (runs while the interpreter ends; tested in a process of its own)
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    reason = " ".join(str(error).split()) or "no message"
    warn(
        f"this is a fault of Scantly, not of your input: {kind.__name__}: {reason}. Run the same command "
        "with --debug to see the traceback, and please report it with that."
    )
