"""Recipe checks that do not need the models: parameters must be known to the method, at a valid level, and of the right type and range."""

from collections.abc import Sequence

from evomerge.core import RecipeError
from evomerge.recipe.methods import PIECEWISE, BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.parts import Parameters, Setting, Slice
from evomerge.recipe.recipe import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Refuse a recipe that is invalid for any models.

    Raises:
        RecipeError: a method or parameter is unknown, pieces do not fit, a global parameter is given for one model, a value has
            the wrong type or is out of range, the number of sources is wrong, or the base is missing.
    """
    spec = method_spec(recipe.method)
    if spec.needs_base and any(recipe.base_of(part) is None for part in recipe.slices):
        raise RecipeError(f"merge method {spec.name!r} needs a base model: set base_model")
    _check_pieces(recipe)
    _check_parameters(spec, recipe.parameters, "parameters", on_source=False)
    for index, part in enumerate(recipe.slices):
        where = f"slices[{index}]"
        listed = "models" if recipe.whole_model else f"{where}.sources"
        _check_parameters(spec, part.parameters, f"{where}.parameters", on_source=False)
        for source in part.sources:
            _check_parameters(spec, source.parameters, f"{listed}[{source.key}].parameters", on_source=True)
        _check_sources(spec, part, recipe.base_of(part), where)


def _check_pieces(recipe: Recipe) -> None:
    if (recipe.method == PIECEWISE.name) != (recipe.pieces is not None):
        raise RecipeError(
            f"merge method {recipe.method!r}: `pieces` are required for method {PIECEWISE.name!r}, and for no other"
        )
    if recipe.pieces is None:
        return
    if not recipe.whole_model or recipe.base is not None:
        raise RecipeError(f"merge method {PIECEWISE.name!r} takes whole models and no base")
    recipe.pieces.check(len(recipe.slices[0].sources))


def _check_sources(spec: MethodSpec, part: Slice, base: str | None, where: str) -> None:
    keys = [source.key for source in part.sources]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise RecipeError(f"{where}: model {twice[0]} appears twice; list each model once in a slice")
    lengths = {
        source.layer_range[1] - source.layer_range[0] for source in part.sources if source.layer_range is not None
    }
    if len(lengths) > 1:
        ranges = ", ".join(f"{source.key} {list(source.layer_range or ())}" for source in part.sources)
        raise RecipeError(f"{where}: all sources must have the same number of layers, got {ranges}")
    taken = {source.layer_range for source in part.sources}
    if len(taken) > 1 and spec.base is not BaseRole.SOURCE and base is not None and base not in keys:
        raise RecipeError(
            f"{where}: the sources have different layer ranges, so the base model {base} must be listed among them with its own"
        )
    n_sources = len(keys) if spec.base is BaseRole.SOURCE else sum(key != base for key in keys)
    if not spec.takes(n_sources) and not (spec.base_alone and n_sources == 0):
        beside = "" if spec.base is BaseRole.SOURCE else " besides the base"
        raise RecipeError(
            f"{where}: merge method {spec.name!r} takes {spec.source_range} model(s){beside}, got {n_sources}"
        )


def _check_parameters(spec: MethodSpec, parameters: Parameters, where: str, *, on_source: bool) -> None:
    for name, settings in parameters.items():
        try:
            parameter = spec.known_parameter(name)
        except RecipeError as problem:
            raise RecipeError(f"{where}: {problem}") from None
        if on_source and parameter.scope is Scope.GLOBAL:
            raise RecipeError(
                f"{where}.{name}: {name!r} applies to the whole merge; set it for the slice or globally, not for one model"
            )
        for setting in settings:
            check_setting(parameter, setting, f"{where}.{name}")


def check_setting(parameter: ParameterSpec, setting: Setting, where: str) -> None:
    """Refuse a value of the wrong type or outside the parameter's range.

    Raises:
        RecipeError: names `where`, the expected and the actual value.
    """
    values: Sequence[float | bool | str] = setting.value if isinstance(setting.value, tuple) else (setting.value,)
    if isinstance(parameter.default, bool):
        if any(value not in (0.0, 1.0) or isinstance(value, str) for value in values):
            raise RecipeError(f"{where}: expected true or false, got {setting.value!r}")
        return
    for value in values:
        if isinstance(value, bool | str):
            raise RecipeError(f"{where}: expected a number, got {value!r}")
        if not parameter.admits(value):
            raise RecipeError(f"{where}: expected {parameter.range}, got {value!r}")
