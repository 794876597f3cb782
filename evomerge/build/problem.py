"""config -> the search problem: models, space, objectives, baselines, recipes. Reads model headers, never a weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from evomerge.build.crossings import Crossings, crosses_models, seed_template
from evomerge.build.own_recipes import own_recipes, values_in_space
from evomerge.build.stacking import stack_template
from evomerge.build.strategies import check_population, strategy_for
from evomerge.build.tasks import checked_task_names, task_specs
from evomerge.config import ObjectiveConfig, SearchConfig, SpaceConfig, SyntheticConfig
from evomerge.core import Candidate, ConfigError, Direction, EvomergeError, Json, Objective
from evomerge.evaluation.costs import COSTS, HIGHER_IS_BETTER
from evomerge.evaluation.task_files import is_task_file
from evomerge.evaluation.task_metrics import lower_is_better
from evomerge.plan import TEMPLATE_FILE, ModelHeader, chat_template_of, check_tokenizer, make_plan, read_models
from evomerge.recipe import (
    AXES,
    Combination,
    Lineage,
    MethodSpec,
    Recipe,
    RecipeTemplate,
    SearchedParameter,
    StackTemplate,
    allowed_axes,
    default_searched,
    even_layer_groups,
    method_spec,
    module_filters,
    with_adapters,
)
from evomerge.search import Baseline, Entry
from evomerge.space import Parameter, SearchSpace


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        config: the configuration it follows from.
        headers: what recipes call a model -> header, the base first; empty for the synthetic evaluation.
        template: point -> recipe; None for the synthetic evaluation.
        task_names: the scores that evaluations will have.
        crossings: what crossovers are made of; None where the strategy proposes points.
        own: the user's own recipes that are baselines, by name.
    """

    config: SearchConfig
    headers: Mapping[str, ModelHeader]
    template: RecipeTemplate | StackTemplate | None
    task_names: tuple[str, ...]
    crossings: Crossings | None = None
    own: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def max_slots(self) -> int | None:
        """Layers that the engine must have room for; None where every candidate is as deep as the base."""
        return self.template.max_slots if isinstance(self.template, StackTemplate) else None

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        if self.template is not None:
            return self.template.space
        evaluation = self.config.evaluation
        if not isinstance(evaluation, SyntheticConfig):
            raise ConfigError("a search without models needs evaluation.kind: synthetic")
        return SearchSpace([Parameter(f"x{index}", 0.0, 1.0) for index in range(evaluation.dimension)])

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What is optimised: the configured objectives, else every task.

        Raises:
            ConfigError: an objective that no task produces, or that stands twice.
        """
        if not self.config.objectives:
            return tuple(Objective(name) for name in self.task_names)
        wanted = [item.name for item in self.config.objectives]
        for name in wanted:
            if wanted.count(name) > 1:
                raise ConfigError(f"objectives: {name!r} stands twice")
        for item in self.config.objectives:
            costs = [f"cost.{name}" for name in COSTS]
            if item.name not in self.task_names and item.name not in costs:
                known = ", ".join([*self.task_names, *costs])
                raise ConfigError(f"objectives: no task produces {item.name!r}; known: {known}")
        return tuple(Objective(item.name, _direction(item)) for item in self.config.objectives)

    def objectives_json(self) -> list[Json]:
        """The objectives as the journal keeps them."""
        references = {item.name: item.reference for item in self.config.objectives}
        return [
            {"name": item.name, "direction": item.direction.value, "reference": references.get(item.name)}
            for item in self.objectives
        ]

    @cached_property
    def _lineage(self) -> Lineage | None:
        return None if self.crossings is None else self.crossings.lineage()

    def recipe(self, candidate: Candidate, entries: Mapping[str, Entry]) -> Recipe | None:
        """The recipe of a candidate; None for the synthetic evaluation. `entries` knows a crossover and its ancestors."""
        if self._lineage is not None:
            made = self._lineage.recipe_of(self._combination(self._lineage, candidate, entries), name=candidate.id)
        elif self.template is None:
            return None
        else:
            made = self.template.recipe(self.space.decode(candidate.point), name=candidate.id)
        return with_adapters(made, adapted_models(self.config))

    def factors(self, candidate: Candidate, entries: Mapping[str, Entry]) -> list[float] | None:
        """What the parents of a crossover are multiplied by, as the journal keeps it; None for other candidates."""
        if self._lineage is None:
            return None
        factors = self._combination(self._lineage, candidate, entries).factors
        return None if factors is None else factors.reshape(-1).tolist()

    @staticmethod
    def _combination(lineage: Lineage, candidate: Candidate, entries: Mapping[str, Entry]) -> Combination:
        return lineage.combination(
            candidate, lambda name: entries[name].candidate().genome, lambda name: entries[name].factors
        )

    def recipe_json(self, candidate: Candidate, entries: Mapping[str, Entry]) -> Mapping[str, Json] | None:
        """`recipe` as JSON."""
        recipe = self.recipe(candidate, entries)
        return None if recipe is None else recipe.to_json()

    def recipe_of_entry(self, entry: Entry, entries: Mapping[str, Entry]) -> Recipe | None:
        """The recipe of any candidate of a run, baselines included."""
        return Recipe.from_json(entry.recipe) if entry.recipe is not None else self.recipe(entry.candidate(), entries)

    def baselines(self) -> list[Baseline]:
        """The recipes that are evaluated first."""
        if self.template is None:
            return []
        wanted = self.config.baselines
        recipes = self.template.baselines(wanted.task_arithmetic)
        points = self.template.baseline_values(wanted.task_arithmetic)
        if self.crossings is not None:  # the archive starts with the seed models alone
            points = {name: values for name, values in points.items() if name.startswith("source:")}
        kept = {
            name: recipe
            for name, recipe in recipes.items()
            if (wanted.sources or not name.startswith("source:")) and (wanted.uniform or name != "uniform")
        } | dict(self.own)
        points |= self.own_values
        return [
            Baseline(
                name,
                with_adapters(recipe, adapted_models(self.config)).to_json(),
                tuple(self.space.encode(points[name]).tolist()) if name in points else None,
            )
            for name, recipe in kept.items()
        ]

    @cached_property
    def own_values(self) -> dict[str, dict[str, float]]:
        """For each of the user's own recipes that is a point of the space, its parameter values."""
        if not isinstance(self.template, RecipeTemplate) or self.crossings is not None:
            return {}
        values = {name: values_in_space(recipe, self.template, self.headers) for name, recipe in self.own.items()}
        return {name: found for name, found in values.items() if found is not None}

    def check_plans(self) -> int:
        """Plans the middle of the space and every baseline, so that what cannot be merged shows now; returns bytes of a candidate.

        Raises:
            EvomergeError: models that do not fit each other or the method.
        """
        if self.template is None:
            return 0
        if isinstance(self.template, StackTemplate):
            make_plan(self.template.widest(), self.headers)
        for baseline in self.baselines():
            if baseline.recipe is not None:
                make_plan(Recipe.from_json(baseline.recipe), self.headers)
        if self.crossings is not None:
            return self.crossings.plan().output_bytes
        middle = self.template.recipe(self.space.decode([0.5] * self.space.dimension))
        return make_plan(middle, self.headers).output_bytes


def _direction(item: ObjectiveConfig) -> Direction:
    """As configured; else scores are maximised, and costs minimised but for those of `HIGHER_IS_BETTER`."""
    if item.direction:
        return Direction(item.direction)
    cost = item.name.removeprefix("cost.")
    return Direction.MINIMIZE if cost != item.name and cost not in HIGHER_IS_BETTER else Direction.MAXIMIZE


def make_problem(config: SearchConfig, *, begun: bool = False) -> Problem:
    """The problem of a configuration.

    Args:
        config: the configuration.
        begun: of a run that goes on, whose budget may end before the first generation does.

    Raises:
        ConfigError: everything that is wrong with the models, the space, the tasks, the objectives and the strategy, together.
    """
    if isinstance(config.evaluation, SyntheticConfig):
        from evomerge.evaluation.synthetic import synthetic_task_names

        if crosses_models(config):
            raise ConfigError(
                "strategy m2n2 crosses models and the synthetic evaluation has none; set strategy.on: recipes"
            )
        return _checked(Problem(config, {}, None, synthetic_task_names(config.evaluation.function)), begun=begun)
    errors: list[str] = []
    headers: dict[str, ModelHeader] = {}
    names_of = model_settings(config)
    for key, place in model_table(config).items():
        try:
            headers |= read_models({key: place})
        except EvomergeError as error:
            errors.append(f"{names_of[key]}: {error}")
    errors += [] if begun else _experts_named_twice(config)
    names, wrong = checked_task_names(config, begun=begun)
    errors += wrong
    if errors:
        raise ConfigError(_listed(errors) + _needed(config))
    try:
        problem = _problem(config, headers, names)
        problem = replace(problem, own=own_recipes(config, headers, model_table(config), problem.max_slots))
    except EvomergeError as error:
        raise ConfigError(str(error)) from None
    return _checked(problem, begun=begun)


def problem_of_run(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> Problem:
    """The problem of a run that has been checked when it was started, from the headers of its models: plans and strategy are not tried again."""
    return (
        make_problem(config, begun=True)
        if isinstance(config.evaluation, SyntheticConfig)
        else _problem(config, headers, ())
    )


def model_table(config: SearchConfig) -> dict[str, tuple[str, str | None]]:
    """Every model of the configuration as recipes call it -> its folder and that of its adapter; the base first."""
    models = config.models
    if models is None:
        return {}
    listed = [*([models.base] if models.base else []), *models.experts.values()]
    return {model.key: (model.path, model.lora) for model in listed}


def sources_exist(config: SearchConfig) -> bool:
    """Whether the models and the task files of the configuration are where it says."""
    places = [folder for place in model_table(config).values() for folder in place if folder is not None]
    places += [item.task for item in config.tasks if is_task_file(item.task)]
    return all(Path(place).exists() for place in places)


def model_settings(config: SearchConfig) -> dict[str, str]:
    """Every model of the configuration as recipes call it -> the setting that names it."""
    models = config.models
    if models is None:
        return {}
    named = {model.key: f"models.experts.{name}" for name, model in models.experts.items()}
    return named | ({models.base.key: "models.base"} if models.base else {})


def _experts_named_twice(config: SearchConfig) -> list[str]:
    """A line for every expert that is the same model as one before it: the search would weigh one model by two parameters."""
    first: dict[str, str] = {}
    experts = config.models.experts if config.models else {}
    return [
        f"models.experts.{name}: is the same model as {first[model.key]}, {model.key}; leave one out"
        for name, model in experts.items()
        if first.setdefault(model.key, name) != name
    ]


def adapted_models(config: SearchConfig) -> dict[str, tuple[str, str]]:
    """The part of `model_table` that has adapters."""
    return {key: (model, lora) for key, (model, lora) in model_table(config).items() if lora is not None}


def _checked(problem: Problem, *, begun: bool) -> Problem:
    """The problem itself, after the checks that need it whole."""
    checks = (
        lambda: problem.objectives,
        problem.check_plans,
        lambda: strategy_for(problem),
        lambda: None if begun else check_population(problem),
        lambda: _check_tokenizer(problem),
        lambda: _check_chat_template(problem),
        lambda: _check_directions(problem),
    )
    errors = []
    for check in checks:
        try:
            check()
        except EvomergeError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError(_listed(list(dict.fromkeys(errors))))
    return problem


def _check_directions(problem: Problem) -> None:
    """Raises ConfigError where a score of which lower is better would be maximised, only because no direction is given."""
    if isinstance(problem.config.evaluation, SyntheticConfig):
        return
    chosen = {item.name for item in problem.config.objectives if item.direction is not None}
    optimised = {item.name for item in problem.objectives}
    for name, spec in zip(problem.task_names, task_specs(problem.config), strict=True):
        lower = lower_is_better(spec)
        if name in optimised - chosen and lower:
            raise ConfigError(
                f"objectives: of the metric of task {name!r} lower is better ({spec.task}: higher_is_better: false), and scores are maximised "
                f"unless told otherwise; list the objectives, this one as {{name: {name}, direction: minimize}}"
            )


def _check_tokenizer(problem: Problem) -> None:
    """Raises CheckpointError where the model that lends its tokenizer has none."""
    for header in list(problem.headers.values())[:1]:
        check_tokenizer(header.folder)


def _check_chat_template(problem: Problem) -> None:
    """Raises ConfigError where conversations are asked for and the model that lends its tokenizer has no form for them."""
    evaluation = problem.config.evaluation
    if isinstance(evaluation, SyntheticConfig) or not evaluation.apply_chat_template:
        return
    first = next(iter(problem.headers.values()))
    if chat_template_of(first) is None:
        raise ConfigError(
            f"evaluation.apply_chat_template: the tokenizer of {first.folder} has no chat template; put one there as {TEMPLATE_FILE}, "
            "or leave the option out"
        )


def _listed(errors: list[str]) -> str:
    return (
        errors[0] if len(errors) == 1 else f"{len(errors)} problems\n" + "\n".join(f"  - {error}" for error in errors)
    )


def _needed(config: SearchConfig) -> str:
    """What the configuration says about getting its models and tasks, if one of them is not there."""
    return f"\nwhat this configuration needs: {config.needs}" if config.needs and not sources_exist(config) else ""


def _problem(config: SearchConfig, headers: Mapping[str, ModelHeader], names: tuple[str, ...]) -> Problem:
    template = _template(config, headers)  # which checks the groups
    crossings = Crossings(config, headers) if crosses_models(config) else None
    return Problem(config, headers, template, names, crossings)


def _template(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> RecipeTemplate | StackTemplate:
    stacking = config.space.stacking
    if stacking is None:
        return _merge_template(config, headers)
    unused = config.space.merge_settings
    if unused and not stacking.parameters:
        raise ConfigError(
            f"space: {', '.join(unused)} would have no effect; set stacking.parameters: true to search the merge too"
        )
    if config.space.module_groups:
        raise ConfigError("space.module_groups: a stacked layer is taken or merged whole; leave it out")
    return stack_template(config, stacking, headers, _merge_template(config, headers) if stacking.parameters else None)


def _merge_template(config: SearchConfig, headers: Mapping[str, ModelHeader]) -> RecipeTemplate:
    space, spec, first = config.space, method_spec(config.space.method), next(iter(headers.values()))
    if crosses_models(config):
        return seed_template(config, first)
    groups = space.layer_groups
    layer_groups = even_layer_groups(first.n_layers, groups) if isinstance(groups, int) else list(groups)
    axes = tuple(
        axis for axis, used in zip(AXES, (True, len(layer_groups) > 1, bool(space.module_groups)), strict=True) if used
    )
    return RecipeTemplate(
        method=spec.name,
        base=config.base_key,
        experts=config.expert_keys,
        searched=_searched(space, spec, axes),
        fixed=space.fixed,
        n_layers=first.n_layers,
        layer_groups=layer_groups,
        module_groups=module_filters(
            space.module_groups, [name for header in headers.values() for name in header.tensors]
        ),
        # Named, so that mergekit too computes in float32 and rounds once; left out, it computes in the sources' dtype.
        out_dtype=space.out_dtype or first.dtype,
        seed=config.seed,
    )


def _searched(space: SpaceConfig, spec: MethodSpec, axes: Sequence[str]) -> list[SearchedParameter]:
    """What is searched: the configured parameters, else those that searches over the method usually vary and that are not fixed."""
    if space.parameters is None:
        usual = default_searched(spec, axes)
        if not usual:
            open_ones = ", ".join(item.name for item in spec.parameters if not isinstance(item.default, bool))
            raise ConfigError(
                f"space: {spec.name} has no parameter that searches usually vary; "
                + (f"give space.parameters (it has {open_ones}), or compare" if open_ones else "compare")
                + " with such a merge by baselines.recipes"
            )
        return [item for item in usual if item.name not in space.fixed]
    searched = []
    for name, wanted in space.parameters.items():
        row = spec.parameter(name)
        low = row.search_low if wanted.low is None else wanted.low
        high = row.search_high if wanted.high is None else wanted.high
        if low is None or high is None:
            raise ConfigError(f"space.parameters.{name}: give low and high; {spec.name} has no usual range for it")
        searched.append(SearchedParameter(name, low, high, wanted.per or allowed_axes(row, axes)))
    return searched
