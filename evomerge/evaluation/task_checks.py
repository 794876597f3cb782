"""What can be told of a task before it is loaded: whether it can be scored here, and what its splits must say. Loads no data."""

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
"""lm-eval's output type of tasks that score whole texts, whatever their length"""
OUTPUT_TYPES = ("multiple_choice", "loglikelihood", WHOLE_TEXTS, "generate_until")
_GENERATION = frozenset(
    {"until", "do_sample", "temperature", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
)
"""arguments of generation that are followed (`normalize_gen_kwargs` of lm-eval 0.4.13)"""
_WITHOUT_EFFECT: Mapping[str, object] = MappingProxyType(
    {"num_beams": 1, "repetition_penalty": 1, "top_k": ..., "top_p": ..., "min_p": ...}
)
"""others, and with which value (... = any) greedy decoding is the same without them"""
_SPLITS = ("training_split", "validation_split", "test_split")
_DATA = ("dataset_path", "dataset_name", "dataset_kwargs")


def check_supported(spec: TaskSpec) -> None:
    """Looks, without loading it, whether a task can be scored here.

    Raises:
        EvaluationError: it cannot; says why.
    """
    settings = settings_as_text(spec.task)
    check_settings(spec.task, settings)
    check_whole_texts(spec, settings)
    if spec.num_fewshot and not spec.n_examples(settings.get("num_fewshot")):
        raise EvaluationError(
            f"task {spec.task!r}: num_fewshot: {spec.num_fewshot} has no effect on a task whose own file says num_fewshot: 0 (lm-eval's rule); "
            "leave it out"
        )


def check_packages(spec: TaskSpec) -> None:
    """Imports the functions of a task of lm-eval's, unless they run in a sandbox.

    Raises:
        EvaluationError: a package that they need is not installed.
    """
    if not is_task_file(spec.task) and not settings_as_text(spec.task).get("unsafe_code"):
        settings_with_functions(spec.task)


def scored_split(task: str) -> str | None:
    """The data split that lm-eval scores a task on; None where it cannot be told."""
    settings = settings_as_text(task)
    return settings.get("test_split") or settings.get("validation_split")


def check_not_scored_on(spec: TaskSpec) -> None:
    """Checks that a task of lm-eval's is not searched on what its published scores are of.

    Raises:
        EvaluationError: it is.
    """
    searched = split_name(spec.splits.get(Split.SEARCH, ""))
    if is_task_file(spec.task) or searched not in (scored_split(spec.task), "test"):
        return
    raise EvaluationError(
        f"task {spec.task!r}: splits.search is {searched}, which the public benchmark is scored on, so results could not be compared with published "
        "scores. Search on another split, or set search_on_test: true"
    )


def check_one_split_each(where: str, specs: Sequence[TaskSpec]) -> None:
    """Checks that tasks which get the same `splits` are not told apart by the split of one data set that they take.

    Raises:
        EvaluationError: two are: all would be scored on the same items.
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
                f"{where}: {other} and {spec.task} are different splits of one data set, {others} and {own}, so the same splits cannot be "
                "meant for both; list its tasks one by one, each with splits of its own"
            )


def check_splits(spec: TaskSpec, needed: Sequence[Split]) -> None:
    """Checks that of a task of lm-eval's it is said which data splits are ours: no public data set has such names.

    Raises:
        EvaluationError: it is not; names those that its file knows.
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
        f"task {spec.task!r}: set splits to say which of the data set's splits are {', '.join(missing)} (lm-eval uses {', '.join(known)}), "
        f"e.g. splits: {{{parts}}}{', search_on_test: true' if first in (own, 'test') else ''}"
        + ("" if missing == [Split.SEARCH.value] else ", or finals: {finalists: 0} to search only")
    )


def check_whole_texts(spec: TaskSpec, settings: Mapping[str, Any]) -> None:
    """Checks that a task which scores whole texts is told in what pieces, and is not told what has no effect on it.

    Raises:
        EvaluationError: it is not, or is.
    """
    if settings.get("output_type") != WHOLE_TEXTS:
        return
    if spec.window is None:
        raise EvaluationError(
            f"task {spec.task!r} scores whole texts, in pieces of engine.max_model_len tokens: set that, e.g. to 2048; scores depend on it"
        )
    if spec.num_fewshot:
        raise EvaluationError(
            f"task {spec.task!r}: num_fewshot: {spec.num_fewshot} has no effect on a task that scores whole texts; leave it out"
        )


def check_settings(where: str, settings: Mapping[str, Any]) -> None:
    """Refuses what no engine here can be asked, or only with another score than lm-eval's.

    Raises:
        EvaluationError: names it.
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
            f"{where}: repeats: {settings['repeats']} asks a greedy model the same thing again; use 1"
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
    """Raises EvaluationError for settings of answers other than greedy ones."""
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
            # `min_new_tokens` and the like are no misspellings
            near = (
                "."
                if key in _WITHOUT_EFFECT
                else did_you_mean(str(key), [*_GENERATION, *_WITHOUT_EFFECT], likeness=0.87)
            )
            why = ", since answers are decoded greedily, token by token; leave it out" if near == "." else near
            raise EvaluationError(f"{where}: generation_kwargs.{key}: {value!r} is not supported{why}")
