"""Scores from test functions instead of models, so that the whole loop can be tried, timed and interrupted in seconds.

Knows nothing of models, engines or lm-eval.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from evomerge.core import ConfigError, Evaluation, EvaluationRequest, Status, did_you_mean, random_stream

SYNTHETIC_COSTS = ("items", "engine_s", "total_s")
"""the costs that evaluations of test functions report"""

Vector = NDArray[np.float64]


def _sphere(x: Vector) -> list[float]:
    return [float(np.mean((x - 0.7) ** 2)) / 0.49]


def _rosenbrock(x: Vector) -> list[float]:
    z = 4.0 * x - 2.0
    return [float(np.sum(100.0 * (z[1:] - z[:-1] ** 2) ** 2 + (1.0 - z[:-1]) ** 2)) / (3609.0 * max(1, len(x) - 1))]


def _rastrigin(x: Vector) -> list[float]:
    z = 10.24 * x - 7.168
    return [float(np.mean(10.0 + z**2 - 10.0 * np.cos(2.0 * np.pi * z))) / 71.4]


def _zdt(x: Vector, shape: Callable[[float, float], float]) -> list[float]:
    first, g = float(x[0]), 1.0 + 9.0 * float(np.mean(x[1:])) if len(x) > 1 else 1.0
    return [first, g * shape(first, g) / 10.0]


def _dtlz2(x: Vector) -> list[float]:
    """Three losses whose front is an octant of a sphere; with one coordinate, a quarter circle on it."""
    first, second = (np.pi / 2 * value for value in np.append(x[:2], 0.0)[:2])
    g = float(np.sum((x[2:] - 0.5) ** 2))
    radius = (1.0 + g) / (1.0 + 0.25 * max(0, len(x) - 2))
    directions = (np.cos(first) * np.cos(second), np.cos(first) * np.sin(second), np.sin(first))
    return [float(radius * direction) for direction in directions]


FUNCTIONS: Mapping[str, tuple[int, Callable[[Vector], list[float]]]] = MappingProxyType(
    {
        "sphere": (1, _sphere),
        "rosenbrock": (1, _rosenbrock),
        "rastrigin": (1, _rastrigin),
        "zdt1": (2, lambda x: _zdt(x, lambda f, g: 1.0 - float(np.sqrt(f / g)))),
        "zdt2": (2, lambda x: _zdt(x, lambda f, g: 1.0 - (f / g) ** 2)),
        "zdt3": (
            2,
            lambda x: _zdt(x, lambda f, g: 1.0 - float(np.sqrt(f / g)) - f / g * float(np.sin(10 * np.pi * f))),
        ),
        "dtlz2": (3, _dtlz2),
    }
)
"""name -> (number of tasks, unit coordinates (d,) -> losses scaled to about [0, 1]); minima at x = 0.7 (sphere, rastrigin),
x = 0.75 (rosenbrock), and the fronts of Zitzler, Deb and Thiele (DOI 10.1162/106365600568202) and of Deb et al. (DOI
10.1109/CEC.2002.1007032)"""


def synthetic_task_names(function: str) -> tuple[str, ...]:
    """The names of the scores of a function: `f1`, `f2`, ...

    Raises:
        ConfigError: there is no such function; suggests the closest name.
    """
    if function not in FUNCTIONS:
        hint = did_you_mean(function, FUNCTIONS)
        raise ConfigError(f"evaluation.function: unknown function {function!r}{hint} Known: {', '.join(FUNCTIONS)}")
    return tuple(f"f{index + 1}" for index in range(FUNCTIONS[function][0]))


class SyntheticEvaluator:
    """Scores `1 - loss` (higher is better) of a test function, as the mean of noisy items.

    Every number depends only on (seed, split, item, coordinates), never on the order of calls.

    Args:
        function: a key of `FUNCTIONS`.
        n_items: items per task and split.
        item_noise: standard deviation of an item's score around the function's value. Half of the variance is the
            item's difficulty, the same for every candidate, as in real tasks.
        delay_s: duration of an evaluation.
        failure_rate: fraction of evaluations that fail, determined by (seed, candidate, split, attempt).
        seed: of the noise and the failures.
    """

    def __init__(
        self,
        function: str,
        *,
        n_items: int = 100,
        item_noise: float = 0.0,
        delay_s: float = 0.0,
        failure_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.task_names = synthetic_task_names(function)
        self._function = FUNCTIONS[function][1]
        self._n_items, self._noise, self._delay_s = n_items, item_noise, delay_s
        self._failure_rate, self._seed = failure_rate, seed

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Evaluate `request.values`, shape (d,)."""
        started = time.perf_counter()
        if self._delay_s:
            time.sleep(self._delay_s)
        if request.values is None:
            return request.failed("the synthetic evaluator needs a point of the search space")
        lottery = random_stream(self._seed, "failure", request.candidate_id, request.split.value, request.attempt)
        if lottery.random() < self._failure_rate:
            return request.failed("synthetic failure")
        x = np.asarray(request.values)
        point = hashlib.sha256(x.tobytes()).hexdigest()
        items = {}
        for task, loss in zip(self.task_names, self._function(x), strict=True):
            difficulty = random_stream(self._seed, "difficulty", request.split.value, task).normal(size=self._n_items)
            luck = random_stream(self._seed, "luck", request.split.value, task, point).normal(size=self._n_items)
            noise = self._noise * np.sqrt(0.5) * (difficulty - difficulty.mean() + luck)
            items[task] = (1.0 - loss + noise).astype(np.float32)
        total = time.perf_counter() - started
        return Evaluation(
            request.candidate_id,
            request.split,
            Status.OK,
            scores={task: float(scores.mean(dtype=np.float64)) for task, scores in items.items()},
            stderr={
                task: float(scores.std(ddof=1, dtype=np.float64) / np.sqrt(len(scores)))
                for task, scores in items.items()
            },
            item_scores=items,
            cost=dict(zip(SYNTHETIC_COSTS, (self._n_items * len(items), total, total), strict=True)),
        )

    def close(self) -> None:
        """Do nothing: there are no resources to free."""
