"""The terminal that tables and lines are printed on."""

import os
import sys
from typing import TextIO

from rich.console import Console

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
"""Wide in a log file, where there is no screen to fit into: names must stay whole. Without markup: paths, names of parameters and messages hold
square brackets of their own."""


_LARGE = 1e6
"""Perplexities of merges that went wrong have dozens of digits."""


def number(value: float, digits: int, sign: str = "") -> str:
    """A score with so many digits after the point, or of a large one so many in all; with `sign` "+" also of positive ones the sign."""
    return f"{value:{sign}.{digits}{'f' if abs(value) < _LARGE else 'g'}}"


def say(text: str, stream: TextIO | None = None) -> None:
    """Prints a line at once, to standard output unless said.

    Where nobody takes it any more (a closed terminal, a pipe whose reader has ended, a full disk) this line and all later ones are lost: a search must
    not end for that.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
