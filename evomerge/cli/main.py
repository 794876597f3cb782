"""`evomerge`: the entry point and what its exit codes mean (0 done, 1 internal error, 2 bad input, 130 interrupted and saved)."""

import sys

import click

from evomerge.cli.app import app
from evomerge.core import EvomergeError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the command line and exits."""
    try:
        code = app(standalone_mode=False)
    except EvomergeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)
