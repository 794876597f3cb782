"""config -> the template of its recipes: what is searched, and what the rest of a recipe is."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from evomerge.build.coordinate_uses import unused_coordinates
from evomerge.build.crossings import crosses_models
from evomerge.build.sources import written_dtype
from evomerge.build.stacking import stack_template
from evomerge.config import SearchConfig, SpaceConfig
from evomerge.core import ConfigError
from evomerge.plan import ModelHeader
from evomerge.recipe import (
    AXES,
    MethodSpec,
    MethodsTemplate,
    RecipeTemplate,
    SearchedParameter,
    StackTemplate,
    allowed_axes,
    default_searched,
    default_switches,
    even_layer_groups,
    method_spec,
    module_filters,
)

_Setting = TypeVar("_Setting")


def check_bounds(template: RecipeTemplate | MethodsTemplate | StackTemplate | None) -> None:
    """Raises SpaceError where a template's bounds hold recipes that cannot be merged."""
    for each in template.methods if isinstance(template, MethodsTemplate) else (template,):
        if isinstance(each, RecipeTemplate):
            each.check_bounds()


def recipe_template(
    config: SearchConfig, headers: Mapping[str, ModelHeader], begun_with: Collection[str] = ()
) -> RecipeTemplate | MethodsTemplate | StackTemplate:
    """The template of a configuration.

    Args:
        config: the configuration.
        headers: what recipes call a model -> header, the base first.
        begun_with: of a run that goes on, the parameters of its space, which stay as they are: runs begun before 2026-11-29 have some
            that no tensor takes.

    Raises:
        ConfigError: settings of the space that contradict each other, or are missing.
        SpaceError: groups or paths that the models do not have.
        RecipeError: an unknown method, or an architecture that cannot be stacked.
    """
    stacking, methods = config.space.stacking, config.space.methods
    if crosses_models(config):
        return _seed_template(config, headers)
    if stacking is None:
        templates = [_merge_template(config, headers, method_spec(name), begun_with) for name in methods]
        return templates[0] if len(templates) == 1 else MethodsTemplate(templates)
    unused = config.space.merge_settings
    if unused and not stacking.parameters:
        raise ConfigError(
            f"space: {', '.join(unused)} would have no effect; set stacking.parameters: true to search the merge too"
        )
    if config.space.module_groups:
        raise ConfigError("space.module_groups: a stacked layer is taken or merged whole; leave it out")
    if len(methods) > 1:
        raise ConfigError(f"space.method: layers to be stacked are merged by one method, not by {' or '.join(methods)}")
    return stack_template(
        config,
        stacking,
        headers,
        merge=_merge_template(config, headers, method_spec(methods[0]), begun_with) if stacking.parameters else None,
        plain=_template(config, headers, "linear", default_searched(method_spec("linear"), ("expert",))),
    )


def _merge_template(
    config: SearchConfig, headers: Mapping[str, ModelHeader], spec: MethodSpec, begun_with: Collection[str]
) -> RecipeTemplate:
    """The template of one of the configured methods."""
    space, first = config.space, next(iter(headers.values()))
    groups = space.layer_groups
    layer_groups = even_layer_groups(first.n_layers, groups) if isinstance(groups, int) else list(groups)
    if space.smooth and (not isinstance(groups, int) or groups < 2):
        raise ConfigError("space.smooth: give space.layer_groups as the number of values over depth, at least 2")
    axes = tuple(
        axis for axis, used in zip(AXES, (True, len(layer_groups) > 1, bool(space.module_groups)), strict=True) if used
    )
    make = partial(
        _template,
        config,
        headers,
        spec.name,
        _searched(space, spec, axes),
        fixed=_fixed(space, spec),
        layer_groups=layer_groups,
        smooth=space.smooth,
        module_groups=module_filters(
            space.module_groups, [name for header in headers.values() for name in header.tensors]
        ),
    )
    template = make()
    if len(axes) == 1 or space.stacking is not None:  # every layer that can be stacked has tensors of every kind
        return template
    if begun_with:
        known = set(begun_with)
        names = [parameter.name for parameter in template.parameters]
        return make(unused=[name for name in names if not {name, f"{spec.name}.{name}"} & known])
    return make(unused=unused_coordinates(template, headers))


def _seed_template(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> RecipeTemplate:
    """The space that the seed models are the unit vectors of: a weight in [0, 1] per expert. Also makes the baselines.

    Raises:
        ConfigError: `space` says something that crossovers have no use for.
    """
    if unused := [*config.space.merge_settings, *(["stacking"] if config.space.stacking else [])]:
        raise ConfigError(
            f"space.{unused[0]}: strategy {config.strategy.name} crosses whole models and searches no merge method's parameters; "
            "remove it, or set strategy.on: recipes"
        )
    weights = [SearchedParameter("weight", 0.0, 1.0, ("expert",))]
    return _template(config, headers, "linear", weights, fixed={"normalize": False})


def _template(
    config: SearchConfig,
    headers: Mapping[str, ModelHeader],
    method: str,
    searched: Sequence[SearchedParameter],
    **options: Any,
) -> RecipeTemplate:
    """A template over the models of a configuration; `options` as in `RecipeTemplate`."""
    return RecipeTemplate(
        method=method,
        base=config.base_key,
        experts=config.expert_keys,
        searched=searched,
        n_layers=next(iter(headers.values())).n_layers,
        out_dtype=written_dtype(config, headers),
        seed=config.seed,
        **options,
    )


def _searched(space: SpaceConfig, spec: MethodSpec, axes: Sequence[str]) -> list[SearchedParameter]:
    """What is searched: the configured parameters, else those that searches over the method usually vary and that are not fixed."""
    if space.parameters is None:
        usual = default_searched(spec, axes)
        if not usual and len(space.methods) == 1:
            open_ones = ", ".join(item.name for item in spec.parameters if not isinstance(item.default, bool))
            raise ConfigError(
                f"space: {spec.name} has no parameter that is searched by default; "
                + (f"give space.parameters (it has {open_ones}), or evaluate" if open_ones else "evaluate")
                + " such a merge as one of baselines.recipes"
            )
        return [item for item in usual if item.name not in space.fixed]
    searched = []
    for name, wanted in _meant_for(spec, space, space.parameters).items():
        row = spec.parameter(name)
        low = row.search_low if wanted.low is None else wanted.low
        high = row.search_high if wanted.high is None else wanted.high
        if low is None or high is None:
            raise ConfigError(f"space.parameters.{name}: give low and high; {spec.name} has no usual range for it")
        per = allowed_axes(row, axes) if wanted.per is None else wanted.per
        searched.append(SearchedParameter(name, low, high, per))
    return searched


def _fixed(space: SpaceConfig, spec: MethodSpec) -> dict[str, float | bool]:
    """What is fixed of a method's parameters. The switches of a method that is the only one stand in the configuration (`load_config`)."""
    fixed = _meant_for(spec, space, space.fixed)
    several = len(space.methods) > 1 and space.searches_weights
    return {**default_switches(spec), **fixed} if several else fixed


def _meant_for(spec: MethodSpec, space: SpaceConfig, settings: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """Those of `settings`, by parameter, that a method has a use for: all, but where others of the space's methods have that parameter."""
    others = {row.name for name in space.methods if name != spec.name for row in method_spec(name).parameters}
    own = {row.name for row in spec.parameters}
    return {name: setting for name, setting in settings.items() if name in own or name not in others}
