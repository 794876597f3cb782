"""The items of one task and split: their requests, built once, and their scores, computed for every candidate."""

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.core import EvaluationError, Split, canonical_json
from evomerge.engine import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.forked_map import forked_map
from evomerge.evaluation.item_requests import ItemRequests

SCORER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
"""What a task's own functions and lm-eval's metrics raise on an item they cannot handle."""


@dataclass(frozen=True, slots=True)
class Item:
    """One document of a task and what lm-eval asks the model about it.

    Attributes:
        document: the row of the data set.
        instances: lm-eval's requests of this document, in the order of their `idx`; reused for every candidate.
    """

    document: Any
    instances: tuple[Any, ...]


class TaskItems(ItemRequests):
    """The items of one split, in the data set's order.

    Args:
        where: task and split, for messages.
        task: lm-eval's task object for this split.
        metric: whose value is an item's score.
        filter_index: which of the task's filters is applied to the model's answers.
        items: documents with their requests.
        encoder: turns their texts into tokens.
        n_dropped: see `ItemRequests`.

    Attributes:
        likelihoods, generations, counts, n_dropped, prompt_tokens: see `ItemRequests`.

    Raises:
        EvaluationError: a request that the engines cannot serve (no prompt, no text to score).
    """

    def __init__(
        self,
        where: str,
        task: Any,
        *,
        metric: str,
        filter_index: int,
        items: Sequence[Item],
        encoder: Encoder,
        n_dropped: int = 0,
    ) -> None:
        self._task, self._metric, self._items = task, metric, tuple(items)
        self._filter = task._filters[filter_index]
        likelihoods, generations = [], []
        for number, item in enumerate(self._items):
            for instance in item.instances:
                if instance.request_type == "generate_until":
                    generations.append(_generate_request(f"{where}, item {number}", instance, encoder))
                else:
                    likelihoods.append(_likelihood_request(f"{where}, item {number}", instance, encoder))
        super().__init__(where, likelihoods, generations, [len(item.instances) for item in self._items], n_dropped)
        self._encoder, self._filter_index = encoder, filter_index

    def score(
        self, likelihoods: Sequence[LogLikelihood], generations: Sequence[Generation], *, processes: int = 1
    ) -> NDArray[np.float64]:
        """Scores of the items, shape (n,), as lm-eval's `process_results` gives them.

        Args:
            likelihoods, generations: the engine's answers to `self.likelihoods` and `self.generations`.
            processes: so many copies of this process score them, an item each at a time.

        Raises:
            EvaluationError: a scorer fails on an item, or gives something else than a number; names the item.
        """
        answers: list[Any] = (
            [generation.text for generation in generations]
            if self.generations
            else [(answer.log_probability, answer.is_greedy) for answer in likelihoods]
        )
        instances = [instance for item in self._items for instance in item.instances]
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps, instance.filtered_resps = [answer], {}
        try:
            self._filter.apply(instances)
        except SCORER_ERRORS as error:
            raise EvaluationError(f"{self._where}: filter {self._filter.name!r} fails: {error!r}") from error
        return np.array(forked_map(self._item_score, len(self), processes))

    def _item_score(self, number: int) -> float:
        item, where = self._items[number], f"{self._where}, item {number}"
        results = [instance.filtered_resps[self._filter.name] for instance in item.instances]
        try:
            metrics = self._task.process_results(item.document, results)
        except SCORER_ERRORS as error:
            raise EvaluationError(f"{where}: the scorer fails: {error!r}") from error
        value = metrics.get(self._name_in(metrics))
        if isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value):
            return float(value)
        got = f"gives {value!r}" if self._metric in metrics else f"gives only {', '.join(metrics)}"
        raise EvaluationError(f"{where}: metric {self._metric!r} must be one finite number per item, the scorer {got}")

    def _name_in(self, metrics: Mapping[str, Any]) -> str:
        """What lm-eval calls the metric's values: as the metric, or what its function calls the only one that it returns (`pass@1`)."""
        others = [name for name in metrics if name not in self._task._metric_fn_list]
        own_scorer = callable(self._task.config.process_results)
        return self._metric if own_scorer or self._metric in metrics or len(others) != 1 else others[0]

    def target(self, number: int) -> str:
        """What the task takes for the right answer of an item, as text."""
        return str(self._task.doc_to_target(self._items[number].document))

    def without(self, dropped: Collection[int]) -> "TaskItems":
        """These items without those of some numbers.

        Raises:
            EvaluationError: none is left.
        """
        kept = [item for number, item in enumerate(self._items) if number not in dropped]
        if not kept:
            raise EvaluationError(f"{self._where}: drop_shared leaves none of its {len(self)} items; name other splits")
        return TaskItems(
            self._where,
            self._task,
            metric=self._metric,
            filter_index=self._filter_index,
            items=kept,
            encoder=self._encoder,
            n_dropped=len(dropped),
        )

    def keys(self) -> list[tuple[Hashable, Hashable]]:
        """Two keys per item, its document and its requests: items of two splits that share either are the same item."""
        return [
            (
                canonical_json(_plain(item.document)),
                canonical_json([_plain(list(instance.args)) for instance in item.instances])
                + canonical_json(_plain(self._task.doc_to_target(item.document))),
            )
            for item in self._items
        ]


def no_items(task: str, split: Split) -> EvaluationError:
    """The error of a task whose data set has no such split."""
    return EvaluationError(f"task {task!r} has no {split.value} items; name the data set's split for it under splits")


def _plain(value: Any) -> Any:
    """`value` as JSON; what JSON cannot say (dates, images, NaN) by its text."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return repr(value)


def _likelihood_request(where: str, instance: Any, encoder: Encoder) -> LogLikelihoodRequest:
    context, continuation = instance.args
    before, after = encoder.pair(context, continuation)
    if not after:
        raise EvaluationError(f"{where}: nothing to score: {continuation!r} adds no token after {context[-40:]!r}")
    return LogLikelihoodRequest(before, after)


def _generate_request(where: str, instance: Any, encoder: Encoder) -> GenerateRequest:
    """As lm-eval 0.4.13 reads generation arguments (`normalize_gen_kwargs`, `handle_stop_sequences`)."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    context, arguments = instance.args
    try:
        settings = normalize_gen_kwargs(arguments)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: generation_kwargs cannot be read: {error}") from error
    if settings["max_gen_toks"] < 1:
        raise EvaluationError(
            f"{where}: generation_kwargs.max_gen_toks: {settings['max_gen_toks']} lets nothing be written"
        )
    if not all(isinstance(text, str) for text in settings["until"] if text):
        raise EvaluationError(f"{where}: generation_kwargs.until: expected texts, got {settings['until']!r}")
    stop = handle_stop_sequences(settings["until"], encoder.end_text)
    prompt = encoder.prompt(context)
    if not prompt:
        raise EvaluationError(f"{where}: the prompt is empty")
    return GenerateRequest(prompt, settings["max_gen_toks"], tuple(dict.fromkeys(text for text in stop if text)))
