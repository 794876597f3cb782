"""The items of one task and split: their requests, built once, and their scores, computed for every candidate."""

import copy
import math
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.core import EvaluationError, Split, canonical_json
from evomerge.engine import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.forked_map import forked_map
from evomerge.evaluation.items import Items
from evomerge.evaluation.jackknife import item_scores
from evomerge.evaluation.seeds import lm_evals_seeds
from evomerge.evaluation.task_checks import WHOLE_TEXTS

SCORER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
    re.error,
)
"""Exceptions that a task's own functions and lm-eval's metrics raise on items they cannot handle."""


@dataclass(frozen=True, slots=True)
class Item:
    """One document of a task and lm-eval's requests for it.

    Attributes:
        document: the row of the data set.
        instances: lm-eval's requests for this document, ordered by `idx`; reused for every candidate.
    """

    document: Any
    instances: tuple[Any, ...]


class TaskItems(Items):
    """Items of a task that runs in this process.

    Args:
        where: task and split, for messages.
        task: lm-eval's task object for this split.
        metric: the metric that gives an item's score.
        filter_index: index of the task's filter that is applied to the model's answers.
        items: documents with their requests.
        encoder: turns their texts into tokens.
        window: number of tokens of the pieces in which whole texts are scored.
        n_dropped, represents: see `Items`.

    Attributes:
        likelihoods, generations, counts, n_dropped, represents, prompt_tokens: see `Items`.

    Raises:
        EvaluationError: the engines cannot serve a request (no prompt, or no text to score).
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
        window: int | None = None,
        n_dropped: int = 0,
        represents: float = 1.0,
    ) -> None:
        from lm_eval.api.metrics import mean

        self._task, self._metric, self._items = task, metric, tuple(items)
        documents = [item.document for item in self._items]
        for name in ("doc_to_text", "doc_to_choice", "doc_to_target"):
            setattr(task, name, _once_for_each(documents, getattr(task, name)))
        self._filter = task._filters[filter_index]
        self._aggregate = task.aggregation()[metric]
        self._is_mean = self._aggregate is mean
        self._has_own_scorer = callable(task.config.process_results)
        self._whole_texts = task.OUTPUT_TYPE == WHOLE_TEXTS
        likelihoods: list[LogLikelihoodRequest] = []
        generations: list[GenerateRequest] = []
        counts = []
        for number, item in enumerate(self._items):
            before = len(likelihoods) + len(generations)
            for instance in item.instances:
                if instance.request_type == "generate_until":
                    generations.append(_generate_request(f"{where}, item {number}", instance, encoder))
                elif self._whole_texts and window is not None:
                    (text,) = instance.args
                    likelihoods += starmap(LogLikelihoodRequest, encoder.windows(text, window))
                else:
                    likelihoods.append(_likelihood_request(f"{where}, item {number}", instance, encoder))
            counts.append(len(likelihoods) + len(generations) - before)
        if not any(counts):
            raise EvaluationError(f"{where}: its texts are empty")
        super().__init__(where, likelihoods, generations, counts, n_dropped, represents)
        self._encoder, self._filter_index, self._window = encoder, filter_index, window

    def score(
        self, likelihoods: Sequence[LogLikelihood], generations: Sequence[Generation], *, processes: int = 1
    ) -> NDArray[np.float64]:
        """See `Items.score`; `processes` forked copies of this process score items in parallel."""
        answers: list[Any]
        if self._whole_texts:
            rest = iter(likelihoods)
            answers = [sum(piece.log_probability for piece in islice(rest, count)) for count in self.counts]
        elif self.generations:
            answers = [generation.text for generation in generations]
        else:
            answers = [(answer.log_probability, answer.is_greedy) for answer in likelihoods]
        instances = [instance for item in self._items for instance in item.instances]
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps, instance.filtered_resps = [answer], {}
        try:
            self._filter.apply(instances)
        except SCORER_ERRORS as error:
            raise EvaluationError(f"{self._where}: filter {self._filter.name!r} fails: {error!r}") from error
        values = forked_map(self._item_value, len(self), processes)
        if self._is_mean:
            return np.array(values)
        try:
            return item_scores(values, self._aggregate)
        except SCORER_ERRORS as error:
            raise EvaluationError(f"{self._where}: metric {self._metric!r} over its items fails: {error!r}") from error

    def _item_value(self, number: int) -> Any:
        """The value of an item that lm-eval aggregates; a number if the aggregation is the mean."""
        item, where = self._items[number], f"{self._where}, item {number}"
        results = [instance.filtered_resps[self._filter.name] for instance in item.instances]
        try:
            metrics = self._results(number, results)
            name = self._name_in(metrics)
        except SCORER_ERRORS as error:
            raise EvaluationError(f"{where}: the scorer fails: {error!r}") from error
        if name not in metrics:
            raise EvaluationError(
                f"{where}: the scorer does not return {self._metric!r}, only {', '.join(metrics) or 'nothing'}"
            )
        value = metrics[name]
        if not self._is_mean:
            return value
        if isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value):
            return float(value)
        raise EvaluationError(
            f"{where}: metric {self._metric!r} must be one finite number per item, but the scorer returns {value!r}"
        )

    def _results(self, number: int, results: list[Any]) -> Any:
        """The metrics of an item. A task's own scorer gets a copy of the document and seeded global generators, so that it cannot affect later candidates."""
        document = self._items[number].document
        if not self._has_own_scorer:
            return self._task.process_results(document, results)
        with lm_evals_seeds(number):
            return self._task.process_results(copy.deepcopy(document), results)

    def _name_in(self, metrics: Mapping[str, Any]) -> str:
        """lm-eval's key for the metric's values: the metric's name, or the single key that its function returns (`pass@1`)."""
        others = [name for name in metrics if name not in self._task._metric_fn_list]
        return self._metric if self._has_own_scorer or self._metric in metrics or len(others) != 1 else others[0]

    def target(self, number: int) -> str:
        """See `Items.target`."""
        return str(self._task.doc_to_target(self._items[number].document))

    def without(self, dropped: Collection[int]) -> "TaskItems":
        """These items without the ones with the given numbers.

        Raises:
            EvaluationError: none are left.
        """
        kept = [item for number, item in enumerate(self._items) if number not in dropped]
        if not kept:
            raise EvaluationError(
                f"{self._where}: drop_shared leaves none of its {len(self)} items; choose other splits"
            )
        return TaskItems(
            self._where,
            self._task,
            metric=self._metric,
            filter_index=self._filter_index,
            items=kept,
            encoder=self._encoder,
            window=self._window,
            n_dropped=len(dropped),
            represents=self.represents,
        )

    def keys(self) -> list[tuple[Hashable, Hashable]]:
        """Two keys per item, for its document and its requests. Items of two splits that share either key are the same item."""
        return [
            (
                canonical_json(_plain(item.document)),
                canonical_json([_plain(list(instance.args)) for instance in item.instances])
                + canonical_json(_plain(self._task.doc_to_target(item.document))),
            )
            for item in self._items
        ]


def no_items(task: str, split: Split) -> EvaluationError:
    """The error for a task whose data set has no such split."""
    return EvaluationError(f"task {task!r} has no {split.value} items; set the data set's split for it under splits")


def _once_for_each(documents: Sequence[Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache `function` for `documents`: otherwise lm-eval renders targets and choices again for every candidate."""
    kept = {
        id(document): document for document in documents
    }  # keeps them alive, so that no other object gets their ids
    known: dict[int, Any] = {}

    def remembering(document: Any, *others: Any) -> Any:
        key = id(document)
        if others or key not in kept:
            return function(document, *others)
        if key not in known:
            known[key] = function(document)
        return known[key]

    return remembering


def _plain(value: Any) -> Any:
    """`value` as JSON data; values that JSON cannot represent (dates, images, NaN) become their text."""
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
        raise EvaluationError(f"{where}: nothing to score: {continuation!r} adds no tokens after {context[-40:]!r}")
    return LogLikelihoodRequest(before, after)


def _generate_request(where: str, instance: Any, encoder: Encoder) -> GenerateRequest:
    """Interpret generation arguments as lm-eval 0.4.13 does (`normalize_gen_kwargs`, `handle_stop_sequences`)."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

    context, arguments = instance.args
    try:
        settings = normalize_gen_kwargs(arguments)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{where}: generation_kwargs cannot be read: {error}") from error
    if settings["max_gen_toks"] < 1:
        raise EvaluationError(f"{where}: generation_kwargs.max_gen_toks: {settings['max_gen_toks']} allows no output")
    if not all(isinstance(text, str) for text in settings["until"] if text):
        raise EvaluationError(f"{where}: generation_kwargs.until: expected texts, got {settings['until']!r}")
    stop = handle_stop_sequences(settings["until"], encoder.end_text)
    prompt = encoder.generation_prompt(context)
    if not prompt:
        raise EvaluationError(f"{where}: the prompt is empty")
    # an empty stop string is found as soon as there is a token
    most_tokens = 1 if "" in stop else settings["max_gen_toks"]
    return GenerateRequest(prompt, most_tokens, tuple(dict.fromkeys(text for text in stop if text)))
