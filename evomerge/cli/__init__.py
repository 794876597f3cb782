"""The command line. No logic here: every command is one call of the Python API and some printing."""

from evomerge.cli.main import main

__all__ = ["main"]
