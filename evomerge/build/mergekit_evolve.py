"""`write_translated_config`: a configuration of mergekit-evolve as one of ours, with a comment on whatever is otherwise here."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.build.starting import as_seen_from, found, named, refuse_existing, write_config
from evomerge.config import EvolveConfig, read_evolve_config
from evomerge.core import ConfigError, FilePath, cached_model
from evomerge.plan import read_source
from evomerge.recipe import BaseRole, Source, method_spec, model_reference

_GROUPS = {
    "self_attn": "attention", "attn": "attention", "attention": "attention", "mlp": "mlp",
    "norm": "norms", "layernorm": "norms", "embed": "embeddings", "embed_tokens": "embeddings", "lm_head": "embeddings",
}  # fmt: skip
"""a filter -> the module group that it stands for"""

_LOWEST_WEIGHT = -1.5

_EVALUATIONS = 100
"""as many as mergekit-evolve makes unless its command line says otherwise"""

_HEAD = """\
# Translated from {source}, a configuration of mergekit-evolve. Next: `evomerge validate --items {file}`, `evomerge search {file}`.
# Paths are relative to this file; docs/configuration.md explains the settings.
#
# Each task needs three disjoint splits: search (guides the search), select (ranks the finalists), report (scored once, at the end).
# Where the data's splits have other names, map them:
#   - {{task: mine, splits: {{search: train, select: validation, report: test}}}}      # or parts of one: 'train[:60%]', ...
"""


def write_translated_config(out: FilePath, file: FilePath, *, overwrite: bool = False) -> list[str]:
    """Writes the translation of a configuration of mergekit-evolve; returns what is still to be done, as `write_first_config`.

    Args:
        out: the file to write.
        file: the file to translate. Its models are looked up beside it, then in the working directory.
        overwrite: replace `out` where it exists.

    Raises:
        ConfigError: `file` is no such configuration, or of a search that there is none of here; or `out` exists.
        RecipeError, CheckpointError: a model is no reference to one, or cannot be read.
    """
    out, file = Path(out), Path(file)
    refuse_existing(out, overwrite=overwrite)
    config, folder, remarks = read_evolve_config(file), out.resolve().parent, list[str]()
    base, experts = _models(config, file, remarks)
    places = {name: as_seen_from(folder, source) for name, source in _named_apart(experts).items()}
    settings = {
        "models": ({} if base is None else {"base": as_seen_from(folder, base)}) | {"experts": places},
        "space": _space(config, read_source(experts[0]).n_layers, base is not None, str(file), remarks),
        **_evaluation(config),
        "strategy": "cma_es",
        "budget": {"evaluations": _EVALUATIONS},
        "seed": 0,
    }
    remarks += _left_out(config)
    head = _HEAD.format(source=file.name, file=shlex.quote(str(out)))
    notes = "".join(["#\n", *(f"# {remark}\n" for remark in remarks)]) if remarks else ""
    return write_config(out, f"{head}{notes}\n" + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _models(config: EvolveConfig, file: Path, remarks: list[str]) -> tuple[Source | None, Sequence[Source]]:
    """Base and experts."""
    genome = config.genome
    models = [_located(entry, f"genome.models[{index}]", file) for index, entry in enumerate(genome.models)]
    base = None if genome.base_model is None else _located(genome.base_model, "genome.base_model", file)
    if genome.merge_method == "slerp":
        if len(models) != 2:
            raise ConfigError(
                f"{file}: genome.models: slerp of {len(models)} models: mergekit-evolve chooses two of them for every group of layers, "
                "which evomerge does not; give two, or take another method (multislerp interpolates between any number)"
            )
        if base is not None and base not in models:
            remarks.append("base_model is left out: slerp is between the two models")
        return models[0], models[1:]
    experts = [model for model in models if model != base]
    if (
        method_spec(genome.merge_method).base is BaseRole.SOURCE
    ):  # which merges whole models, a base among them as any other
        return (None, models) if len(experts) < len(models) else (base, models)
    if base is None:
        raise ConfigError(f"{file}: genome.base_model: is missing; {genome.merge_method} needs it")
    if not experts:
        raise ConfigError(f"{file}: genome.models: there is no model besides the base")
    if len(experts) < len(models):
        remarks.append("of genome.models the base is left out: it differs from itself in nothing")
    return base, experts


def _located(entry: Any, place: str, file: Path) -> Source:
    """The source that a reference to a model means: folders, or a model of the hub's cache."""
    source = model_reference(entry, f"{file}: {place}")
    if source.revision is not None:
        folder = cached_model(source.model, source.revision)
        if folder is None:
            raise ConfigError(f"{file}: {place}: {source.model} has no revision {source.revision} in the hub's cache")
        source = replace(source, model=str(folder), revision=None)
    beside = file.parent
    return found(source.moved(lambda path: str(beside / path) if (beside / path).is_dir() else path))


def _named_apart(experts: Sequence[Source]) -> dict[str, Source]:
    """The experts by the names of their folders, with numbers where those are the same."""
    plain = [next(iter(named([("", source)]))) for source in experts]
    numbered = [
        f"{name}-{plain[:index].count(name) + 1}" if name in plain[:index] else name for index, name in enumerate(plain)
    ]
    return named(list(zip(numbered, experts, strict=True)))


def _space(config: EvolveConfig, n_layers: int, has_base: bool, where: str, remarks: list[str]) -> dict[str, Any]:
    genome = config.genome
    space: dict[str, Any] = {"method": genome.merge_method}
    parameters = [item.name for item in method_spec(genome.merge_method).parameters if item.search_default]
    if genome.allow_negative_weights and "weight" in parameters:
        space["parameters"] = {name: {"low": _LOWEST_WEIGHT} if name == "weight" else {} for name in parameters}
    if genome.normalize is not None and genome.merge_method != "slerp":
        space["fixed"] = {"normalize": genome.normalize}
    size = genome.layer_granularity
    if size > 0 and n_layers % size:
        raise ConfigError(f"{where}: genome.layer_granularity: {n_layers} layers are no multiple of {size}")
    if 0 < size < n_layers:
        space |= {"layer_groups": n_layers // size} | ({"smooth": True} if genome.smooth else {})
    known = [text for text in genome.filters or () if text in _GROUPS]
    if known:
        space["module_groups"] = [*dict.fromkeys(_GROUPS[text] for text in known), "rest"]
    groups = ", ".join(dict.fromkeys(_GROUPS.values()))
    remarks += [
        f"filter {text} is left out: it stands for none of the module groups {groups}"
        for text in genome.filters or ()
        if text not in _GROUPS
    ]
    return space


def _evaluation(config: EvolveConfig) -> dict[str, Any]:
    """Tasks, objectives and how they are asked."""
    common: dict[str, Any] = {}
    if config.limit is not None and not config.shuffle:
        common["limit"] = config.limit
    if config.num_fewshot is not None:
        common["num_fewshot"] = config.num_fewshot
    settings: dict[str, Any] = {
        "tasks": [{"task": task.name, "metric": task.metric.removesuffix(",none"), **common} for task in config.tasks]
    }
    if any(task.weight != 1 for task in config.tasks):
        settings["objectives"] = [
            {"name": task.name, "weight": abs(task.weight)} | ({"direction": "minimize"} if task.weight < 0 else {})
            for task in config.tasks
        ]
    evaluation: dict[str, Any] = {}
    if config.limit is not None and config.shuffle:
        evaluation["search_items"] = config.limit
    if config.apply_chat_template:
        evaluation |= {"apply_chat_template": True, "fewshot_as_multiturn": config.fewshot_as_multiturn}
    return settings | ({"evaluation": evaluation} if evaluation else {})


def _left_out(config: EvolveConfig) -> list[str]:
    genome, remarks = config.genome, []
    if genome.normalize is None and genome.merge_method in ("ties", "dare_ties"):
        remarks.append(
            "normalize: mergekit-evolve divides weights by their sum, this search does not; space.fixed: {normalize: true} does"
        )
    if genome.tokenizer_source is not None:
        remarks.append("tokenizer_source is left out: the models of a search have one vocabulary")
    if config.random_init:
        remarks.append("random_init is left out: the search starts from the best baseline in its space")
    return remarks
