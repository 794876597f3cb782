"""`evomerge`: the entry point and what its exit codes mean (0 done, 1 internal error, 2 bad input, 130 interrupted and saved)."""

import sys

from evomerge.cli.app import app
from evomerge.core import EvomergeError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the command line and exits. Usage errors exit with 2 as well; anything unforeseen keeps its traceback and exits with 1."""
    try:
        app()
    except EvomergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
