"""`write_translated_config`: translates a mergekit-evolve configuration into an evomerge one, with comments on all differences."""

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.build.commands.given_models import default_name, relative_to, resolve_hub_models
from evomerge.build.commands.starting import refuse_existing, write_config
from evomerge.config import EvolveConfig, read_evolve_config
from evomerge.core import ConfigError, FilePath, cached_model
from evomerge.plan import ModelHeader, read_source
from evomerge.recipe import REST, BaseRole, Source, group_of, method_spec, model_reference, module_filters

_GROUPS = {"self_attn": "attention", "attn": "attention", "attention": "attention", "mlp": "mlp", "norm": "norms"}
"""filter -> the module group with the same tensors"""

_WIDER_GROUPS = {"layernorm": "norms", "embed": "embeddings", "embed_tokens": "embeddings", "lm_head": "embeddings"}
"""filter -> the module group with these and other tensors"""

_LOWEST_WEIGHT = -1.5
"""lower bound of weights if negative ones are allowed; the negative of the default upper bound"""

_FEWEST_ITEMS = 2
"""minimum of `evaluation.search_items`"""

_DTYPE = "bfloat16"
"""dtype of all merges by mergekit-evolve"""

_EVALUATIONS = 100
"""mergekit-evolve's default number of evaluations"""

_HEAD = """\
# Translated from {source}, a mergekit-evolve configuration. Next: `evomerge validate --items {file}`, `evomerge search {file}`.
# Paths are relative to this file; docs/configuration.md explains the settings.
#
# Each task needs three disjoint splits: search (guides the search), select (ranks the finalists), report (scored once, at the end).
# Where the data's splits have other names, map them:
#   - {{task: mine, splits: {{search: train, select: validation, report: test}}}}      # or parts of one: 'train[:60%]', ...
"""


def write_translated_config(out: FilePath, file: FilePath, *, overwrite: bool = False) -> list[str]:
    """Write the translation of a mergekit-evolve configuration; return what is left to do, like `write_first_config`.

    Args:
        out: the file to write.
        file: the file to translate. Its models are looked up in its folder, then in the working directory.
        overwrite: replace `out` if it exists.

    Raises:
        ConfigError: `file` is not such a configuration, or evomerge has no equivalent search; or `out` exists.
        RecipeError, CheckpointError: a model reference is invalid, or a model cannot be read.
    """
    out, file = Path(out), Path(file)
    refuse_existing(out, overwrite=overwrite)
    config, folder, remarks = read_evolve_config(file), out.resolve().parent, list[str]()
    base, experts = _models(config, file, remarks)
    header, *_ = [read_source(resolve_hub_models(source)) for source in ([] if base is None else [base]) + experts]
    places = {name: relative_to(folder, source) for name, source in _named_apart(experts).items()}
    settings = {
        "models": ({} if base is None else {"base": relative_to(folder, base)}) | {"experts": places},
        "space": _space(config, header, str(file), remarks),
        **_evaluation(config, remarks),
        "strategy": "cma_es",
        "budget": {"evaluations": _EVALUATIONS},
        "seed": 0,
    }
    remarks += _left_out(config, header)
    head = _HEAD.format(source=file.name, file=shlex.quote(str(out)))
    notes = "".join(["#\n", *(f"# {remark}\n" for remark in remarks)]) if remarks else ""
    return write_config(out, f"{head}{notes}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _models(config: EvolveConfig, file: Path, remarks: list[str]) -> tuple[Source | None, list[Source]]:
    """Base and experts."""
    genome = config.genome
    models = [_located(entry, f"genome.models[{index}]", file) for index, entry in enumerate(genome.models)]
    base = None if genome.base_model is None else _located(genome.base_model, "genome.base_model", file)
    experts = [model for model in models if base is None or not _is_same(model, base)]
    if genome.merge_method == "slerp":
        if len(models) != 2:
            raise ConfigError(
                f"{file}: genome.models: slerp with {len(models)} models is not supported (mergekit-evolve chooses two of them for every group of "
                "layers); list two models, or use another method (multislerp interpolates between any number)"
            )
        if genome.smooth or genome.filters:
            raise ConfigError(f"{file}: genome: mergekit-evolve does not support slerp with smooth or filters")
        if base is not None and len(experts) == len(models):
            remarks.append("base_model is left out: slerp interpolates between the two models")
        return models[0], models[1:]
    if method_spec(genome.merge_method).base is BaseRole.SOURCE:
        # these methods merge whole models; a base that is listed among them is just another model
        return (base if len(experts) == len(models) else None), models
    if base is None:
        raise ConfigError(f"{file}: genome.base_model: is missing; {genome.merge_method} needs it")
    if not experts:
        raise ConfigError(f"{file}: genome.models: there is no model other than the base")
    if len(experts) < len(models):
        remarks.append("the base is left out of the experts: its task vector is zero")
    return base, experts


def _located(entry: Any, place: str, file: Path) -> Source:
    """The source for a model reference; folders are looked up in the folder of `file` first."""
    source = model_reference(entry, f"{file}: {place}")
    if source.revision is not None:
        folder = cached_model(source.model, source.revision)
        if folder is None:
            raise ConfigError(
                f"{file}: {place}: revision {source.revision} of {source.model} is not in the hub cache; download it with `hf download`"
            )
        source = replace(source, model=str(folder), revision=None)
    beside = file.parent
    return source.moved(lambda path: str(beside / path) if (beside / path).is_dir() else path)


def _is_same(one: Source, other: Source) -> bool:
    return resolve_hub_models(one).moved(os.path.realpath) == resolve_hub_models(other).moved(os.path.realpath)


def _named_apart(experts: Sequence[Source]) -> dict[str, Source]:
    """The experts by their default names; with a number added if a name is taken or is "base"."""
    sources: dict[str, Source] = {}
    for source in experts:
        plain = default_name(source) or "model"
        numbered = itertools.chain([plain], (f"{plain}-{number}" for number in itertools.count(2)))
        sources[next(name for name in numbered if name != "base" and name not in sources)] = source
    return sources


def _space(config: EvolveConfig, header: ModelHeader, where: str, remarks: list[str]) -> dict[str, Any]:
    genome = config.genome
    space: dict[str, Any] = {"method": genome.merge_method}
    rows = method_spec(genome.merge_method).parameters
    parameters = [row.name for row in rows if row.search_default]
    if genome.allow_negative_weights and "weight" in parameters:
        space["parameters"] = {name: {"low": _LOWEST_WEIGHT} if name == "weight" else {} for name in parameters}
    if genome.normalize is not None and genome.merge_method != "slerp":
        space["fixed"] = {"normalize": genome.normalize}
    size, n_layers = genome.layer_granularity, header.n_layers
    if size > 0 and n_layers % size:
        raise ConfigError(f"{where}: genome.layer_granularity: {n_layers} layers are not a multiple of {size}")
    if 0 < size < n_layers:
        space |= {"layer_groups": n_layers // size} | ({"smooth": True} if genome.smooth else {})
    groups = _module_groups([text.strip(".") for text in genome.filters or ()], header, remarks)
    return space | ({"module_groups": groups} if groups else {})


def _module_groups(filters: Sequence[str], header: ModelHeader, remarks: list[str]) -> list[str]:
    groups: dict[str, None] = {}
    for text in filters:
        group = _GROUPS.get(text) or _WIDER_GROUPS.get(text)
        if group is None:
            remarks.append(f"filter {text} is left out: no module group corresponds to it")
            continue
        if text in _WIDER_GROUPS:
            remarks.append(f"filter {text} becomes the module group {group}, which contains more tensors")
        groups[group] = None
    taken = module_filters([*groups, REST], [*header.tensors, "of no group"])
    is_rest = any(group_of(name, taken) == REST for name in header.tensors)
    return [*groups, *([REST] if is_rest else [])] if groups else []


def _evaluation(config: EvolveConfig, remarks: list[str]) -> dict[str, Any]:
    """The settings `tasks`, `objectives` and `evaluation`."""
    plain = [Path(task.name).stem if task.name.endswith((".yaml", ".yml")) else task.name for task in config.tasks]
    tasks, names = list[dict[str, Any]](), list[str]()
    for task, name in zip(config.tasks, plain, strict=True):
        number = plain[: len(tasks)].count(name) + 1
        names.append(name if number == 1 else f"{name}-{number}")
        tasks.append({"task": task.name, "name": names[-1], "metric": task.metric.removesuffix(",none")})
        if config.num_fewshot is not None:
            tasks[-1]["num_fewshot"] = config.num_fewshot
    settings: dict[str, Any] = {"tasks": tasks}
    if any(task.weight != 1 for task in config.tasks):
        settings["objectives"] = [
            {"name": name, "weight": abs(task.weight)} | ({"direction": "minimize"} if task.weight < 0 else {})
            for name, task in zip(names, config.tasks, strict=True)
        ]
    evaluation: dict[str, Any] = {}
    if config.limit is not None:
        evaluation["search_items"] = max(config.limit, _FEWEST_ITEMS)
        if not config.shuffle:
            remarks.append("limit: candidates are scored on items drawn at random once, not on the first ones")
    if config.apply_chat_template:
        evaluation |= {"apply_chat_template": True, "fewshot_as_multiturn": config.fewshot_as_multiturn}
    return settings | ({"evaluation": evaluation} if evaluation else {})


def _left_out(config: EvolveConfig, header: ModelHeader) -> list[str]:
    genome, remarks = config.genome, []
    if genome.normalize is None and genome.merge_method in ("ties", "dare_ties"):
        remarks.append(
            "normalize: mergekit-evolve divides weights by their sum, this search does not; to do the same, set space.fixed: {normalize: true}"
        )
    if header.dtype != _DTYPE:
        remarks.append(
            f"merges are {header.dtype} like the models, not {_DTYPE} as in mergekit-evolve; to change that, set space.out_dtype: {_DTYPE}"
        )
    if genome.tokenizer_source is not None:
        remarks.append(
            "tokenizer_source is left out: the models of a search must have the same vocabulary; `evomerge align` gives them one"
        )
    if config.random_init:
        remarks.append("random_init is left out: the search starts from the best baseline in its space")
    return remarks
