"""The command line. No logic here: every command makes one call to the Python API and prints the result."""

from evomerge.cli.main import main

__all__ = ["main"]
