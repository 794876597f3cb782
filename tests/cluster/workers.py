"""Evaluators for the pool tests, created by name in worker processes."""

import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.core import CheckpointError, EngineError, Evaluation, EvaluationRequest, Status


class Scripted:
    """Does what the candidate's id says: `ok-*`, `slow-*`, `raise-*`, `exit-*`, `die-*`, `die-once-*`, `hang-*`, `wait-*` (for a file),
    `say-*`.

    The cost describes where it ran: the process, the GPU it may see (-1 = none), the number of new objects that triggers a garbage
    collection, and a variable that its process was given.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._folder = Path(settings["folder"])
        self._closing_s = float(settings.get("closing_s", 0))
        with (self._folder / "made").open("a") as stream:
            stream.write("x")
        n_made = len((self._folder / "made").read_text())
        if n_made > settings.get("most", math.inf):
            raise EngineError("the device is gone")
        if n_made in settings.get("not", ()):
            raise RuntimeError("not this time") if n_made == 1 else EngineError("not this time")

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        name = request.candidate_id
        with (self._folder / name).open("a") as stream:
            stream.write("x")
        if name.startswith("raise"):
            try:
                raise KeyError("its cause")
            except KeyError as cause:
                raise RuntimeError("scripted\n  in two lines" + 200 * " and more" * ("long" in name)) from cause
        if name.startswith("exit"):
            sys.exit("no such program")
        if name.startswith("say"):
            print(f"{name} prints", flush=True)
            logging.getLogger("scripted").info("%s logs", name)
            os.write(1, f"{name} writes\n".encode())
            os.write(2, f"{name} complains\n".encode())
        if name.startswith("hang"):
            time.sleep(600)
        if name.startswith("slow"):
            time.sleep(1)
        while name.startswith("wait") and not (self._folder / f"{name}-no-more").exists():
            time.sleep(0.01)
        if name.startswith("die-once"):
            if request.attempt == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        elif name.startswith("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        gpu = int(os.environ.get("CUDA_VISIBLE_DEVICES") or -1)
        where = {
            "pid": os.getpid(),
            "gpu": gpu,
            "garbage": gc.get_threshold()[0],
            "told": int(os.environ.get("EVOMERGE_TEST", 0)),
        }
        return Evaluation(name, request.split, Status.OK, scores={"f": 1.0}, cost=where)

    def close(self) -> None:
        time.sleep(self._closing_s)
        with (self._folder / "closed").open("a") as stream:
            stream.write("x")


def scripted(settings: Mapping[str, Any]) -> Scripted:
    return Scripted(settings)


def unloadable(settings: Mapping[str, Any]) -> Scripted:
    raise CheckpointError("model.safetensors: tensor 'x' holds NaN")


def alone(settings: Mapping[str, Any]) -> Scripted:
    """Fails if another one exists already, as when a device is taken."""
    (Path(settings["folder"]) / "alone").touch(exist_ok=False)
    return Scripted(settings)


def exiting(settings: Mapping[str, Any]) -> Scripted:
    """Exits the program instead of creating an evaluator."""
    sys.exit("no such program")


def crashing(settings: Mapping[str, Any]) -> Scripted:
    """The first and third process to get here die; the second waits for a file."""
    folder, number = Path(settings["folder"]), 1
    while True:
        try:
            (folder / f"start-{number}").touch(exist_ok=False)
            break
        except FileExistsError:
            number += 1
    if number in (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    while number == 2 and not (folder / "starting-no-more").exists():
        time.sleep(0.01)
    return Scripted(settings)


def slow(settings: Mapping[str, Any]) -> Scripted:
    """Takes longer to create than anybody waits: until a file appears."""
    folder = Path(settings["folder"])
    (folder / "starting").touch()
    while not (folder / "starting-no-more").exists():
        time.sleep(0.01)
    return Scripted(settings)
