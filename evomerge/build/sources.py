"""config -> its models: their names in recipes, their folders, and whether these exist."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.config import LmEvalConfig, ModelConfig, SearchConfig
from evomerge.core import ConfigError
from evomerge.evaluation.task_files import is_task_file
from evomerge.plan import TEMPLATE_FILE, ModelHeader, chat_template_of, check_tokenizer, default_dtype


def listed_models(config: SearchConfig) -> dict[str, ModelConfig]:
    """Setting -> model, for every setting that names a model; the base first."""
    models = config.models
    if models is None:
        return {}
    base = {} if models.base is None else {"models.base": models.base}
    return base | {f"models.experts.{name}": model for name, model in models.experts.items()}


def model_table(config: SearchConfig) -> dict[str, tuple[str, str | None]]:
    """Model name in recipes -> its folder and that of its adapter, for every model of the configuration; the base first."""
    return {model.key: (model.path, model.lora) for model in listed_models(config).values()}


def adapted_models(config: SearchConfig) -> dict[str, tuple[str, str]]:
    """The entries of `model_table` that have adapters."""
    return {key: (model, lora) for key, (model, lora) in model_table(config).items() if lora is not None}


def written_dtype(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> str:
    """The dtype that merged weights are rounded to: as configured, otherwise the first model's dtype.

    Recipes state it so that mergekit, too, computes in float32 and rounds once; without it, mergekit computes in the sources' dtype.
    """
    return config.space.out_dtype or default_dtype(next(iter(headers.values())))


def check_prompts(evaluation: LmEvalConfig, first: ModelHeader) -> None:
    """Raise an error if the first model, whose tokenizer is used, has none, or lacks a chat template that is needed."""
    check_tokenizer(first.folder)
    if evaluation.apply_chat_template and chat_template_of(first) is None:
        raise ConfigError(
            f"evaluation.apply_chat_template: the tokenizer of {first.folder} has no chat template; add one to this folder as {TEMPLATE_FILE}, "
            "or set this to false"
        )


def experts_named_twice(config: SearchConfig) -> list[str]:
    """An error message for every expert that is the same model as an earlier one, which would have two weights for one model."""
    first: dict[str, str] = {}
    return [
        f"{setting}: {model.key} is also {first[model.key]}; remove one of them"
        for setting, model in listed_models(config).items()
        if setting != "models.base" and first.setdefault(model.key, setting) != setting
    ]


def sources_exist(config: SearchConfig) -> bool:
    """Whether all models and task files of the configuration exist."""
    places = [folder for place in model_table(config).values() for folder in place if folder is not None]
    places += [task.task for task in config.tasks if is_task_file(task.task)]
    return all(Path(place).exists() for place in places)
