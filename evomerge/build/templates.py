"""config -> the template of its recipes: which parameters are searched, and everything that is fixed."""

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
    """Raise SpaceError if there are recipes within a template's bounds that cannot be merged."""
    for part in template.methods if isinstance(template, MethodsTemplate) else (template,):
        if isinstance(part, RecipeTemplate):
            part.check_bounds()


def recipe_template(
    config: SearchConfig, headers: Mapping[str, ModelHeader], begun_with: Collection[str] = ()
) -> RecipeTemplate | MethodsTemplate | StackTemplate:
    """Make the template of a configuration.

    Args:
        config: the configuration.
        headers: model name in recipes -> header, the base first.
        begun_with: if a run is resumed, the parameters of its space, which are kept: runs started before 2026-11-29 have some that no
            tensor uses.

    Raises:
        ConfigError: settings of the space contradict each other, or one is missing.
        SpaceError: the models do not have the configured groups or paths.
        RecipeError: the method is unknown, or layers of this architecture cannot be stacked.
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
        raise ConfigError("space.module_groups: stacking uses or merges whole layers; leave it out")
    if len(methods) > 1:
        raise ConfigError(f"space.method: stacking supports only one method, got {', '.join(methods)}")
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
        raise ConfigError("space.smooth: set space.layer_groups to the number of values over depth, at least 2")
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
    if (
        len(axes) == 1 or space.stacking is not None
    ):  # all are used: layers that can be stacked have tensors of every kind
        return template
    if begun_with:
        known = set(begun_with)
        names = [parameter.name for parameter in template.parameters]
        return make(unused=[name for name in names if not {name, f"{spec.name}.{name}"} & known])
    return make(unused=unused_coordinates(template, headers))


def _seed_template(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> RecipeTemplate:
    """The template for crossovers: a weight in [0, 1] per expert, so that seed models are unit vectors. Also makes the baselines.

    Raises:
        ConfigError: `space` has settings that crossovers do not use.
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
    """Make a template over the models of a configuration; `options` are those of `RecipeTemplate`."""
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
    """The searched parameters: as configured, or by default the method's usual ones that are not fixed."""
    if space.parameters is None:
        usual = default_searched(spec, axes)
        if not usual and len(space.methods) == 1:
            numeric = ", ".join(row.name for row in spec.parameters if not isinstance(row.default, bool))
            raise ConfigError(
                f"space: {spec.name} has no parameter that is searched by default; "
                + (f"set space.parameters (it has {numeric}), or evaluate" if numeric else "evaluate")
                + " such a merge as one of baselines.recipes"
            )
        return [parameter for parameter in usual if parameter.name not in space.fixed]
    searched = []
    for name, wanted in _meant_for(spec, space, space.parameters).items():
        row = spec.parameter(name)
        low = row.search_low if wanted.low is None else wanted.low
        high = row.search_high if wanted.high is None else wanted.high
        if low is None or high is None:
            raise ConfigError(f"space.parameters.{name}: set low and high; {spec.name} has no default bounds for it")
        per = allowed_axes(row, axes) if wanted.per is None else wanted.per
        searched.append(SearchedParameter(name, low, high, per))
    return searched


def _fixed(space: SpaceConfig, spec: MethodSpec) -> dict[str, float | bool]:
    """The fixed parameters of a method. With a single method, its switches are in the configuration already (see `load_config`)."""
    fixed = _meant_for(spec, space, space.fixed)
    several = len(space.methods) > 1 and space.searches_weights
    return {**default_switches(spec), **fixed} if several else fixed


def _meant_for(spec: MethodSpec, space: SpaceConfig, settings: Mapping[str, _Setting]) -> dict[str, _Setting]:
    """The entries of `settings` (parameter -> setting) for a method: all except parameters that only other methods of the space have."""
    others = {row.name for name in space.methods if name != spec.name for row in method_spec(name).parameters}
    own = {row.name for row in spec.parameters}
    return {name: setting for name, setting in settings.items() if name in own or name not in others}
