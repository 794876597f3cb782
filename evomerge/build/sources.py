"""config -> its models: what recipes call them, where they are, and whether they are there."""

from collections.abc import Mapping
from pathlib import Path

from evomerge.config import LmEvalConfig, ModelConfig, SearchConfig
from evomerge.core import ConfigError
from evomerge.evaluation.task_files import is_task_file
from evomerge.plan import TEMPLATE_FILE, ModelHeader, chat_template_of, check_tokenizer, default_dtype


def listed_models(config: SearchConfig) -> dict[str, ModelConfig]:
    """Every setting that names a model -> the model; the base first."""
    models = config.models
    if models is None:
        return {}
    base = {} if models.base is None else {"models.base": models.base}
    return base | {f"models.experts.{name}": model for name, model in models.experts.items()}


def model_table(config: SearchConfig) -> dict[str, tuple[str, str | None]]:
    """Every model of the configuration as recipes call it -> its folder and that of its adapter; the base first."""
    return {model.key: (model.path, model.lora) for model in listed_models(config).values()}


def adapted_models(config: SearchConfig) -> dict[str, tuple[str, str]]:
    """The part of `model_table` that has adapters."""
    return {key: (model, lora) for key, (model, lora) in model_table(config).items() if lora is not None}


def written_dtype(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> str:
    """What merged weights are rounded to: as configured, else the first model's dtype.

    Recipes name it, so that mergekit too computes in float32 and rounds once; left out, it computes in the sources' dtype.
    """
    return config.space.out_dtype or default_dtype(next(iter(headers.values())))


def check_prompts(evaluation: LmEvalConfig, first: ModelHeader) -> None:
    """Raises an error where the model that lends its tokenizer has none, or none for the conversations that are asked for."""
    check_tokenizer(first.folder)
    if evaluation.apply_chat_template and chat_template_of(first) is None:
        raise ConfigError(
            f"evaluation.apply_chat_template: the tokenizer of {first.folder} has no chat template; add one there as {TEMPLATE_FILE}, "
            "or set this to false"
        )


def experts_named_twice(config: SearchConfig) -> list[str]:
    """A line for every expert that is the same model as one before it: the search would weigh one model by two parameters."""
    first: dict[str, str] = {}
    return [
        f"{setting}: is the same model as {first[model.key]}, {model.key}; leave one out"
        for setting, model in listed_models(config).items()
        if setting != "models.base" and first.setdefault(model.key, setting) != setting
    ]


def sources_exist(config: SearchConfig) -> bool:
    """Whether the models and the task files of the configuration are where it says."""
    places = [folder for place in model_table(config).values() for folder in place if folder is not None]
    places += [item.task for item in config.tasks if is_task_file(item.task)]
    return all(Path(place).exists() for place in places)
