"""The actor of the Ray pool: makes its evaluator, then evaluates requests one at a time."""

import logging
import os
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.cluster.worker import make_evaluator
from evomerge.core import Evaluation, EvaluationRequest, EvomergeError, Json, collect_rarely, installed_version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """The outcome of a worker's start.

    Attributes:
        node: the id of its node.
        host: the name of its machine.
        versions: package -> version, for those of the requested packages that are installed there.
        problem: an error that the user must fix before the worker can start; None if it has started.
    """

    node: str
    host: str
    versions: Mapping[str, str]
    problem: EvomergeError | None


class Worker:
    """A worker in its own process. `log_file`: the file for everything it prints; None = not redirected."""

    def __init__(self, log_file: str | None) -> None:
        collect_rarely()
        if log_file is not None:
            _write_output_to(Path(log_file))

    def start(self, factory: str, settings: Mapping[str, Json], packages: Collection[str]) -> Started:
        """Make the evaluator. An `EvomergeError` is returned as the problem; other errors, which may be temporary, are raised."""
        import ray

        problem = None
        try:
            self._evaluator = make_evaluator(factory, settings)
        except EvomergeError as error:
            logger.exception("the evaluator cannot be made")
            problem = error
        found = {package: installed_version(package) for package in packages}
        versions = {package: version for package, version in found.items() if version is not None}
        node = str(ray.get_runtime_context().get_node_id())
        return Started(node, socket.gethostname(), versions, problem)

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Evaluate one request."""
        return self._evaluator.evaluate(request)


def _write_output_to(path: Path) -> None:
    """Redirect everything that this process prints or logs to `path`, including output of C libraries."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
