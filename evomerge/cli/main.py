"""`evomerge`: the entry point and what its exit codes mean (0 done, 1 internal error, 2 bad input, 130 interrupted and saved)."""

import os
import sys
import threading
from typing import NoReturn

from evomerge.cli.app import app
from evomerge.cluster.local_pool import THREAD_NAME
from evomerge.core import EvomergeError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def main() -> None:
    """Runs the command line and exits. Usage errors exit with 2 as well; anything unforeseen keeps its traceback and exits with 1."""
    try:
        app()
    except EvomergeError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()


def _exit(code: int) -> NoReturn:
    """Exits; past the interpreter's shutdown where an abandoned evaluation still runs, since C++ code aborts when its thread is ended."""
    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
