"""Printing to the terminal."""

import os
import sys
from typing import TextIO

from rich.console import Console

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
"""Wide if the output is not a terminal, so that names are not cut. No markup, since paths, parameter names and messages contain square brackets."""


_LARGE = 1e6
"""From here on numbers are printed in scientific notation: perplexities of failed merges have dozens of digits."""


def number(value: float, digits: int, sign: str = "") -> str:
    """Format a score with `digits` decimal places, or, if it is large, `digits` significant digits; `sign="+"` shows plus signs too."""
    return f"{value:{sign}.{digits}{'f' if abs(value) < _LARGE else 'g'}}"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line and flush, to standard output by default.

    If the stream can no longer be written to (a closed terminal, a pipe without a reader, a full disk), this line and all later ones are dropped:
    a search must not fail because of that.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
