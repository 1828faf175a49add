"""The command line: parse, call the library, print.

Exit status 0; 2 when the user can mend it (one sentence on standard error); 1 for a fault of Scantly. Answers
go to standard output, everything else to standard error. Heavy libraries are imported inside the commands, so
that ``scantly --help`` answers at once.
"""

from scantly.cli.entry import main

__all__ = ["main"]
