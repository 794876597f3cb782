"""Creates strategies by name: the table of built-in strategies, plugins, and typed options."""

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, cast

from pydantic import ValidationError

from evomerge.core import ConfigError, Json, Objective, did_you_mean
from evomerge.space import SearchSpace
from evomerge.strategy.base import Strategy, StrategyOptions
from evomerge.strategy.replay import ReplayStrategy

ENTRY_POINT_GROUP = "evomerge.strategies"
"""Plugins register a class here: `name = "package.module:Class"`."""

AUTO = "auto"
"""In a configuration, stands for the strategy that docs/strategies.md recommends for its problem."""

STRATEGIES: Mapping[str, str] = MappingProxyType(
    {
        "cma_es": "evomerge.strategy.cma_es:CmaEs",
        "catcma": "evomerge.strategy.catcma:CatCma",
        "cycleqd": "evomerge.strategy.elites:CycleQd",
        "ga": "evomerge.strategy.pareto:Ga",
        "age_moea2": "evomerge.strategy.pareto:AgeMoea2",
        "nsga2": "evomerge.strategy.pareto:Nsga2",
        "bo": "evomerge.strategy.bo:BayesianOptimisation",
        "m2n2": "evomerge.strategy.m2n2:M2n2",
        "map": "evomerge.strategy.map_surrogate:MapSurrogate",
        "map_elites": "evomerge.strategy.elites:MapElites",
        "nevergrad": "evomerge.strategy.nevergrad_optimizer:NevergradStrategy",
        "nsga3": "evomerge.strategy.pareto:Nsga3",
        "sms_emoa": "evomerge.strategy.pareto:SmsEmoa",
        "optuna": "evomerge.strategy.optuna_sampler:OptunaStrategy",
        "random": "evomerge.strategy.space_filling:RandomSearch",
        "sobol": "evomerge.strategy.space_filling:SobolSearch",
    }
)
"""Built-in strategies: name -> import path of the class, which is imported on demand."""


_EXTRAS = frozenset({"bo", "nevergrad", "optuna"})
"""Strategies whose library is an optional extra of the same name."""


def _plugins() -> dict[str, EntryPoint]:
    """Installed plugins by name; they cannot replace built-in strategies. Nothing is imported, so a broken plugin cannot affect the others."""
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name not in STRATEGIES}


def strategy_names() -> tuple[str, ...]:
    """All names that `make_strategy` accepts, sorted."""
    return tuple(sorted({*STRATEGIES, *_plugins()}))


def strategy_class(name: str) -> Callable[..., Strategy]:
    """The class registered as `name`.

    Raises:
        ConfigError: there is no such strategy, or a package it needs is not installed.
    """
    plugins = _plugins()
    if name not in STRATEGIES and name not in plugins:
        raise ConfigError(
            f"there is no strategy {name!r}{did_you_mean(name, (AUTO, *strategy_names()))} Known: {', '.join(strategy_names())}, "
            f"and in a configuration {AUTO}"
        )
    try:
        if name in plugins:
            return cast(Callable[..., Strategy], plugins[name].load())
        return cast(Callable[..., Strategy], resolve_name(STRATEGIES[name]))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"strategy {name!r} cannot be loaded: {error}; install the packages it needs"
            f"{f' (the extra evomerge[{name}])' if name in _EXTRAS else ''} or choose another strategy"
        ) from error


def strategy_options(name: str, options: Mapping[str, Any]) -> StrategyOptions:
    """`options` validated and completed with the defaults of the strategy `name`.

    Raises:
        ConfigError: the strategy or an option is unknown (suggests the closest name), or a value is out of range.
    """
    options_type = _options_type(name)
    for key in options:
        if key not in options_type.model_fields:
            valid = sorted(options_type.model_fields)
            raise ConfigError(
                f"strategy {name} has no option {key!r}{did_you_mean(key, valid)} It has: {', '.join(valid) or 'none'}"
            )
    try:
        return options_type.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError(f"strategy {name}: {'; '.join(_problems(error, options))}") from error


def _problems(error: ValidationError, options: Mapping[str, Any]) -> list[str]:
    """One message for each invalid option; for options of several types, it combines the problems for each type."""
    found: dict[str, dict[str, None]] = {}
    for problem in error.errors():
        option, *inside = problem["loc"]
        places = "".join(f"[{place}]: " for place in inside if isinstance(place, int))
        found.setdefault(str(option), {})[places + problem["msg"]] = None
    return [f"{option}: {' or: '.join(messages)}, got {options[option]!r}" for option, messages in found.items()]


def strategy_options_schema(name: str) -> dict[str, Json]:
    """The JSON schema of a strategy's options: types, bounds, defaults and descriptions.

    Raises:
        ConfigError: the strategy is unknown.
    """
    return cast(dict[str, Json], _options_type(name).model_json_schema())


def make_strategy(
    name: str,
    *,
    dimension: int | None = None,
    space: SearchSpace | None = None,
    objectives: Sequence[Objective | str],
    seed: int,
    choices: Sequence[int] | None = None,
    families: Sequence[int] | None = None,
    **options: Any,
) -> Strategy:
    """A fresh strategy.

    Args:
        name: one of `strategy_names()`.
        dimension: number of unit coordinates of the space, d >= 1; or give `space`.
        space: the space itself, which also gives `choices`, `families` and, for a `ReplayStrategy`, `conditions`; give either it or
            `dimension`.
        objectives: the objectives; a plain name is maximised.
        seed: of all random numbers, >= 0.
        choices: (d,), the number of choices of each categorical coordinate, 0 for real ones (`SearchSpace.choices`); None = all
            real. Passed to the strategy only if there are categorical coordinates.
        families: (d,), the index of each coordinate's family (`SearchSpace.families`); None = no families. Passed only to
            strategies whose class sets `uses_families`.
        options: the strategy's own options; `strategy_options_schema(name)` lists them.

    Raises:
        ConfigError: a name or option is unknown, a value is out of range, or not exactly one of `dimension` and `space` is given.
    """
    checked, conditions = strategy_options(name, options), None
    if (dimension is None) == (space is None):
        raise ConfigError(
            "make_strategy needs either dimension= or space=, got " + ("neither" if space is None else "both")
        )
    if space is not None:
        dimension, choices, families = space.dimension, space.choices, space.families
        conditions = space.conditions if any(space.conditions) else None
    goals = [Objective(goal) if isinstance(goal, str) else goal for goal in objectives]
    strategy = strategy_class(name)
    told: dict[str, Any] = {"choices": tuple(choices)} if choices is not None and any(choices) else {}
    if families is not None and getattr(strategy, "uses_families", False):
        told["families"] = tuple(families)
    if conditions is not None and isinstance(strategy, type) and issubclass(strategy, ReplayStrategy):
        told["conditions"] = conditions
    return strategy(dimension, goals, seed, checked, **told)


def _options_type(name: str) -> type[StrategyOptions]:
    options_type = getattr(strategy_class(name), "options_type", None)
    if not (isinstance(options_type, type) and issubclass(options_type, StrategyOptions)):
        raise ConfigError(f"strategy {name!r} is broken: its `options_type` must be a subclass of StrategyOptions")
    return options_type
