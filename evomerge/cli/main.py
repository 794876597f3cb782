"""The entry point of `evomerge` and its exit codes: 0 done, 1 internal error, 2 bad input, 130 interrupted and saved."""

import errno
import io
import os
import sys
import threading
import traceback
from typing import NoReturn

from evomerge.cli.interrupts import EXIT_INTERRUPTED, ignore_interrupts, take_interrupts, was_interrupted

EXIT_INTERNAL = 1
EXIT_BAD_INPUT = 2

_REFUSED_BY_DISK = {
    errno.EDQUOT: "the disk quota is used up",
    errno.ENAMETOOLONG: "the name is longer than the file system allows",
    errno.ENOSPC: "no space is left on the disk",
    errno.EROFS: "the file system is read-only",
}


def main() -> NoReturn:
    """Run the command line and exit. Usage errors also exit with 2; unexpected errors show their traceback and exit with 1."""
    take_interrupts()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # as stderr does: a character missing in the terminal's encoding must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _command()
    except KeyboardInterrupt:
        from evomerge.cli.console import say

        say("interrupted", sys.stderr)
        code = EXIT_INTERRUPTED
    ignore_interrupts()
    _exit(code)


def _command() -> int:
    """Run the command and return its exit code. Imports are done here so that interrupts during them are handled like any other."""
    from evomerge.core import EvomergeError, collect_rarely

    collect_rarely()
    from evomerge.cli.app import app

    try:
        app()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_INTERNAL if end.code else 0
    except Exception as error:  # the outermost handler: the user must be told what to do next
        if was_interrupted():
            raise KeyboardInterrupt from error
        hints = error.__dict__.pop("__notes__", [])  # printed below
        refusal = str(error) if isinstance(error, EvomergeError) else _refusal(error)
        if refusal is not None:
            print("\n".join([f"error: {refusal}", *hints]), file=sys.stderr)
            return EXIT_BAD_INPUT
        traceback.print_exc()
        print(f"\ninternal error: {type(error).__name__}: {error}", file=sys.stderr)
        print("\n".join(["This is a bug in evomerge or a library; the traceback is above.", *hints]), file=sys.stderr)
        return EXIT_INTERNAL
    return 0


def _refusal(error: Exception) -> str | None:
    """The message for a file system error that the user can fix; None for any other error."""
    if isinstance(error, PermissionError):
        return f"{error.filename or error}: permission denied; change its permissions, or choose another path"
    if isinstance(error, OSError) and error.errno in _REFUSED_BY_DISK:
        return f"{error.filename or 'cannot be written'}: {_REFUSED_BY_DISK[error.errno]}"
    return None


def _exit(code: int) -> NoReturn:
    """Exit; if an abandoned evaluation is still running, skip the interpreter's shutdown, since C++ code aborts when its thread is ended."""
    from evomerge.cluster.local_pool import THREAD_NAME

    if any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
