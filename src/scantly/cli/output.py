"""What commands print: answers on standard output, the log and errors on standard error."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from scantly.training.progress import ProgressLine

__all__ = ["log_to_stderr", "progress", "say", "say_json", "say_table", "say_wrapped", "warn"]

_WIDTH_OFF_TERMINAL = 160
_UNBOUNDED = 10_000
_WIDTH_OF_TEXT = 100


def say(text: str = "") -> None:
    """Write a line to standard output; if the reader has gone (``scantly methods | head``), end quietly."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at its end
        raise SystemExit(0) from None


def say_wrapped(text: str, *, indent: int = 2) -> None:
    """Write running text to standard output in short lines.

    Args:
        text: One paragraph.
        indent: Spaces before the first line; the next ones have two more.
    """
    first = " " * indent
    say(textwrap.fill(text, _WIDTH_OF_TEXT, initial_indent=first, subsequent_indent=first + "  "))


def say_json(value: Any) -> None:
    """Write one JSON document to standard output. NaN and infinities are refused (they are not JSON)."""
    say(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False))


def say_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", text_columns: int = 1) -> None:
    """Write a table to standard output.

    Running text is wrapped to the terminal. Numbers are never cut or wrapped: where the terminal is too narrow,
    rows and columns change places if that is narrower.

    Args:
        columns: Heads.
        rows: Cells; text is taken as it is, without markup.
        title: Line above the table.
        text_columns: So many columns from the left are set flush left, the others (numbers) flush right.
    """
    from rich.console import Console

    wraps = text_columns == len(columns)
    visible = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_OFF_TERMINAL
    console = Console(width=visible if wraps else _UNBOUNDED, markup=False, emoji=False, highlight=False)
    table = _table(columns, rows, text_columns)
    if not wraps and sys.stdout.isatty() and console.measure(table).maximum > visible:
        heads = [columns[0], *(row[0] for row in rows)]
        turned = _table(heads, [[head, *cells] for head, *cells in zip(columns, *rows, strict=True)][1:], 1)
        table = min(table, turned, key=lambda candidate: console.measure(candidate).maximum)
    with console.capture() as captured:
        console.print(table)
    if title:
        say(title)
    say("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < text_columns else "right")
    for row in rows:
        table.add_row(*row)
    return table


def warn(sentence: str) -> None:
    """Write one sentence to standard error."""
    sys.stderr.write(f"scantly: {sentence}\n")


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time: a live progress line replaces it to stay below."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        sys.stderr.write(f"{prefix}{self.format(record)}\n")


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the library's log, level ``INFO`` and above, on standard error while the block runs."""
    logger = logging.getLogger("scantly")
    handler, level, propagate = _StderrHandler(), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that configures the root logger must not make lines appear twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Progress of library functions that report ``(done, total, name)``, on standard error.

    Args:
        title: What is being done.
    """
    from scantly.training.progress import ProgressLine

    line: ProgressLine | None = None
    with ExitStack() as stack:

        def report(done: int, total: int, name: str) -> None:
            nonlocal line
            if line is None:
                line = stack.enter_context(ProgressLine(title, total))
            line.update(done, note=name)

        yield report
