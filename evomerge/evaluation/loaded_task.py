"""Loads a task: one lm-eval task object per split, with requests and token ids built once.

Knows nothing of merging, searches, or engines beyond their request types.
"""

import copy
import errno
import io
import logging
from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jinja2

from evomerge.core import EvaluationError, Split, did_you_mean, random_stream
from evomerge.evaluation.compiled_templates import keep_compiled_templates
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.seeds import FEWSHOT_SEED, lm_evals_seeds
from evomerge.evaluation.split_parts import part_range, split_name
from evomerge.evaluation.task_checks import check_settings, check_whole_texts
from evomerge.evaluation.task_files import is_task_file, no_such_split
from evomerge.evaluation.task_items import SCORER_ERRORS, Item, TaskItems, no_items
from evomerge.evaluation.task_settings import check_templates, task_settings
from evomerge.evaluation.task_spec import TaskSpec


@dataclass(frozen=True, slots=True)
class LoadedTask:
    """A task whose requests are ready.

    Attributes:
        name: name of its score.
        metric: lm-eval's metric.
        filter: name of the filter applied to the model's answers.
        splits: the items of every split that the data set has.
    """

    name: str
    metric: str
    filter: str
    splits: Mapping[Split, TaskItems]

    def items(self, split: Split) -> TaskItems:
        """The items of `split`.

        Raises:
            EvaluationError: the data set has no such split.
        """
        try:
            return self.splits[split]
        except KeyError:
            raise no_items(self.name, split) from None


def load_task(spec: TaskSpec, tokenizer: Any, *, trust_code: bool = False) -> LoadedTask:
    """Load a task with lm-eval's own classes.

    Args:
        spec: which task, metric and splits.
        tokenizer: the models' transformers tokenizer.
        trust_code: allow Python code that a local task file names.

    Raises:
        EvaluationError: the task, its data or its metric does not exist, its code is not trusted, its output type is not supported, or an
            item is in two splits.
    """
    # Their log messages about defaults are of no use here; errors are raised.
    for library in ("lm_eval", "sacrebleu"):
        logging.getLogger(library).setLevel(logging.ERROR)
    keep_compiled_templates()
    settings = task_settings(spec.task, trust_code=trust_code)
    name = spec.name or str(settings["task"])
    check_settings(spec.task, settings)
    check_whole_texts(spec, settings)
    with lm_evals_seeds():
        dataset = _load_data(spec.task, settings)
    if is_task_file(spec.task) and not trust_code:
        check_templates(spec.task, settings, (row for part in dataset.values() for row in part))
    n_examples = spec.n_examples(settings.get("num_fewshot")) or 0
    encoder = Encoder(tokenizer, keep_system=spec.prompt.system_instruction is not None)
    splits: dict[Split, TaskItems] = {}
    metric = filter_name = ""
    for split in Split:
        part = spec.data_split(split)
        if part is None or split_name(part) not in dataset:
            if split in spec.splits or split is Split.SEARCH:
                raise EvaluationError(no_such_split(name, split, part, dataset))
            continue
        where = f"{spec.task}, split {part!r}"
        with lm_evals_seeds():
            task = _lm_eval_task(where, settings, _with_part(where, dataset, part), part, n_examples)
            wanted = spec.search_items if split is Split.SEARCH else None
            items, represents = _build_items(where, task, spec, encoder, wanted)
        metric, filter_index = _chosen_metric(spec, task)
        filter_name = task._filters[filter_index].name
        splits[split] = TaskItems(
            f"task {name!r}, split {part!r}",
            task,
            metric=metric,
            filter_index=filter_index,
            items=items,
            encoder=encoder,
            window=spec.window,
            represents=represents,
        )
    if spec.drop_shared:
        _drop_shared(splits)
    _check_disjoint(name, splits)
    return LoadedTask(name, metric, filter_name, splits)


def _load_data(where: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Data split -> its rows (`datasets.Dataset`), loaded as lm-eval loads them, but once for all splits."""
    import datasets

    # it logs cache hits each time, and reports twice the errors that it then raises
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    custom = settings.get("custom_dataset")
    kwargs = dict(settings.get("dataset_kwargs") or {})
    # datasets 4.0 and later no longer run code of data sets and reject this argument; lm-eval drops it too.
    kwargs.pop("trust_remote_code", None)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = (
            custom(**(settings.get("metadata") or {}), **kwargs)
            if callable(custom)
            else datasets.load_dataset(path=settings.get("dataset_path"), name=settings.get("dataset_name"), **kwargs)
        )
    except StopIteration:  # raised by datasets for an empty file
        raise EvaluationError(f"{where}: its data cannot be loaded: a file is empty") from None
    except (*SCORER_ERRORS, datasets.exceptions.DatasetsError) as error:
        hint = ""
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES):
            hint = "; set HF_HOME or HF_DATASETS_CACHE to a writable folder for its cache"
        raise EvaluationError(f"{where}: its data cannot be loaded: {error.__cause__ or error}{hint}") from error
    finally:
        if not bars:
            datasets.enable_progress_bars()
    if not isinstance(loaded, Mapping):
        raise EvaluationError(f"{where}: its data has no splits; name them under dataset_kwargs.data_files")
    empty = [name for name, part in loaded.items() if len(part) == 0]
    if empty:
        raise EvaluationError(f"{where}: split {', '.join(empty)} of its data is empty")
    return loaded


def _with_part(where: str, dataset: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """The data with `part` added as a separate split."""
    if part in dataset:
        return dataset
    whole = dataset[split_name(part)]
    rows = part_range(part, len(whole))
    if not rows:
        raise EvaluationError(f"{where}: this part is empty; {split_name(part)} has {len(whole)} rows")
    return {**dataset, part: whole.select(rows) if hasattr(whole, "select") else whole[rows.start : rows.stop]}


def _lm_eval_task(
    where: str, settings: Mapping[str, Any], dataset: Mapping[str, Any], part: str, n_examples: int
) -> Any:
    """lm-eval's task object that evaluates the documents of the data split `part`, with `n_examples` few-shot examples."""
    from lm_eval.api.task import ConfigurableTask

    class LoadedDataTask(ConfigurableTask):  # type: ignore[misc]
        """lm-eval's task over data that is already loaded."""

        def download(self, dataset_kwargs: object = None, **kwargs: object) -> None:
            self.dataset = dataset

        def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
            try:
                choices = super().doc_to_choice(doc, doc_to_choice)
            except (SyntaxError, ValueError):  # what `ast.literal_eval` raises
                choices = self.doc_to_text(doc, doc_to_choice or self.config.doc_to_choice)
            if isinstance(choices, str) or not isinstance(choices, Collection):
                raise EvaluationError(
                    f"{where}: doc_to_choice: expected a list of answers, as in ['yes', 'no'], or the name of a column of lists, got {choices!r}"
                )
            return choices

    config = copy.deepcopy({key: value for key, value in settings.items() if key != "dataset_kwargs"})
    _evaluate_part(config, part)
    config["num_fewshot"] = n_examples
    try:
        task = LoadedDataTask(config=config)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    except (*SCORER_ERRORS, jinja2.TemplateError) as error:
        raise EvaluationError(f"{where}: lm-eval cannot build the task: {error!r}") from error
    return task


def _evaluate_part(config: dict[str, Any], part: str) -> None:
    """Make `part` the split that lm-eval evaluates. If it already is, nothing changes, and the few-shot examples are lm-eval's own.

    Otherwise, makes sure that an item is never one of its own examples: lm-eval excludes it if the examples come from the split with the name
    of the evaluated test split.
    """
    if part == (config.get("test_split") or config.get("validation_split")):
        return
    config["test_split"] = part
    fewshot = config.get("fewshot_config") or {}
    named = fewshot.get("split") or config.get("fewshot_split")
    if named is None and fewshot.get("samples") is None:
        named = config.get("training_split") or config.get("validation_split") or part
    if named is not None and split_name(named) == split_name(part):
        config["fewshot_split"] = part
        if fewshot.get("split"):
            fewshot["split"] = part


def _draw(task: Any, spec: TaskSpec, n_wanted: int | None) -> tuple[frozenset[int] | None, float]:
    """The numbers of `n_wanted` randomly drawn documents (None: all), and the number of documents each of them represents."""
    if n_wanted is None:
        return None, 1.0
    n_documents = len(task.eval_docs)
    if spec.limit is not None:
        n_documents = min(n_documents, spec.limit)
    if n_wanted >= n_documents:
        return None, 1.0
    order = random_stream(spec.seed, "search items", str(task.config.task)).permutation(n_documents)
    return frozenset(order[:n_wanted].tolist()), n_documents / n_wanted


def _build_items(
    where: str, task: Any, spec: TaskSpec, encoder: Encoder, n_wanted: int | None
) -> tuple[list[Item], float]:
    """`n_wanted` items drawn at random from those up to `limit` (None: all of these), and the number of documents each of them represents."""
    prompt = spec.prompt
    try:
        documents, represents = _draw(task, spec, n_wanted)
        # Its progress bar cannot be turned off.
        with redirect_stderr(io.StringIO()):
            task.build_all_requests(
                limit=spec.limit,
                samples=documents,
                rank=0,
                world_size=1,
                system_instruction=prompt.system_instruction,
                apply_chat_template=prompt.apply_chat_template,
                fewshot_as_multiturn=prompt.apply_chat_template and prompt.fewshot_as_multiturn,
                chat_template=encoder.conversation if prompt.apply_chat_template else None,
            )
    except (*SCORER_ERRORS, jinja2.TemplateError) as error:
        wanted, known = task.config.num_fewshot, len(task.sampler.df) if hasattr(task, "sampler") else 0
        why = (
            f"num_fewshot asks for {wanted} solved examples per item, but there are only {known} to choose from"
            if wanted >= known > 0
            else repr(error)
        )
        raise EvaluationError(f"{where}: lm-eval cannot build the requests: {why}") from error
    by_document: dict[int, list[Any]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    items = [
        Item(instances[0].doc, tuple(sorted(instances, key=lambda instance: int(instance.idx))))
        for instances in by_document.values()
    ]
    return items, represents


def _chosen_metric(spec: TaskSpec, task: Any) -> tuple[str, int]:
    """(metric, index of the filter).

    Raises:
        EvaluationError: the task has no such metric or filter.
    """
    from lm_eval.api.metrics import mean

    aggregations = task.aggregation()
    filters = [ensemble.name for ensemble in task._filters]
    means = [metric for metric, function in aggregations.items() if function is mean]
    name, _, filter_name = (spec.metric or next(iter([*means, *aggregations]), "")).partition(",")
    if name not in aggregations:
        raise EvaluationError(_unknown(f"task {spec.task!r}: no metric", name, list(aggregations)))
    if filter_name and filter_name not in filters:
        raise EvaluationError(_unknown(f"task {spec.task!r}: no filter", filter_name, filters))
    return name, filters.index(filter_name) if filter_name else 0


def _unknown(what: str, name: str, known: Sequence[str]) -> str:
    return f"{what} {name!r}{did_you_mean(name, known)} It has: {', '.join(known) or 'none'}"


def _drop_shared(splits: dict[Split, TaskItems]) -> None:
    """Drop from each split the items that are also in a later one, so that `report` stays unchanged."""
    later: set[Hashable] = set()
    for split in reversed([split for split in Split if split in splits]):
        keys = splits[split].keys()
        if shared := {number for number, pair in enumerate(keys) if not later.isdisjoint(pair)}:
            splits[split] = splits[split].without(shared)
        later.update(*keys)


def _check_disjoint(name: str, splits: Mapping[Split, TaskItems]) -> None:
    keys = {split: items.keys() for split, items in splits.items()}
    for one, two in combinations(keys, 2):
        documents = {document for document, _ in keys[one]}
        requests = {request for _, request in keys[one]}
        shared = [
            number
            for number, (document, request) in enumerate(keys[two])
            if document in documents or request in requests
        ]
        if shared:
            raise EvaluationError(
                f"task {name!r}: {len(shared)} of the {len(keys[two])} {two.value} items are also {one.value} items "
                f"(the first is {two.value} item {shared[0]}); the splits must be disjoint, or scores are optimistic. Set drop_shared: true to leave "
                f"them out of {one.value}"
            )
