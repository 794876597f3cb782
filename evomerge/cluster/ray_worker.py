"""The actor of the Ray pool: makes its evaluator first, then answers requests one at a time."""

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
    """Where a worker has started, or has not.

    Attributes:
        node: the id of its node.
        host: the name of its machine.
        versions: of the packages that were asked for, as far as they are installed there.
        problem: what the user has to mend before it can start; None where it has.
    """

    node: str
    host: str
    versions: Mapping[str, str]
    problem: EvomergeError | None


class Worker:
    """Lives in a process of its own. `log_file`: where everything it prints goes; None = nowhere of ours."""

    def __init__(self, log_file: str | None) -> None:
        collect_rarely()
        if log_file is not None:
            _write_output_to(Path(log_file))

    def start(self, factory: str, settings: Mapping[str, Json], packages: Collection[str]) -> Started:
        """Makes the evaluator; raises what may go away by itself."""
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
        """The evaluation of one request."""
        return self._evaluator.evaluate(request)


def _write_output_to(path: Path) -> None:
    """Sends everything this process prints or logs, C libraries included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
