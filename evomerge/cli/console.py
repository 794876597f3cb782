"""The terminal that tables and lines are printed on."""

import sys

from rich.console import Console

CONSOLE = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
"""Wide in a log file, where there is no screen to fit into: names must stay whole. Without markup: paths, names of parameters and messages hold
square brackets of their own."""
