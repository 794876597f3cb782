"""The schema of mergekit-evolve's configuration files (mergekit 0.1.5), which are translated into evomerge's."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from evomerge.config.load import settings_of_file, validated
from evomerge.config.short_forms import short_for_each
from evomerge.core import ConfigError, FilePath
from evomerge.core.settings import Settings


class _Strict(Settings):
    model_config = ConfigDict(allow_inf_nan=False)


class EvolveTask(_Strict):
    """A task. In YAML, just its name is enough."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class EvolveGenome(_Strict):
    """What is merged, and how."""

    models: tuple[Any, ...] = Field(min_length=1)
    """references to models, in any of mergekit's forms"""
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Any = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    """layers per group; 0: one group"""
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    """substrings of tensor names; the tensors matching each have their own values, and so do the remaining tensors"""
    smooth: bool = False


class EvolveConfig(_Strict):
    """The whole file."""

    genome: EvolveGenome
    tasks: Annotated[tuple[EvolveTask, ...], short_for_each("name"), Field(min_length=1)]
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


def read_evolve_config(path: FilePath) -> EvolveConfig:
    """Read and validate a mergekit-evolve configuration.

    Raises:
        ConfigError: the file is missing, not YAML, or invalid; the message lists every wrong key.
    """
    settings = settings_of_file(Path(path))
    if "genome" not in settings:
        raise ConfigError(f"{path}: not a mergekit-evolve configuration: it has no key 'genome'")
    return validated(EvolveConfig, settings, str(path))
