"""A tensor-parallel engine that is killed leaves no processes, shared memory or sockets behind."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from evomerge.engine.segments import mapped_segments
from evomerge.testing.engines import cannot_start
from evomerge.testing.tiny_models import write_tiny_llama

START = """
import os, sys, time
from pathlib import Path
from evomerge.engine import engine_environment, make_engine
os.environ.update(engine_environment())
if __name__ == "__main__":
    engine = make_engine("vllm", Path(sys.argv[1]), max_model_len=64, options={"tensor_parallel_size": 2})
    print("started", flush=True)
    time.sleep(600)
"""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # a zombie has ended but has not been waited for yet
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm"))
def test_a_killed_engine_of_two_processes_leaves_nothing_behind(
    tmp_path: Path, left_in_shared_memory: Callable[[], set[str]]
) -> None:
    write_tiny_llama(tmp_path / "model", seed=0)
    script = tmp_path / "start.py"
    script.write_text(START)
    short = tempfile.TemporaryDirectory()  # paths of sockets may have at most 107 characters
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": short.name},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        assert [path for path in Path(short.name).rglob("*") if path.is_socket()] == [], (
            "sockets that are already connected should have no files"
        )
        family = psutil.Process(process.pid).children(recursive=True)
        assert mapped_segments(process.pid), "an engine of several processes should communicate through shared memory"
    finally:
        process.kill()
        process.wait()
        short.cleanup()
    deadline = time.monotonic() + 60
    while alive := [member for member in family if _is_alive(member)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)
    assert left_in_shared_memory() == set()
