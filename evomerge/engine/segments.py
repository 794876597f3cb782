"""Removes the shared memory that the processes of a tensor-parallel engine leave behind where they are killed.

Such processes talk through segments in `/dev/shm` that only an orderly end removes. A small process of its own outlives the engine,
waits for its end, orderly or not, and removes what is left of them. This file is also that process's program: it imports neither torch
nor vLLM, so that waiting costs a few megabytes.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

__all__ = ["SegmentKeeper", "mapped_segments", "segments_in_use"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (where the system puts it)
_PATIENCE_S = 120.0
"""The engine's other processes notice its end by themselves, within seconds."""


class SegmentKeeper:
    """Waits for the end of this process, or for `close`, and then removes segments as soon as nobody uses them.

    Make it when the engine has started: processes that start later would hold the pipe whose end tells of this process's.

    Args:
        names: files in `/dev/shm`.
    """

    def __init__(self, names: Collection[str]) -> None:
        end, self._pipe = os.pipe()
        command = [sys.executable, "-I", "-S", __file__, *sorted(names)]
        nowhere = subprocess.DEVNULL
        # returns at once: the program leaves its first process, so that it is nobody's child
        subprocess.run(  # noqa: S603
            command, stdin=end, stdout=nowhere, stderr=nowhere, cwd="/", check=True, start_new_session=True
        )
        os.close(end)

    def close(self) -> None:
        """The segments may go."""
        os.close(self._pipe)


def segments_in_use() -> set[str]:
    """Names of the files in `/dev/shm` that this process and its descendants have mapped."""
    import psutil

    family = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    return set().union(*map(mapped_segments, family))


def mapped_segments(pid: int) -> set[str]:
    """Names of the files in `/dev/shm` that a process has mapped; none where it has gone or may not be looked at."""
    names = set()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            _, found, name = line.partition(f"{_SHARED_MEMORY}/")
            if found and not name.endswith(" (deleted)"):
                names.add(name)
    return names


def _keep(names: Collection[str]) -> None:
    """The program: waits for the end of standard input, then for the last process that uses a segment."""
    while os.read(0, 1):
        pass
    wanted = set(names)
    deadline = time.monotonic() + _PATIENCE_S
    while wanted and time.monotonic() < deadline:
        used = set().union(*(mapped_segments(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()))
        for name in wanted - used:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)
        wanted &= used
        time.sleep(0.2)


if __name__ == "__main__" and os.fork() == 0:
    _keep(sys.argv[1:])
