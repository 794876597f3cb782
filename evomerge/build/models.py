"""Work on single models outside a search: scoring one on a configuration's tasks."""

import os
from dataclasses import dataclass
from pathlib import Path

from evomerge.build.evaluators import evaluator_settings, make_evaluator, worker_environment
from evomerge.config import SearchConfig, SyntheticConfig
from evomerge.core import ConfigError, Evaluation, EvaluationError, EvaluationRequest, FilePath, Split, Status
from evomerge.plan import make_plan, read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source, read_recipe


@dataclass(frozen=True, slots=True)
class Scored:
    """What was scored, and how it did."""

    model: str
    evaluation: Evaluation


def evaluate_model(config: SearchConfig, model: FilePath, split: Split = Split.REPORT) -> Scored:
    """Scores a checkpoint folder or a recipe file on the tasks of `config`.

    Args:
        config: names tasks and engine; its models do not matter.
        model: a folder with a config.json, or a recipe file.
        split: which items.

    Raises:
        ConfigError: a synthetic configuration.
        EvomergeError: the model, a task or the engine cannot be loaded.
        EvaluationError: the model cannot be scored.
    """
    if isinstance(config.evaluation, SyntheticConfig):
        raise ConfigError("the synthetic evaluation scores points, not models")
    model = Path(model)
    recipe = identity_recipe(model) if model.is_dir() else read_recipe(model)
    headers = {key: read_model_header(key) for key in recipe.models()}
    n_layers = make_plan(recipe, headers).n_layers
    settings = evaluator_settings(config, list(recipe.models()), n_slots=n_layers or None)
    for name, value in worker_environment(config).items():
        os.environ.setdefault(name, value)  # before torch is imported: the same conditions as a worker of a search
    evaluator = make_evaluator(settings)
    try:
        evaluation = evaluator.evaluate(EvaluationRequest(str(model), split, recipe.to_json()))
    finally:
        evaluator.close()
    if evaluation.status is not Status.OK:
        raise EvaluationError(f"{model}: {evaluation.error}")
    return Scored(str(model), evaluation)


def identity_recipe(folder: Path) -> Recipe:
    """The recipe whose result is the checkpoint in `folder` itself."""
    source = Source(str(folder.resolve()), parameters={"weight": (Setting(1.0),)})
    return Recipe(method="linear", slices=(Slice((source,)),))


def merge_recipe(recipe: FilePath, out: FilePath, *, dtype: str | None = None, overwrite: bool = False) -> Path:
    """Materialises a recipe file as a checkpoint folder and returns the folder.

    Raises:
        RecipeError: the file is no recipe, or `out` exists.
        CheckpointError: a model cannot be read, or the result is not finite.
    """
    from evomerge.weights import merge_to_folder

    out = Path(out)
    merge_to_folder(read_recipe(Path(recipe)), out, dtype=dtype, overwrite=overwrite)
    return out
