"""What runs inside a worker: an evaluator made by a factory that is named by data, so that workers need nothing of the driver's memory."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Protocol, cast

from evomerge.core import Evaluation, EvaluationRequest, Json


class Evaluator(Protocol):
    """Scores candidates. A bad candidate is a FAILED evaluation; an exception says that this worker is broken and should be replaced."""

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """The evaluation of one request."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def make_evaluator(factory: str, settings: Mapping[str, Json]) -> Evaluator:
    """Calls `factory` ("package.module:function") with `settings`."""
    return cast(Evaluator, resolve_name(factory)(settings))
