"""Removes the shared memory that the processes of a tensor-parallel engine leave behind where they are killed.

Such processes talk through segments and semaphores in `/dev/shm` that only an orderly end removes. A small process of its own outlives
the engine, waits for its end, orderly or not, and removes what is left of them. This file is also that process's program: it imports neither torch
nor vLLM, so that waiting costs a few megabytes.
"""

import os
import select
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

__all__ = ["SegmentKeeper", "mapped_segments"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (where the system puts it)
_LOOK_EVERY_S = 2.0
"""How often the engine's processes are looked at for segments that they have made since."""
_PATIENCE_S = 120.0
"""They notice the engine's end by themselves, within seconds."""


class SegmentKeeper:
    """Waits for the end of this process, or for `close`, and then removes an engine's segments as soon as nobody uses them.

    Make it when the engine has started: processes that start later would hold the pipe whose end tells of this process's.

    Args:
        earlier: what `mapped_segments` said of this process before the engine started, so that is not the engine's.
        processes: the engine's other processes; everything they use is the engine's.
    """

    def __init__(self, earlier: Collection[str], processes: Collection[int]) -> None:
        end, self._pipe = os.pipe()
        names = sorted(mapped_segments(os.getpid()) - set(earlier))
        command = [sys.executable, "-I", "-S", __file__, ",".join(map(str, processes)), *names]
        nowhere = subprocess.DEVNULL
        # returns at once: the program leaves its first process, so that it is nobody's child
        subprocess.run(  # noqa: S603
            command, stdin=end, stdout=nowhere, stderr=nowhere, cwd="/", check=True, start_new_session=True
        )
        os.close(end)

    def close(self) -> None:
        """The segments may go."""
        os.close(self._pipe)


def mapped_segments(*processes: int) -> set[str]:
    """Names of the files in `/dev/shm` that processes have mapped; those that have gone, or may not be looked at, have none."""
    inodes = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                if f"{_SHARED_MEMORY}/" in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    # not the names in the list: a semaphore is made under another name than it gets
    with suppress(FileNotFoundError), os.scandir(_SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if entry.inode() in inodes}
    return set()


def _keep(processes: Collection[int], names: Collection[str]) -> None:
    """The program: waits for the end of standard input, then for the last process that uses a segment."""
    wanted = set(names)
    ended = False
    while not ended:
        wanted |= mapped_segments(*processes)
        ready, _, _ = select.select([0], [], [], _LOOK_EVERY_S)
        ended = bool(ready)
    deadline = time.monotonic() + _PATIENCE_S
    while wanted and time.monotonic() < deadline:
        used = mapped_segments(*(int(entry) for entry in os.listdir("/proc") if entry.isdigit()))
        for name in wanted - used:
            (_SHARED_MEMORY / name).unlink(missing_ok=True)
        wanted &= used
        time.sleep(0.2)


if __name__ == "__main__" and os.fork() == 0:
    _keep([int(pid) for pid in sys.argv[1].split(",")], sys.argv[2:])
