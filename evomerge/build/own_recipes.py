"""The user's own recipes (`baselines.recipes`), which a search is compared with and starts from: read from files and checked."""

import os
from collections.abc import Mapping
from pathlib import Path

from evomerge.config import SearchConfig
from evomerge.core import ConfigError, RecipeError, own_recipe_baseline
from evomerge.plan import RANKED_METHODS, ModelHeader, keeps_ranks, make_plan
from evomerge.recipe import Recipe, read_recipe, with_folders


def own_recipes(
    config: SearchConfig,
    headers: Mapping[str, ModelHeader],
    models: Mapping[str, tuple[str, str | None]],
    n_layers: int | None,
) -> dict[str, Recipe]:
    """`recipe:<file name without suffix>` -> recipe, for every file of `baselines.recipes`.

    Args:
        config: the configuration.
        headers: model name in recipes -> header.
        models: model name in recipes -> its folder and that of its adapter.
        n_layers: maximum number of layers that the engine has room for; None = exactly as many as the first model has.

    Raises:
        ConfigError: a file is not a recipe, the engine cannot serve a recipe, or two files have the same name.
    """
    folders = {os.path.realpath(folder): folder for place in models.values() for folder in place if folder is not None}
    found: dict[str, Recipe] = {}
    for path in config.baselines.recipes:
        name = own_recipe_baseline(Path(path).stem)
        if name in found:
            raise ConfigError(f"baselines.recipes: two files are called {Path(path).stem!r}; rename one")
        try:
            recipe = with_folders(read_recipe(path), lambda folder: folders.get(os.path.realpath(folder), folder))
            _check_fits(recipe, config, headers, n_layers)
        except RecipeError as error:
            raise ConfigError(f"baselines.recipes: {path}: {str(error).removeprefix(f'{path}: ')}") from None
        found[name] = recipe
    return found


def refuse_own_vocabulary(recipe: Recipe) -> None:
    """Raise RecipeError if a recipe sets its own vocabulary or chat template, since an engine cannot score it with these."""
    for setting in ("tokenizer", "chat_template"):
        if getattr(recipe, setting) is not None:
            raise RecipeError(
                f"{setting}: recipes are scored with the vocabulary and chat template of their first model; "
                "write the merged model with `evomerge merge` and score its folder"
            )


def _check_fits(recipe: Recipe, config: SearchConfig, headers: Mapping[str, ModelHeader], n_layers: int | None) -> None:
    """Raise RecipeError if the recipe cannot be evaluated with the models and the engine of the search."""
    unknown = [model for model in recipe.models() if model not in headers]
    if unknown:
        raise RecipeError(f"the recipe uses {', '.join(unknown)}; add it to models, or change the recipe")
    refuse_own_vocabulary(recipe)
    plan = make_plan(recipe, headers)
    alike = RANKED_METHODS if recipe.method in RANKED_METHODS else (recipe.method,)
    if any(map(keeps_ranks, plan.steps)) and not set(config.space.methods) & set(alike):
        raise RecipeError(
            f"{recipe.method} keeps ranks of all weights in memory, and a search reserves memory for these only if space.method does too; "
            "score the recipe with `evomerge eval` instead"
        )
    depth, wanted = plan.n_layers, n_layers or next(iter(headers.values())).n_layers
    if depth != wanted and (n_layers is None or depth > wanted):
        raise RecipeError(
            f"the recipe makes a model of {depth} layers, but models of this search have {'at most ' if n_layers else ''}{wanted}"
        )
