"""Removes the shared memory that the processes of a tensor-parallel engine leave behind when they are killed.

Such processes communicate through segments and semaphores in `/dev/shm` that only an orderly shutdown removes. A small helper process outlives
the engine, waits until it has ended in whatever way, and removes what is left. This file is also the helper's program: it imports neither torch
nor vLLM, so that waiting takes only a few megabytes.
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
"""Interval at which the engine's processes are checked for new segments."""
_PATIENCE_S = 120.0
"""Maximum wait for the engine's processes to end; they notice its end by themselves within seconds."""


class SegmentKeeper:
    """Waits until this process ends or `close` is called, and then removes an engine's segments as soon as no process uses them.

    Create it after the engine's processes have started: a process that inherits the write end of the pipe would keep it open after this process ends.

    Args:
        earlier: the result of `mapped_segments` for this process before the engine started; these are not the engine's.
        processes: the engine's other processes; every segment they map belongs to the engine.
    """

    def __init__(self, earlier: Collection[str], processes: Collection[int]) -> None:
        end, self._pipe = os.pipe()
        names = sorted(mapped_segments(os.getpid()) - set(earlier))
        command = [sys.executable, "-I", "-S", __file__, ",".join(map(str, processes)), *names]
        nowhere = subprocess.DEVNULL
        try:
            # Returns at once: the helper forks and its parent exits, so that it is not our child.
            subprocess.run(  # noqa: S603
                command, stdin=end, stdout=nowhere, stderr=nowhere, cwd="/", check=True, start_new_session=True
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(end)

    def close(self) -> None:
        """Allow the segments to be removed."""
        os.close(self._pipe)


def mapped_segments(*processes: int) -> set[str]:
    """Names of the files in `/dev/shm` that processes have mapped; processes that have ended or cannot be inspected count as having none."""
    inodes = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process}/maps").read_text().splitlines():
                if f"{_SHARED_MEMORY}/" in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    # Match by inode, not by the name in the map: a semaphore is created under a different name and then renamed.
    with suppress(FileNotFoundError), os.scandir(_SHARED_MEMORY) as entries:
        return {entry.name for entry in entries if entry.inode() in inodes}
    return set()


def _keep(processes: Collection[int], names: Collection[str]) -> None:
    """The helper's main function: waits for the end of standard input, then removes each segment once no process uses it."""
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
