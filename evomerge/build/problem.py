"""config -> the search problem: models, space, objectives, baselines, recipes. Reads model headers, never weights."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

from evomerge.build.coordinate_uses import values_in_space
from evomerge.build.crossings import Crossings, crosses_models
from evomerge.build.engines import check_engine_options, check_length, gpus_per_worker
from evomerge.build.fingerprints import source_marks
from evomerge.build.own_recipes import own_recipes
from evomerge.build.sources import (
    adapted_models,
    check_prompts,
    experts_named_twice,
    listed_models,
    model_table,
    sources_exist,
)
from evomerge.build.strategies import check_nested, check_options, check_population, strategy_for
from evomerge.build.tasks import checked_tasks
from evomerge.build.templates import check_bounds, recipe_template
from evomerge.config import ObjectiveConfig, SearchConfig, SyntheticConfig
from evomerge.core import (
    UNIFORM,
    Candidate,
    ConfigError,
    CrossoverGenome,
    Direction,
    EvomergeError,
    Json,
    Objective,
    SpaceError,
    cost_key,
    cost_objective,
    model_of_baseline,
)
from evomerge.evaluation import TaskSpec
from evomerge.evaluation.costs import COSTS, HIGHER_IS_BETTER
from evomerge.evaluation.task_metrics import lower_is_better
from evomerge.plan import ModelHeader, check_compatible, make_plan, read_models
from evomerge.recipe import (
    Combination,
    Lineage,
    MethodsTemplate,
    Recipe,
    RecipeTemplate,
    StackTemplate,
    with_adapters,
)
from evomerge.search import Baseline, Entry
from evomerge.space import Parameter, SearchSpace


@dataclass(frozen=True)
class Problem:
    """A search problem.

    Attributes:
        config: the configuration that it was made from.
        headers: model name in recipes -> header, the base first; empty for the synthetic evaluation.
        template: makes recipes from points; None for the synthetic evaluation.
        tasks: name of every score that evaluations will have -> its task; empty for the synthetic evaluation.
        crossings: seed models and chromosomes of crossovers; None if the strategy proposes points.
        own: the user's own recipes among the baselines, by name.
    """

    config: SearchConfig
    headers: Mapping[str, ModelHeader]
    template: RecipeTemplate | MethodsTemplate | StackTemplate | None
    tasks: Mapping[str, TaskSpec]
    crossings: Crossings | None = None
    own: Mapping[str, Recipe] = field(default_factory=dict)

    @property
    def task_names(self) -> tuple[str, ...]:
        """The names of the scores that evaluations will have."""
        if not isinstance(self.config.evaluation, SyntheticConfig):
            return tuple(self.tasks)
        from evomerge.evaluation.synthetic import synthetic_task_names

        return synthetic_task_names(self.config.evaluation.function)

    @property
    def _costs(self) -> Collection[str]:
        """The names of the costs that evaluations will have."""
        if not isinstance(self.config.evaluation, SyntheticConfig):
            return COSTS
        from evomerge.evaluation.synthetic import SYNTHETIC_COSTS

        return SYNTHETIC_COSTS

    @property
    def max_slots(self) -> int | None:
        """Number of layers that the engine must have room for; None if all candidates have as many as the first model."""
        return self.template.max_slots if isinstance(self.template, StackTemplate) else None

    @cached_property
    def space(self) -> SearchSpace:
        """The search space."""
        if self.template is not None:
            return self.template.space
        synthetic = cast(SyntheticConfig, self.config.evaluation)  # the only one without models
        return SearchSpace([Parameter(f"x{index}", 0.0, 1.0) for index in range(synthetic.dimension)])

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        """What is optimised: the configured objectives, or by default every task.

        Raises:
            ConfigError: an objective is not produced by any task or appears twice, or all weights are 0.
        """
        if not self.config.objectives:
            return tuple(Objective(name) for name in self.task_names)
        wanted = [objective.name for objective in self.config.objectives]
        for name in wanted:
            if wanted.count(name) > 1:
                raise ConfigError(f"objectives: {name!r} appears twice")
        if all(objective.weight == 0.0 for objective in self.config.objectives):
            raise ConfigError("objectives: every weight is 0; at least one must be positive")
        known = [*self.task_names, *map(cost_objective, self._costs)]
        for name in wanted:
            if name not in known:
                raise ConfigError(f"objectives: no task produces {name!r}; known: {', '.join(known)}")
        return tuple(
            Objective(objective.name, _direction(objective), objective.weight, objective.reference)
            for objective in self.config.objectives
        )

    @cached_property
    def _lineage(self) -> Lineage | None:
        return None if self.crossings is None else self.crossings.lineage()

    def recipe(self, candidate: Candidate, entries: Mapping[str, Entry]) -> Recipe | None:
        """The recipe of a candidate; None for the synthetic evaluation. `entries` must contain a crossover and its ancestors."""
        if self._lineage is not None:
            made = self._lineage.recipe_of(self._combination(self._lineage, candidate, entries), name=candidate.id)
        elif self.template is None:
            return None
        else:
            made = self.template.recipe(self.space.decode(candidate.point), name=candidate.id)
        return with_adapters(made, adapted_models(self.config))

    def check(self, candidate: Candidate, entries: Mapping[str, Entry]) -> None:
        """Check that a candidate is valid.

        Raises:
            SpaceError: its coordinates are not a point of the space, or a parent is unknown.
        """
        if isinstance(candidate.genome, CrossoverGenome):
            unknown = [name for name in candidate.genome.parents if name not in entries]
            if unknown:
                raise SpaceError(f"unknown parents: {', '.join(unknown)}")
        else:
            self.space.decode(candidate.point)

    def factors(self, candidate: Candidate, entries: Mapping[str, Entry]) -> list[float] | None:
        """The factors of a crossover's parents, as stored in the journal; None for other candidates."""
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
        """The recipes that are evaluated before the search."""
        if self.template is None:
            return []
        points = self.template.baseline_values(self.config.baselines.task_arithmetic)
        if self.crossings is not None:  # the archive starts with the seed models alone
            points = {name: values for name, values in points.items() if model_of_baseline(name)}
        points |= self.own_values
        return [
            Baseline(
                name, recipe.to_json(), tuple(self.space.encode(points[name]).tolist()) if name in points else None
            )
            for name, recipe in self._baseline_recipes().items()
        ]

    def _baseline_recipes(self) -> dict[str, Recipe]:
        wanted, adapted = self.config.baselines, adapted_models(self.config)
        recipes = {} if self.template is None else self.template.baselines(wanted.task_arithmetic)
        kept = {
            name: recipe
            for name, recipe in recipes.items()
            if (wanted.sources or not model_of_baseline(name)) and (wanted.uniform or name != UNIFORM)
        }
        return {name: with_adapters(recipe, adapted) for name, recipe in {**kept, **self.own}.items()}

    @cached_property
    def own_values(self) -> dict[str, dict[str, float]]:
        """The parameter values of each of the user's own recipes that lies in the space."""
        if self.template is None or self.crossings is not None:
            return {}
        values = {name: values_in_space(recipe, self.template, self.headers) for name, recipe in self.own.items()}
        return {name: found for name, found in values.items() if found is not None}

    @cached_property
    def marks(self) -> dict[str, dict[str, str]]:
        """`source_marks` of the models and tasks."""
        return source_marks(self.config, self.headers)

    @cached_property
    def candidate_bytes(self) -> int:
        """Size of a candidate's weights. Plans samples of the space and every baseline, to find merges that would fail before the search starts.

        Raises:
            EvomergeError: the models are incompatible with each other or with the method.
        """
        if self.template is None:
            return 0
        if isinstance(self.template, StackTemplate):
            # layers of any model may come last, and engines have one vocabulary
            first, *others = next(self.template.samples()).models()
            check_compatible(self.headers[first], {key: self.headers[key] for key in others}, any_depth=True)
        for recipe in self._baseline_recipes().values():
            make_plan(recipe, self.headers)
        if self.crossings is not None:
            return self.crossings.plan().output_bytes
        *_, last = [make_plan(recipe, self.headers).output_bytes for recipe in self.template.samples()]
        return last


def _direction(objective: ObjectiveConfig) -> Direction:
    """The configured direction; by default scores are maximised, and costs minimised except those in `HIGHER_IS_BETTER`."""
    if objective.direction:
        return Direction(objective.direction)
    cost = cost_key(objective.name)
    return Direction.MAXIMIZE if cost is None or cost in HIGHER_IS_BETTER else Direction.MINIMIZE


def make_problem(config: SearchConfig, *, begun: bool = False, coordinates: Collection[str] = ()) -> Problem:
    """Make the problem of a configuration.

    Args:
        config: the configuration.
        begun: the run has already been started; skips checks that only matter for a new search.
        coordinates: names of the parameters in the space of such a run.

    Raises:
        ConfigError: the models, space, tasks, objectives or strategy are invalid; the message lists all problems.
    """
    if isinstance(config.evaluation, SyntheticConfig):
        if crosses_models(config):
            raise ConfigError(
                "strategy m2n2 crosses models, but the synthetic evaluation has none; set strategy.on: recipes"
            )
        return _checked(Problem(config, {}, None, {}), begun=begun)
    errors: list[str] = []
    headers: dict[str, ModelHeader] = {}
    for setting, model in listed_models(config).items():
        try:
            headers |= read_models({model.key: (model.path, model.lora)})
        except EvomergeError as error:
            errors.append(f"{setting}: {error}")
    if not begun:
        errors += experts_named_twice(config)
        errors += _errors_of(lambda: check_engine_options(config))
    tasks, wrong = checked_tasks(config, begun=begun)
    errors += wrong
    if errors:
        if len(headers) == len(listed_models(config)):  # checks that do not depend on tasks
            errors += _errors_of(lambda: recipe_template(config, headers, coordinates), lambda: check_options(config))
        raise ConfigError(_listed(errors) + _needed(config))
    try:
        problem = _problem(config, headers, tasks, coordinates)
        problem = replace(problem, own=own_recipes(config, headers, model_table(config), problem.max_slots))
    except EvomergeError as error:
        raise ConfigError(_listed([str(error), *_errors_of(lambda: check_options(config))])) from None
    return _checked(problem, begun=begun)


def problem_of_run(config: SearchConfig, headers: Mapping[str, ModelHeader], coordinates: Collection[str]) -> Problem:
    """Make the problem of an existing run from the headers of its models, without the checks that were made when it was started.

    `coordinates` are the names of the parameters of its space.
    """
    return (
        make_problem(config, begun=True)
        if isinstance(config.evaluation, SyntheticConfig)
        else _problem(config, headers, {}, coordinates)
    )


def _checked(problem: Problem, *, begun: bool) -> Problem:
    """Run the checks that need the complete problem, and return it."""
    errors = _errors_of(
        lambda: problem.objectives,
        lambda: problem.candidate_bytes,
        lambda: strategy_for(problem),
        lambda: None if begun else check_population(problem),
        lambda: None if begun else check_nested(problem),
        lambda: None if begun else check_bounds(problem.template),
        lambda: _check_first_model(problem),
        lambda: _check_directions(problem),
        lambda: None if begun else gpus_per_worker(problem.config),
        lambda: (
            None if begun or not problem.headers else check_length(problem.config, next(iter(problem.headers.values())))
        ),
    )
    if errors:
        raise ConfigError(_listed(list(dict.fromkeys(errors))))
    return problem


def _errors_of(*checks: Callable[[], object]) -> list[str]:
    """The messages of the errors that the checks raise."""
    errors = []
    for check in checks:
        try:
            check()
        except EvomergeError as error:
            errors.append(str(error))
    return errors


def _check_directions(problem: Problem) -> None:
    """Raise ConfigError if a score that is better when lower would be maximised just because no direction is given."""
    chosen = {objective.name for objective in problem.config.objectives if objective.direction is not None}
    optimised = {objective.name for objective in problem.objectives}
    for name, spec in problem.tasks.items():
        if lower_is_better(spec) and name in optimised - chosen:
            raise ConfigError(
                f"objectives: lower is better for task {name!r} ({spec.task}: higher_is_better: false), but tasks are maximised by "
                f"default; list the objectives, and this one as {{name: {name}, direction: minimize}}"
            )


def _check_first_model(problem: Problem) -> None:
    if not isinstance(problem.config.evaluation, SyntheticConfig):
        check_prompts(problem.config.evaluation, next(iter(problem.headers.values())))


def _listed(errors: list[str]) -> str:
    return (
        errors[0] if len(errors) == 1 else f"{len(errors)} problems\n" + "\n".join(f"  - {error}" for error in errors)
    )


def _needed(config: SearchConfig) -> str:
    """The configuration's note on how to get its models and tasks, if one of them is missing."""
    return f"\nwhat this configuration needs: {config.needs}" if config.needs and not sources_exist(config) else ""


def _problem(
    config: SearchConfig,
    headers: Mapping[str, ModelHeader],
    tasks: Mapping[str, TaskSpec],
    coordinates: Collection[str],
) -> Problem:
    template = recipe_template(config, headers, coordinates)  # first, since it checks the groups
    crossings = Crossings(config, headers) if crosses_models(config) else None
    return Problem(config, headers, template, tasks, crossings)
