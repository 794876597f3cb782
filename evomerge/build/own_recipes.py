"""Recipes of the user's own that a search is compared with and starts from: read from files, checked, found in the search space."""

import os
from collections.abc import Mapping
from pathlib import Path

from evomerge.config import SearchConfig
from evomerge.core import ConfigError, RecipeError
from evomerge.plan import RANKED_METHODS, MergePlan, ModelHeader, TensorStep, keeps_ranks, make_plan
from evomerge.recipe import MethodsTemplate, Recipe, RecipeTemplate, read_recipe, with_folders

_PREFIX = "recipe:"
"""of the names of these baselines"""


def own_recipes(
    config: SearchConfig,
    headers: Mapping[str, ModelHeader],
    models: Mapping[str, tuple[str, str | None]],
    n_layers: int | None,
) -> dict[str, Recipe]:
    """`recipe:<name of the file>` -> recipe, for every file of `baselines.recipes`.

    Args:
        config: the configuration.
        headers: what recipes call a model -> header.
        models: what recipes call a model -> its folder and that of its adapter.
        n_layers: most layers that the engine has room for; None = those of the first model, and no fewer.

    Raises:
        ConfigError: a file that is no recipe, a recipe that the engine cannot hold, or two of one name.
    """
    folders = {os.path.realpath(folder): folder for place in models.values() for folder in place if folder is not None}
    found: dict[str, Recipe] = {}
    for path in config.baselines.recipes:
        name = _PREFIX + Path(path).stem
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
    """Raises RecipeError where a recipe has a vocabulary or chat template of its own, in which an engine cannot score it."""
    for setting in ("tokenizer", "chat_template"):
        if getattr(recipe, setting) is not None:
            raise RecipeError(
                f"{setting}: recipes are scored with the vocabulary and chat template of their first model; "
                "write the merged model with `evomerge merge` and score its folder"
            )


def _check_fits(recipe: Recipe, config: SearchConfig, headers: Mapping[str, ModelHeader], n_layers: int | None) -> None:
    """Raises RecipeError where the search's engine and sources do not do for the recipe."""
    strange = [model for model in recipe.models() if model not in headers]
    if strange:
        raise RecipeError(f"uses {', '.join(strange)}, which models does not list")
    refuse_own_vocabulary(recipe)
    plan = make_plan(recipe, headers)
    alike = RANKED_METHODS if recipe.method in RANKED_METHODS else (recipe.method,)
    if any(map(keeps_ranks, plan.steps)) and not set(config.space.methods) & set(alike):
        raise RecipeError(
            f"{recipe.method} keeps ranks of all weights in memory, for which only a search over such a method has room; "
            "score the recipe with `evomerge eval`"
        )
    depth, wanted = plan.n_layers, n_layers or next(iter(headers.values())).n_layers
    if depth != wanted and (n_layers is None or depth > wanted):
        raise RecipeError(
            f"makes a model of {depth} layers; the search's have {'at most ' if n_layers else ''}{wanted}"
        )


def values_in_space(
    recipe: Recipe, template: RecipeTemplate | MethodsTemplate, headers: Mapping[str, ModelHeader]
) -> dict[str, float] | None:
    """The parameter values at which `template` makes the same merge; None where there are none.

    The order of the experts, the seed of random masks and the dtypes do not count.
    """
    if isinstance(template, RecipeTemplate):
        return _values_in(recipe, template, headers)
    for method in template.methods:
        found = _values_in(recipe, method, headers)
        if found is not None:
            return template.point_of(method, found)
    return None


def _values_in(recipe: Recipe, template: RecipeTemplate, headers: Mapping[str, ModelHeader]) -> dict[str, float] | None:
    wanted = _steps(make_plan(recipe, headers))
    parameters = template.space.parameters
    # a value of its own for every coordinate shows which tensors it is used for
    marks = {
        parameter.name: parameter.low + (parameter.high - parameter.low) * (number + 1) / (len(parameters) + 1)
        for number, parameter in enumerate(parameters)
    }
    names = {(_family(name), mark): name for name, mark in marks.items()}
    values: dict[str, float] = {}
    for output, marked in _steps(make_plan(template.recipe(marks), headers)).items():
        step = wanted.get(output)
        if step is None or len(step) != len(marked):
            return None
        for (_, found), (_, places) in zip(step, marked, strict=True):
            for name, mark in places.items():
                coordinate = names.get((name, mark))
                if coordinate is not None and name in found:
                    values.setdefault(coordinate, float(found[name]))
    inside = [
        parameter.name in values and parameter.low <= values[parameter.name] <= parameter.high
        for parameter in parameters
    ]
    if not all(inside) or _steps(make_plan(template.recipe(values), headers)) != wanted:
        return None
    return values


def _family(coordinate: str) -> str:
    """The merge parameter that a coordinate is a value of."""
    return coordinate.partition("[")[0]


_Step = list[tuple[tuple[str, ...], Mapping[str, float | bool]]]


def _steps(plan: MergePlan) -> dict[str, _Step]:
    """Output -> what makes it: (method, base) with the shared parameters, then every input with its own, by name."""

    def of(step: TensorStep) -> _Step:
        base = () if step.base is None else step.base.key
        inputs = [(entry.key, entry.parameters) for entry in step.inputs]
        return [((step.method, *base), step.parameters), *sorted(inputs, key=lambda entry: entry[0])]

    return {step.output: of(step) for step in plan.steps}
