"""The evaluator of a worker. Its factory is given by name, so that workers need no objects from the driver."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Protocol, cast

from evomerge.core import Evaluation, EvaluationRequest, Json


class Evaluator(Protocol):
    """Scores candidates. Returns a failed evaluation for a bad candidate; raises an exception if it is broken and must be replaced."""

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Evaluate one request."""
        ...

    def close(self) -> None:
        """Free its resources."""
        ...


def make_evaluator(factory: str, settings: Mapping[str, Json]) -> Evaluator:
    """Call `factory` ("package.module:function") with `settings`."""
    return cast(Evaluator, resolve_name(factory)(settings))
