"""`LmEvalEvaluator`: a candidate's recipe -> weights in the running engine -> lm-eval's item scores."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomerge.core import (
    EngineError,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    EvomergeError,
    Json,
    Split,
    Status,
    canonical_json,
    standard_error,
)
from evomerge.engine import Engine, RemoteWrite
from evomerge.evaluation.shown_items import ShownItem, show_items
from evomerge.evaluation.task_set import TaskSet
from evomerge.plan import MergePlan, ModelHeader, active_parameters, make_plan, table_of
from evomerge.recipe import Recipe
from evomerge.weights import WRITE_MERGE, Merger

MAX_BREAKDOWNS = 3
"""Consecutive library errors before they are passed on. A single one may be the candidate's fault, such as one that needs too much memory."""


class LmEvalEvaluator:
    """Scores merge recipes on lm-eval tasks with one running engine. Not thread-safe.

    A candidate takes one merge, one log-likelihood call and one generation call to the engine for all tasks together, and scoring.

    Args:
        engine: runs the merged weights. `close` closes it and the tasks; they stay open if this constructor fails.
        merger: holds the source models.
        headers: model key -> header, for every model that a recipe may name.
        tasks: the tasks to score.
        fit: adapts a plan to an engine that has room for more layers; None if every recipe has the depth of the engine.

    Raises:
        EvaluationError: an item is too long for the engine.
    """

    def __init__(
        self,
        engine: Engine,
        merger: Merger,
        headers: Mapping[str, ModelHeader],
        tasks: TaskSet,
        *,
        fit: Callable[[MergePlan], MergePlan] | None = None,
    ) -> None:
        tasks.check_lengths(engine.max_length)
        self._engine, self._merger, self._headers, self._tasks, self._fit = engine, merger, headers, tasks, fit
        self._in_engine: str | None = None
        self._n_breakdowns = 0
        self._size: dict[str, float] = {}

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the scores, in the order of the tasks."""
        return self._tasks.names

    def evaluate(self, request: EvaluationRequest) -> Evaluation:
        """Evaluate `request.recipe` on the items of `request.split`; the status is FAILED, with the reason, if anything goes wrong.

        When libraries fail `MAX_BREAKDOWNS` times without a successful evaluation in between, the error is raised: a GPU or a process of the
        engine may be gone for good, and the pool then starts a new worker for the candidate instead of letting every candidate fail here.

        Scores are means as lm-eval computes them; `stderr` is the sample standard deviation over the items divided by sqrt(n)
        (0 for a single item); for a group it combines those of its tasks. Costs: `items`, `dropped_items` if there are any, `prompt_tokens`,
        `generated_tokens`, `layers` and `active_parameters` of the merged model, `tokens_per_second` of the engine (prompt and generated),
        and the seconds `plan_s`, `merge_s` (including the engine's reset), `request_s` (collecting the requests), `engine_s`, `score_s`, `total_s`.
        """
        started = time.perf_counter()
        try:
            evaluation = self._evaluate(request, started)
        except Exception as error:
            self._in_engine = None
            if _is_breakdown(error):
                self._n_breakdowns += 1
                if self._n_breakdowns >= MAX_BREAKDOWNS:
                    raise
            reason = str(error) if isinstance(error, EvomergeError) else f"{type(error).__name__}: {error}"
            return request.failed(reason, cost={"total_s": time.perf_counter() - started})
        self._n_breakdowns = 0
        return evaluation

    def _evaluate(self, request: EvaluationRequest, started: float) -> Evaluation:
        clock = _Clock()
        self._load(request, clock)
        items = self._tasks.items(request.split)
        with clock.part("request_s"):
            likelihood_requests = [one for part in items.values() for one in part.likelihoods]
            generate_requests = [one for part in items.values() for one in part.generations]
        with clock.part("engine_s"):
            likelihoods = iter(self._engine.loglikelihood(likelihood_requests) if likelihood_requests else ())
            generated = self._engine.generate(generate_requests) if generate_requests else []
            generations = iter(generated)
        n_prompt = sum(part.prompt_tokens for part in items.values())
        n_dropped = sum(part.n_dropped for part in items.values())
        n_generated = sum(generation.n_tokens for generation in generated)
        scores: dict[str, NDArray[np.float64]] = {}
        with clock.part("score_s"):
            for name, part in items.items():
                scores[name] = part.score(
                    [next(likelihoods) for _ in part.likelihoods], [next(generations) for _ in part.generations]
                )
        sizes = {name: tuple(len(part) for part in whole.parts) for name, whole in items.items()}
        clock.seconds["total_s"] = time.perf_counter() - started
        return Evaluation(
            request.candidate_id,
            request.split,
            Status.OK,
            scores={name: _mean(values) for name, values in scores.items()},
            stderr={name: standard_error(values, sizes[name]) for name, values in scores.items()},
            item_scores={name: _item_row(values) for name, values in scores.items()},
            sample_sizes={name: counts for name, counts in sizes.items() if len(counts) > 1},
            cost={
                "items": float(sum(map(len, items.values()))),
                "prompt_tokens": float(n_prompt),
                "generated_tokens": float(n_generated),
                "tokens_per_second": (n_prompt + n_generated) / max(clock.seconds["engine_s"], 1e-9),
                **({"dropped_items": float(n_dropped)} if n_dropped else {}),
                **self._size,
                **clock.seconds,
            },
        )

    def _load(self, request: EvaluationRequest, clock: "_Clock") -> None:
        """Load the recipe's weights into the engine, unless the previous request (for another split) already did."""
        if request.recipe is None:
            raise EvaluationError(f"candidate {request.candidate_id} has no recipe")
        with clock.part("plan_s"):
            key = canonical_json(request.recipe)
            if key == self._in_engine:
                clock.seconds["merge_s"] = 0.0
                return
            plan = make_plan(Recipe.from_json(request.recipe), self._headers)
            size = {
                "layers": float(plan.n_layers),
                "active_parameters": active_parameters(plan, self._headers[plan.steps[0].inputs[0].source].config),
            }
            if self._fit is not None:
                plan = self._fit(plan)
        with clock.part("merge_s"):
            if self._engine.is_sharded:
                settings: dict[str, Json] = {
                    "recipe": request.recipe,
                    "models": {key: list(place) for key, place in table_of(self._headers).items()},
                    "gpu_bytes": self._merger.gpu_bytes,
                }
                self._engine.update(RemoteWrite(WRITE_MERGE, settings))
            else:
                self._engine.update(lambda target: self._merger.write(plan, target))
        self._in_engine, self._size = key, size

    def show(self, split: Split, count: int) -> dict[str, list[ShownItem]]:
        """Task name -> its first `count` items of `split` (for a group, of each of its tasks), answered by the last evaluated model.

        Raises:
            EvaluationError: a task has no items in `split`.
            EngineError: the engine fails.
        """
        shown: dict[str, list[ShownItem]] = {}
        for name, items in self._tasks.items(split).items():
            start = 0
            for part in items.parts:
                found = show_items(part, count, self._engine, self._tasks.tokenizer.decode)
                shown.setdefault(name, []).extend(replace(item, number=start + item.number) for item in found)
                start += len(part)
        return shown

    def close(self) -> None:
        """Close the engine and the sandboxes."""
        self._tasks.close()
        self._engine.close()


def _is_breakdown(error: Exception) -> bool:
    """Whether a library failed, as opposed to evomerge rejecting a candidate."""
    if isinstance(error, EngineError):
        return error.__cause__ is not None
    return not isinstance(error, EvomergeError)


class _Clock:
    """Seconds spent in named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


def _mean(values: NDArray[np.float64]) -> float:
    """lm-eval's mean, to the last bit: a running sum, not NumPy's pairwise one."""
    return float(sum(values.tolist()) / len(values))


def _item_row(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """Item scores as float32, clipped to its range: perplexities of a ruined model may exceed it, and the difference of two infinities is NaN."""
    largest = float(np.finfo(np.float32).max)
    return np.clip(values, -largest, largest).astype(np.float32)
