"""The actor of the Ray pool: makes its evaluator first, then answers requests one at a time."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from evomerge.cluster.worker import make_evaluator
from evomerge.core import Evaluation, EvaluationRequest, EvomergeError, Json

logger = logging.getLogger(__name__)


class Worker:
    """Lives in a process of its own. `log_file`: where everything it prints goes; None = nowhere of ours."""

    def __init__(self, log_file: str | None) -> None:
        if log_file is not None:
            _write_output_to(Path(log_file))

    def start(self, factory: str, settings: Mapping[str, Json]) -> str | EvomergeError:
        """Makes the evaluator; returns the node's id, or what the user has to mend; raises what may go away by itself."""
        import ray

        try:
            self._evaluator = make_evaluator(factory, settings)
        except EvomergeError as problem:
            logger.exception("the evaluator cannot be made")
            return problem
        return str(ray.get_runtime_context().get_node_id())

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """The evaluation of one request."""
        return self._evaluator.evaluate(request)


def _write_output_to(path: Path) -> None:
    """Sends everything this process prints or logs, C libraries included, to `path`."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
