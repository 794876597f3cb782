"""The process inside the sandbox: loads a task with its Python code and scores answers until its input ends.

Started by `evomerge.evaluation.sandbox` in its own namespaces. Reads one JSON object per line and answers each with one; the parent
does not trust the answers. Everything that a task's code prints goes to standard error.
"""

import ctypes
import json
import os
import resource
from pathlib import Path
from typing import Any

N_TARGETS = 100
"""Number of items whose right answers are sent, to be shown beside those of a model."""

_HANDLED_SINCE_1 = 0b1_1111_1111_0010
"""Landlock access rights of its first version that change files (linux/landlock.h): writing, removing and creating files of any kind."""
_TRUNCATE = 1 << 14
_TO_ONE_FILE = 0b10 | _TRUNCATE
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""System call numbers, the same on every architecture."""
_PATH_BENEATH, _QUERY_VERSION, _NO_NEW_PRIVILEGES = 1, 1, 38


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def limit(memory_bytes: int, file_bytes: int) -> None:
    """Limit the resources of this process and each of its children."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 1024),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def write_only_into(folder: Path) -> None:
    """Permanently gives up the right to change any file outside `folder` (and /dev/null, /dev/shm).

    Raises:
        OSError: the kernel does not support Landlock (Linux 5.13 and newer do).
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(*arguments: Any) -> int:
        result = libc.syscall(*arguments)
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"Landlock: {os.strerror(number)}")
        return int(result)

    version = call(_CREATE_RULESET, None, 0, _QUERY_VERSION)
    handled = _HANDLED_SINCE_1 | (_TRUNCATE if version >= 3 else 0)
    rules = call(_CREATE_RULESET, ctypes.byref(ctypes.c_uint64(handled)), 8, 0)
    for path, rights in ((folder, handled), (Path("/dev/shm"), handled), (Path("/dev/null"), handled & _TO_ONE_FILE)):  # noqa: S108
        if path.exists():
            place = os.open(path, os.O_PATH)
            call(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(_PathBeneath(rights, place)), 0)
            os.close(place)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "the process cannot give up privileges")
    call(_RESTRICT_SELF, rules, 0)
    os.close(rules)


def _load(order: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoTokenizer

    from evomerge.core import Split
    from evomerge.evaluation.loaded_task import load_task
    from evomerge.evaluation.task_spec import PromptFormat, TaskSpec

    wanted = order["spec"]
    splits_wanted = {Split(ours): theirs for ours, theirs in wanted["splits"].items()}
    spec = TaskSpec(**{**wanted, "splits": splits_wanted, "prompt": PromptFormat(**wanted["prompt"]), "members": ()})
    task = load_task(spec, AutoTokenizer.from_pretrained(order["tokenizer"], local_files_only=True), trust_code=True)
    splits = {
        split.value: {
            "counts": items.counts,
            "n_dropped": items.n_dropped,
            "represents": items.represents,
            "targets": [items.target(number) for number in range(min(len(items), N_TARGETS))],
            "likelihoods": [[one.context, one.continuation] for one in items.likelihoods],
            "generations": [[one.prompt, one.max_tokens, one.stop] for one in items.generations],
        }
        for split, items in task.splits.items()
    }
    return task, {"name": task.name, "metric": task.metric, "filter": task.filter, "splits": splits}


def _score(task: Any, order: dict[str, Any]) -> dict[str, Any]:
    from evomerge.core import Split
    from evomerge.engine import Generation, LogLikelihood

    scores = task.items(Split(order["split"])).score(
        [LogLikelihood(*answer) for answer in order["likelihoods"]],
        [Generation(*answer) for answer in order["generations"]],
        processes=order["processes"],
    )
    return {"scores": scores.tolist()}


def main() -> None:
    """Answer until the input ends."""
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    task: Any = None
    for line in orders:
        order = json.loads(line)
        try:
            if "spec" in order:
                limit(order["memory_bytes"], order["file_bytes"])
                write_only_into(Path(order["folder"]))
                task, answer = _load(order)
            else:
                answer = _score(task, order)
        except Exception as error:  # noqa: BLE001  (the boundary of the sandbox: errors are reported to the parent)
            known = any(kind.__name__ == "EvomergeError" for kind in type(error).__mro__)
            answer = {"error": str(error) if known else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
