"""Runs tasks that contain code, or that execute code written by the model, in a sandboxed process without network access.

Such a task is loaded and its answers are scored in a child process (`sandbox_process`) in its own Linux namespaces: no network
interface, no view of other processes, no privileges, an environment without the user's variables, bounded memory and file sizes, and
no permission to change files outside a scratch folder. The worker itself never imports the task's code. If the kernel or the container does
not allow this, the task is refused: there is no weaker mode.
"""

import json
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.core import EvaluationError, Split
from evomerge.engine import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.evaluation.items import Items
from evomerge.evaluation.task_files import is_task_file
from evomerge.evaluation.task_items import no_items
from evomerge.evaluation.task_spec import TaskSpec

MEMORY_BYTES = 16 << 30
"""Address space limit of a process in the sandbox; the libraries that lm-eval imports map a few gigabytes of it."""
FILE_BYTES = 1 << 30
"""Size limit of a file that it writes; data sets are converted into its scratch folder."""
LOAD_TIMEOUT_S = 600.0
_TRY_S = 60.0
"""Timeout of the trial process, which does nothing."""
_MAX_ANSWER_BYTES = 1 << 30
_LONGEST_WAIT_MS = (1 << 31) - 1
"""The longest timeout that `poll` accepts: 24 days."""

_NONSENSE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
"""Errors raised when arbitrary JSON is read as the items of a task."""

_ISOLATED = (
    "setpriv", "--pdeathsig", "KILL",
    "unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--mount-proc", "--fork", "--kill-child=KILL",
)  # fmt: skip
"""util-linux commands: end with this process, and run in new namespaces whose processes all end together."""

_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "OMP_NUM_THREADS")


@cache
def check_sandbox() -> None:
    """Check that this machine can isolate a process.

    Raises:
        EvaluationError: it cannot; gives the reason.
    """
    advice = (
        "so task code cannot be isolated from the network and is refused. Allow unprivileged user namespaces (in a container: a "
        "seccomp profile that permits unshare), or use a task without code"
    )
    for program in ("setpriv", "unshare"):
        if shutil.which(program) is None:
            raise EvaluationError(f"sandbox: {program} (util-linux) is not installed, {advice}")
    try:
        tried = subprocess.run([*_ISOLATED, "true"], capture_output=True, text=True, timeout=_TRY_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise EvaluationError(f"sandbox: an isolated process did not end within {_TRY_S:g} s, {advice}") from None
    if tried.returncode:
        raise EvaluationError(f"sandbox: this machine cannot isolate a process ({tried.stderr.strip()}), {advice}")


class SandboxedTask:
    """Like `LoadedTask`, with the task in a separate, sandboxed process. Not thread-safe.

    Args:
        spec: which task, metric and splits.
        tokenizer: folder of the models' tokenizer.
        timeout_s: time limit for scoring one split's answers; after it, the process is killed and a new one is started for the next.
        processes: number of processes that score in parallel, inside the same sandbox.

    Raises:
        EvaluationError: this machine cannot isolate a process, or as for `load_task`.
    """

    def __init__(self, spec: TaskSpec, tokenizer: Path, *, timeout_s: float, processes: int = 1) -> None:
        self._spec, self._tokenizer, self._timeout_s, self._processes = spec, tokenizer, timeout_s, processes
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        loaded = self._start()
        try:
            self.name, self.metric, self.filter = (str(loaded[key]) for key in ("name", "metric", "filter"))
            self.splits: Mapping[Split, SandboxedItems] = {
                Split(name): SandboxedItems(self, Split(name), content) for name, content in loaded["splits"].items()
            }
        except _NONSENSE as error:
            raise self._nonsense(error) from error

    def items(self, split: Split) -> "SandboxedItems":
        """See `LoadedTask.items`."""
        try:
            return self.splits[split]
        except KeyError:
            raise no_items(self.name, split) from None

    def score(self, order: Mapping[str, Any]) -> Any:
        """The sandbox's answer to a scoring order.

        Raises:
            EvaluationError: it fails, dies, or takes too long.
        """
        if self._process is None:
            self._start()
        return self._ask({**order, "processes": self._processes}, self._timeout_s).get("scores")

    def close(self) -> None:
        """Kill the process and everything it started."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def _start(self) -> dict[str, Any]:
        check_sandbox()
        self._scratch = tempfile.TemporaryDirectory(prefix="evomerge-sandbox-", ignore_cleanup_errors=True)
        folder = self._scratch.name
        _show_caches(Path(folder))
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ} | {
            "HOME": folder, "TMPDIR": folder, "HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "HF_EVALUATE_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        command = [*_ISOLATED, sys.executable, "-m", "evomerge.evaluation.sandbox_process"]
        self._process = subprocess.Popen(  # noqa: S603
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        order = {
            "spec": asdict(self._spec),
            "tokenizer": str(self._tokenizer),
            "folder": folder,
            "memory_bytes": MEMORY_BYTES,
            "file_bytes": FILE_BYTES,
        }
        try:
            return self._ask(order, LOAD_TIMEOUT_S)
        except EvaluationError as error:
            self.close()  # otherwise the next order would go to a process without the task
            if is_task_file(self._spec.task):
                raise
            raise EvaluationError(
                f"task {self._spec.task!r} cannot be loaded in its sandbox: {error}\nThe sandbox has no network access: the task's data set and metrics "
                "must already be in the Hugging Face caches (HF_HOME); run the task once with lm-eval itself to download them"
            ) from error

    def _ask(self, order: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send one order and return the answer; a process that does not give one is killed."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EvaluationError(f"task {self._spec.task!r}: its sandbox is closed")
        try:
            deadline = time.monotonic() + timeout_s
            _send(process.stdin.fileno(), json.dumps(order).encode() + b"\n", deadline)
            answer = json.loads(_line(process.stdout.fileno(), deadline))
        except TimeoutError:
            self.close()
            raise EvaluationError(f"task {self._spec.task!r}: its code took more than {timeout_s:g} s") from None
        except (OSError, ValueError, EOFError, RecursionError) as error:
            self.close()
            raise EvaluationError(f"task {self._spec.task!r}: its sandbox died ({error})") from error
        if not isinstance(answer, dict):
            raise self._nonsense(answer)
        if "error" in answer:
            raise EvaluationError(str(answer["error"]))
        return answer

    def _nonsense(self, what: object) -> EvaluationError:
        self.close()
        return EvaluationError(f"task {self._spec.task!r}: its sandbox returned an invalid answer: {what!r:.200}")


class SandboxedItems(Items):
    """Items of a `SandboxedTask`. `content` is the sandbox's description of its requests to the model.

    Raises:
        AttributeError, KeyError, OverflowError, TypeError, ValueError: `content` does not have the expected form.
    """

    def __init__(self, task: SandboxedTask, split: Split, content: Mapping[str, Any]) -> None:
        self._task, self._split = task, split
        super().__init__(
            f"task {task.name!r}, {split.value} split",
            [LogLikelihoodRequest(_tokens(before), _tokens(after)) for before, after in content["likelihoods"]],
            [
                GenerateRequest(_tokens(prompt), int(most), tuple(str(text) for text in stop))
                for prompt, most, stop in content["generations"]
            ],
            [int(count) for count in content["counts"]],
            n_dropped=int(content["n_dropped"]),
            represents=float(content["represents"]),
        )
        self._targets = tuple(str(target) for target in content["targets"])
        if min(self.counts) < 0 or sum(self.counts) != len(self.likelihoods) + len(self.generations):
            raise ValueError(f"request counts of items do not add up: {self.counts}")
        if not 1.0 <= self.represents < math.inf:
            raise ValueError(f"items that represent {self.represents} items")

    def target(self, number: int) -> str | None:
        """See `Items.target`; the sandbox gives only the first hundred."""
        return self._targets[number] if number < len(self._targets) else None

    def score(self, likelihoods: Sequence[LogLikelihood], generations: Sequence[Generation]) -> NDArray[np.float64]:
        """See `Items.score`. Also raises EvaluationError if the sandbox dies, hangs or returns an invalid answer."""
        scores = self._task.score(
            {
                "split": self._split.value,
                "likelihoods": [[one.log_probability, one.is_greedy] for one in likelihoods],
                "generations": [[one.text, one.n_tokens] for one in generations],
            }
        )
        good = isinstance(scores, list) and all(isinstance(one, float) and math.isfinite(one) for one in scores)
        if not good or len(scores) != len(self):
            raise EvaluationError(f"{self._where}: the sandbox did not return one score per item: {scores!r:.200}")
        return np.array(scores, dtype=np.float64)


def _show_caches(home: Path) -> None:
    """Link the contents of the user's Hugging Face caches (data sets, metrics) into caches under `home`, where they can be read but not written."""
    from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

    caches = {
        "hub": (HF_HUB_CACHE, "*"),
        "datasets": (
            os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets"),
            "*___*",
        ),  # without data sets made from local files
        "modules": (os.environ.get("HF_MODULES_CACHE", f"{HF_HOME}/modules"), "*"),
    }
    for name, (place, wanted) in caches.items():
        shown = home / name
        shown.mkdir()
        for entry in Path(place).resolve().glob(wanted):
            (shown / entry.name).symlink_to(entry)


def _tokens(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)


def _send(descriptor: int, content: bytes, deadline: float) -> None:
    """Write into a pipe whose reader may have stopped reading.

    Raises:
        TimeoutError: not everything was written by `deadline`.
        OSError: the reader is gone.
    """
    rest = memoryview(content)
    while rest:
        _wait(descriptor, select.POLLOUT, deadline)
        # a pipe that is ready accepts PIPE_BUF bytes without blocking
        rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]


def _line(descriptor: int, deadline: float) -> bytes:
    """The next line of a pipe.

    Raises:
        TimeoutError: there was none by `deadline`.
        EOFError: the writer is gone, or the line is too long.
    """
    content = bytearray()
    while not content.endswith(b"\n"):
        _wait(descriptor, select.POLLIN, deadline)
        part = os.read(descriptor, 1 << 20)
        content += part
        if not part or len(content) > _MAX_ANSWER_BYTES:
            raise EOFError("incomplete answer")
    return bytes(content)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    """Wait for `event`, or until the other side is gone. Raises TimeoutError at `deadline`."""
    poll = select.poll()  # unlike `select.select`, it accepts descriptors beyond 1023, in workers with many open files
    poll.register(descriptor, event)
    if not poll.poll(min(max(0.0, deadline - time.monotonic()) * 1000, _LONGEST_WAIT_MS)):
        raise TimeoutError
