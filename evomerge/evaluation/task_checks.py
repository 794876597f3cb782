"""Checks on a task that do not need its data: whether it can be scored, and which splits must be set."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from evomerge.core import EvaluationError, Split, did_you_mean
from evomerge.evaluation.split_parts import split_name
from evomerge.evaluation.task_files import is_task_file, number_of_shots
from evomerge.evaluation.task_filters import check_filters
from evomerge.evaluation.task_keys import check_keys
from evomerge.evaluation.task_settings import settings_as_text, settings_with_functions
from evomerge.evaluation.task_spec import TaskSpec

WHOLE_TEXTS = "loglikelihood_rolling"
"""lm-eval's output type of tasks that score whole texts of any length"""
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", WHOLE_TEXTS, "generate_until")
_GENERATION = frozenset(
    {"until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
)
"""supported generation arguments (`normalize_gen_kwargs` of lm-eval 0.4.13)"""
_WITHOUT_EFFECT: Mapping[str, object] = MappingProxyType(
    {"num_beams": 1, "repetition_penalty": 1, "top_k": ..., "top_p": ..., "min_p": ...}
)
"""other arguments -> the value (... = any) with which they do not change greedy decoding"""
_SPLITS = ("training_split", "validation_split", "test_split")
_DATA = ("dataset_path", "dataset_name", "dataset_kwargs")


def check_supported(spec: TaskSpec) -> None:
    """Check, without loading it, that a task can be scored.

    Raises:
        EvaluationError: it cannot; gives the reason.
    """
    settings = settings_as_text(spec.task)
    check_settings(spec.task, settings)
    check_whole_texts(spec, settings)
    if spec.num_fewshot and not spec.n_examples(settings.get("num_fewshot")):
        raise EvaluationError(
            f"task {spec.task!r}: num_fewshot: {spec.num_fewshot} has no effect on a task whose own file sets num_fewshot: 0 (lm-eval's rule); "
            "leave it out"
        )


def check_packages(spec: TaskSpec) -> None:
    """Check that the packages of one of lm-eval's own tasks are installed, by importing its functions unless they run in a sandbox.

    Raises:
        EvaluationError: a package that they need is not installed.
    """
    if not is_task_file(spec.task) and not settings_as_text(spec.task).get("unsafe_code"):
        settings_with_functions(spec.task)


def scored_split(task: str) -> str | None:
    """The data split that lm-eval scores a task on; None if unknown."""
    settings = settings_as_text(task)
    return settings.get("test_split") or settings.get("validation_split")


def check_not_scored_on(spec: TaskSpec) -> None:
    """Check that the search does not use the split on which the published scores of one of lm-eval's tasks are computed.

    Raises:
        EvaluationError: it does.
    """
    searched = split_name(spec.splits.get(Split.SEARCH, ""))
    if is_task_file(spec.task) or searched not in (scored_split(spec.task), "test"):
        return
    raise EvaluationError(
        f"task {spec.task!r}: splits.search is {searched}, which the public benchmark is scored on, so results could not be compared with published "
        "scores. Search on another split, or set search_on_test: true"
    )


def check_one_split_each(where: str, specs: Sequence[TaskSpec]) -> None:
    """Check that tasks which share `splits` do not differ only in the split of a common data set that they use.

    Raises:
        EvaluationError: two tasks do, and would be scored on the same items.
    """
    taken: dict[str, tuple[str, str]] = {}
    for spec in specs:
        settings, own = settings_as_text(spec.task), scored_split(spec.task)
        if own is None or is_task_file(spec.task):
            continue
        data = json.dumps([settings.get(key) for key in _DATA], default=str)
        other, others = taken.setdefault(data, (spec.task, own))
        if others != own:
            raise EvaluationError(
                f"{where}: {other} and {spec.task} are different splits of one data set, {others} and {own}, so they cannot share the same "
                "splits; list its tasks one by one, each with its own splits"
            )


def check_splits(spec: TaskSpec, needed: Sequence[Split]) -> None:
    """Check that `splits` of one of lm-eval's tasks maps all needed splits, since public data sets do not use our names.

    Raises:
        EvaluationError: a split is missing; names those that the task's file knows.
    """
    missing = [split.value for split in needed if split not in spec.splits]
    if not missing or is_task_file(spec.task):
        return
    settings, own = settings_as_text(spec.task), scored_split(spec.task) or "test"
    others = [name for name in dict.fromkeys(settings.get(key) for key in _SPLITS) if name not in (own, None)]
    known = dict.fromkeys([*others, *filter(None, [settings.get("fewshot_split")]), own])
    first = others[0] if others else own
    parts = (
        f"search: {others[0]}, select: {others[1]}, report: {own}"
        if len(others) > 1
        else f"search: '{first}[:80%]', select: '{first}[80%:]', report: {own}"
        if others
        else f"search: '{own}[:60%]', select: '{own}[60%:80%]', report: '{own}[80%:]'"
    )
    raise EvaluationError(
        f"task {spec.task!r}: set splits to choose the data set's splits for {', '.join(missing)} (lm-eval uses {', '.join(known)}), "
        f"e.g. splits: {{{parts}}}{', search_on_test: true' if first in (own, 'test') else ''}"
        + ("" if missing == [Split.SEARCH.value] else ", or finals: {finalists: 0} to search only")
    )


def check_whole_texts(spec: TaskSpec, settings: Mapping[str, Any]) -> None:
    """Check that a task which scores whole texts has a window, and no settings that would have no effect.

    Raises:
        EvaluationError: the window is missing, or `num_fewshot` is set.
    """
    if settings.get("output_type") != WHOLE_TEXTS:
        return
    if spec.window is None:
        raise EvaluationError(
            f"task {spec.task!r} scores whole texts in pieces of engine.max_model_len tokens, and its scores depend on that number: set it, e.g. to 2048"
        )
    if spec.num_fewshot:
        raise EvaluationError(
            f"task {spec.task!r}: num_fewshot: {spec.num_fewshot} has no effect on a task that scores whole texts; leave it out"
        )


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that the engines do not support, or with which scores would differ from lm-eval's.

    Raises:
        EvaluationError: names the setting.
    """
    if "class" in settings:
        raise EvaluationError(f"lm-eval task {where!r} is a Python class; only tasks defined in YAML can be evaluated")
    output_type = settings.get("output_type") or "generate_until"
    if output_type not in OUTPUT_TYPES:
        raise EvaluationError(
            f"{where}: output_type {output_type!r} is not supported; supported: {', '.join(OUTPUT_TYPES)}"
        )
    if (settings.get("repeats") or 1) != 1:
        raise EvaluationError(
            f"{where}: repeats: {settings['repeats']} would repeat the same request, and greedy decoding gives the same answer; use 1"
        )
    number_of_shots(where, settings.get("num_fewshot"))
    description = settings.get("description")
    if description is not None and not (isinstance(description, str) or callable(description)):
        raise EvaluationError(f"{where}: description: expected a text, got {description!r}")
    for key in ("target_delimiter", "fewshot_delimiter"):
        if not isinstance(settings.get(key, ""), str):
            raise EvaluationError(f"{where}: {key}: expected a text, got {settings[key]!r}")
    if is_task_file(where):
        check_keys(where, settings)
        check_filters(where, settings)
    _check_generation(where, settings.get("generation_kwargs") or {})
    for key in ("doc_to_image", "doc_to_audio"):
        if settings.get(key):
            raise EvaluationError(f"{where}: {key}: only text tasks are supported")


def _check_generation(where: str, generation: Any) -> None:
    """Raise EvaluationError for settings of anything but greedy decoding."""
    if not isinstance(generation, Mapping):
        raise EvaluationError(f"{where}: generation_kwargs: expected settings by name, got {generation!r}")
    temperature = generation.get("temperature") or 0
    if not isinstance(temperature, int | float):
        raise EvaluationError(f"{where}: generation_kwargs.temperature: expected a number, got {temperature!r}")
    if generation.get("do_sample") is not False and temperature > 0:
        raise EvaluationError(
            f"{where}: generation_kwargs asks for sampling (temperature {temperature}); only greedy decoding "
            "gives a candidate one score. Set do_sample: false"
        )
    for key, value in generation.items():
        if key not in _GENERATION and _WITHOUT_EFFECT.get(key) not in (..., value):
            # a high threshold, so that `min_new_tokens` and the like are not taken for misspellings
            near = (
                "."
                if key in _WITHOUT_EFFECT
                else did_you_mean(str(key), [*_GENERATION, *_WITHOUT_EFFECT], likeness=0.87)
            )
            why = ", because answers are decoded greedily, token by token; leave it out" if near == "." else near
            raise EvaluationError(f"{where}: generation_kwargs.{key}: {value!r} is not supported{why}")
