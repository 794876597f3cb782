"""Work on single models outside a search: scoring one on a configuration's tasks, and writing the model that a recipe makes."""

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
        config: whose tasks these are.
        shown: task -> the items that were to be shown.
    """

    model: str
    evaluation: Evaluation
    config: SearchConfig
    shown: "Mapping[str, Sequence[ShownItem]]" = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Everything, as `evomerge eval --json` prints it; `items` where some are shown."""
        found = self.evaluation
        items = {task: [asdict(item) for item in shown] for task, shown in self.shown.items()}
        return {
            "model": self.model,
            "split": found.split.value,
            "scores": dict(found.scores),
            "stderr": dict(found.stderr),
            "n_items": {task: len(scores) for task, scores in found.item_scores.items()},
            "cost": dict(found.cost),
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
    """Scores a checkpoint folder or a recipe on the tasks of `config`.

    Environment variables that workers of a search would have are set in this process, unless they are set already.

    Args:
        config: names tasks and engine: a configuration, what `load_config` takes, or a run directory; its models do not matter.
        model: a folder with a config.json, ORG/NAME in the local hub cache, a recipe file, or a recipe, as `Run.recipe` gives it.
        split: which items.
        show: number of items of every task that are returned with the model's prompts and answers.
        overrides: of the configuration, as in `load_config`.

    Raises:
        ConfigError: a synthetic configuration, or there is no such model.
        RecipeError: a recipe with a vocabulary or chat template of its own.
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
    for name, value in worker_environment(config).items():
        os.environ.setdefault(name, value)  # before torch is imported: the same conditions as a worker of a search
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
    """The path of a model folder or recipe file, and the recipe that makes the model."""
    path = Path(model) if Path(model).exists() else cached_model(str(model)) or Path(model)
    if not path.exists():
        raise ConfigError(f"no such model folder or recipe file: {path}")
    return str(path), identity_recipe(path) if path.is_dir() else read_recipe(path)


def _with_overrides(config: AnyConfig, overrides: Overrides) -> SearchConfig:
    """The configuration, loaded where it is not, or that of the run in a directory."""
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
