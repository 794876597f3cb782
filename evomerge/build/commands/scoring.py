"""Scores a single model on the tasks of a configuration or run, outside of a search."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from evomerge.build.commands.reading import recorded_config
from evomerge.build.engines import check_length, worker_environment
from evomerge.build.evaluators import evaluator_settings, make_evaluator
from evomerge.build.loading import AnyConfig, load_config
from evomerge.build.own_recipes import refuse_own_vocabulary
from evomerge.build.sources import check_prompts
from evomerge.config import Overrides, SearchConfig, SyntheticConfig, parse_config
from evomerge.core import (
    ConfigError,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    FilePath,
    Split,
    Status,
    cached_model,
)
from evomerge.plan import make_plan, read_headers, table_of
from evomerge.recipe import Recipe, Setting, Slice, Source, naming, read_recipe
from evomerge.search import RunDirectory

if TYPE_CHECKING:
    from evomerge.evaluation import LmEvalEvaluator
    from evomerge.evaluation.shown_items import ShownItem


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a model.

    Attributes:
        model: the folder, recipe file or recipe.
        evaluation: its scores.
        config: the configuration with the tasks.
        shown: task -> the requested number of its items.
    """

    model: str
    evaluation: Evaluation
    config: SearchConfig
    shown: "Mapping[str, Sequence[ShownItem]]" = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The output of `evomerge eval --json`; `items` only if some are shown."""
        evaluation = self.evaluation
        items = {task: [asdict(item) for item in shown] for task, shown in self.shown.items()}
        return {
            "model": self.model,
            "split": evaluation.split.value,
            "scores": dict(evaluation.scores),
            "stderr": dict(evaluation.stderr),
            "n_items": {task: len(scores) for task, scores in evaluation.item_scores.items()},
            "cost": dict(evaluation.cost),
            **({"items": items} if items else {}),
        }


def evaluate_model(
    config: AnyConfig,
    model: FilePath | Recipe,
    split: Split | str = Split.REPORT,
    *,
    show: int = 0,
    overrides: Overrides = (),
) -> Scored:
    """Score a checkpoint folder or a recipe on the tasks of `config`.

    Sets the environment variables of a search's workers in this process, unless they are already set.

    Args:
        config: defines tasks and engine: a configuration, any argument of `load_config`, or a run directory; its models are not used.
        model: a folder with a config.json, ORG/NAME in the local hub cache, a recipe file, or a recipe, e.g. from `Run.recipe`.
        split: the split to score.
        show: number of items of every task to return with the model's prompts and answers.
        overrides: overrides of the configuration, see `load_config`.

    Raises:
        ConfigError: the evaluation is synthetic, or there is no such model.
        RecipeError: the recipe sets its own vocabulary or chat template.
        EvomergeError: the model, a task or the engine cannot be loaded.
        EvaluationError: there is no such split, or the model cannot be scored.
    """
    name, recipe = (model.name or model.fingerprint(), model) if isinstance(model, Recipe) else _recipe_of(model)
    config, split = _with_overrides(config, overrides), Split.named(split)
    if isinstance(config.evaluation, SyntheticConfig):
        raise ConfigError("the synthetic evaluation scores points, not models")
    with naming(name):
        refuse_own_vocabulary(recipe)
    headers = read_headers(recipe)
    n_layers = make_plan(recipe, headers).n_layers
    check_prompts(config.evaluation, next(iter(headers.values())))
    check_length(config, next(iter(headers.values())))
    settings = evaluator_settings(
        config, table_of(headers), n_slots=n_layers or None, splits=[split], methods=(recipe.method,)
    )
    for variable, value in worker_environment(config).items():
        os.environ.setdefault(variable, value)  # before torch is imported, as in a worker of a search
    evaluator = make_evaluator(settings)
    try:
        evaluation = evaluator.evaluate(EvaluationRequest(name, split, recipe.to_json()))
        if evaluation.status is not Status.OK:
            raise EvaluationError(f"{name}: {evaluation.error}")
        shown = cast("LmEvalEvaluator", evaluator).show(split, show) if show else {}
    finally:
        evaluator.close()
    return Scored(name, evaluation, config, shown)


def _recipe_of(model: FilePath) -> tuple[str, Recipe]:
    """The path of a model folder or recipe file, and the recipe for the model."""
    path = Path(model) if Path(model).exists() else cached_model(str(model)) or Path(model)
    if not path.exists():
        raise ConfigError(f"no such model folder or recipe file: {path}")
    return str(path), identity_recipe(path) if path.is_dir() else read_recipe(path)


def _with_overrides(config: AnyConfig, overrides: Overrides) -> SearchConfig:
    """Load the configuration, if necessary from a file or run directory, and apply the overrides."""
    if isinstance(config, str | os.PathLike) and Path(config).is_dir():
        name, settings = str(config), recorded_config(RunDirectory(Path(config)))
    elif isinstance(config, SearchConfig):
        name, settings = "config", config
    else:
        return load_config(config, overrides)
    return parse_config(settings.model_dump(mode="json"), folder=Path.cwd(), where=name, overrides=overrides)


def identity_recipe(folder: Path) -> Recipe:
    """The recipe whose result is the checkpoint in `folder` itself."""
    source = Source(str(folder.resolve()), parameters={"weight": (Setting(1.0),)})
    return Recipe(method="linear", slices=(Slice((source,)),))
