"""A description of what a search would do, printed by `evomerge validate`."""

from evomerge.build.problem import Problem
from evomerge.build.strategies import chosen_strategy
from evomerge.core import cost_objective, weights_in_mean
from evomerge.evaluation.task_metrics import OTHER_SCALES, scored_metric
from evomerge.plan import make_plan, other_tokens
from evomerge.recipe import BaseRole, StackTemplate, method_spec
from evomerge.space import Parameter
from evomerge.strategy import strategy_class

_OF_DEPTH = tuple(map(cost_objective, ("layers", "active_parameters")))
"""costs that depend only on a model's depth"""

_MANY, _ENOUGH_EACH = 13, 6
"""From this many parameters on, at least this many candidates per parameter are advised: on the demo models, 4 each for 36 parameters found nothing
better than the baselines, 6 each for 24 did."""


def describe(problem: Problem) -> list[str]:
    """Describe what a search would do, in a few lines."""
    config, choice = problem.config, chosen_strategy(problem)
    why = "" if choice.name == config.strategy.name else f" ({config.strategy.name}: {choice.reason})"
    lines = [f"strategy    {choice.name}{why}, seed {config.seed}, budget {_budget(problem)}"]
    metrics = _metrics(problem)
    objectives = [
        f"{objective.name} ({' '.join(filter(None, [objective.direction.value, metrics.get(objective.name)]))}"
        f"{'' if objective.weight is None else f', weight {objective.weight:g}'})"
        for objective in problem.objectives
    ]
    lines.append(f"objectives  {', '.join(objectives)}")
    for name, spec in problem.tasks.items():
        if spec.members:
            count, weights = len(spec.members), "by size" if spec.weight_by_size else "each the same"
            lines.append(f"group       {name}: mean of {count} task{'s' if count > 1 else ''}, {weights}")
    lines += _describe_space(problem)
    if problem.template is not None:
        header, megabytes = next(iter(problem.headers.values())), problem.candidate_bytes / 1e6
        lines.append(
            f"models      {len(problem.headers)} x {header.architecture}, {header.n_layers} layers, "
            f"{megabytes:{',.1f' if megabytes >= 1 else '.2g'}} MB per candidate"
        )
        lines.append(f"baselines   {', '.join(baseline.id for baseline in problem.baselines())}")
        lines += [
            f"note        {name} is outside the search space: the search is compared with it but does not start from it"
            for name in problem.own
            if name not in problem.own_values and problem.crossings is None
        ]
    return lines + [f"note        {note}" for note in notes(problem)]


def _metrics(problem: Problem) -> dict[str, str]:
    """Name of a score -> its metric, as far as this is known without loading its task."""
    return {name: scored_metric(spec) for name, spec in problem.tasks.items()}


def _budget(problem: Problem) -> str:
    limits = problem.config.budget.model_dump(exclude_none=True)
    return " or ".join(
        f"{limit:g} {name}" if name == "hours" else f"{limit:,} {name}" for name, limit in limits.items()
    )


def notes(problem: Problem) -> list[str]:
    """Notes for the user on settings that are valid but probably not intended."""
    return _on_models(problem) + _on_budget(problem) + _on_objectives(problem) + _on_scales(problem)


def _on_models(problem: Problem) -> list[str]:
    """Notes on models with different token ids, and on an expert that is the base itself and so has no effect."""
    if problem.template is None:
        return []
    config, (*_, typical) = problem.config, problem.template.samples()
    differing = other_tokens(problem.headers, make_plan(typical, problem.headers))
    found = [] if differing is None else [f"{differing}; `evomerge align` gives the models one vocabulary"]
    weighs_differences = problem.crossings is None and all(
        method_spec(name).base is BaseRole.REQUIRED for name in config.space.methods
    )
    for name, key in config.expert_keys.items():
        if weighs_differences and key == config.base_key:
            found.append(
                f"models.experts.{name}: is the base itself, so its parameters have no effect, and it is scored twice; leave it out"
            )
    return found


def _on_objectives(problem: Problem) -> list[str]:
    """Notes on costs that are the same for all candidates, and on costs with no weight in the mean that the strategy optimises."""
    constant = [objective.name for objective in problem.objectives if objective.name in _OF_DEPTH]
    found = []
    if constant and problem.template is not None and not isinstance(problem.template, StackTemplate):
        found.append(
            f"objectives: {', '.join(constant)} {'is' if len(constant) == 1 else 'are'} the same for every candidate unless layers are stacked (space.stacking)"
        )
    return found + _on_ignored_costs(problem)


def _on_ignored_costs(problem: Problem) -> list[str]:
    name = chosen_strategy(problem).name
    weights = weights_in_mean(problem.objectives)
    weighted = zip(problem.objectives, weights, strict=True)
    costs = [objective.name for objective, weight in weighted if objective.is_cost and not weight]
    if not costs or not getattr(strategy_class(name), "averages", False):
        return []
    return [
        f"objectives: {name} optimises the mean, in which {', '.join(costs)} has weight 0; give it a weight, or use a strategy "
        "that searches for trade-offs (nsga2, map)"
    ]


def _on_scales(problem: Problem) -> list[str]:
    """A note on scores on different scales whose mean picks the best candidate."""
    metrics = {name: metric.partition(",")[0] for name, metric in _metrics(problem).items()}
    scores = [objective for objective in problem.objectives if not objective.is_cost]
    others = [score.name for score in scores if score.weight is None and metrics.get(score.name) in OTHER_SCALES]
    if not others or len({metrics.get(score.name) for score in scores}) == 1:
        return []
    return [
        f"objectives: {', '.join(f'{name} ({metrics[name]})' for name in others)} may outweigh scores from 0 to 1 in the mean, which picks the "
        "best candidate; give it a weight, e.g. 0.01 for BLEU"
    ]


def _on_budget(problem: Problem) -> list[str]:
    """A note on a budget that leaves no candidates for the search, or too few for the number of parameters."""
    wanted, count, dimension = problem.config.budget.evaluations, len(problem.baselines()), problem.space.dimension
    if wanted is None:
        return []
    if wanted <= count:
        return [
            f"budget.evaluations: {wanted} is used up by the {count} baselines, which are always evaluated, so nothing is left for the search; "
            "raise it, or set baselines: {sources: false, uniform: false, task_arithmetic: []}"
        ]
    space = problem.config.space
    grouped = space.layer_groups != 1 or space.module_groups
    if not grouped or dimension < _MANY or wanted - count >= _ENOUGH_EACH * dimension:
        return []
    return [
        f"budget.evaluations: {wanted - count} candidates are few for {dimension} parameters; use fewer space.layer_groups or "
        f"space.module_groups, or a budget of at least {count + _ENOUGH_EACH * dimension}"
    ]


def _describe_space(problem: Problem) -> list[str]:
    if problem.crossings is not None:
        layout, wanted = problem.crossings.layout, problem.config.space.crossover
        return [
            f"space       crossovers of {len(problem.crossings.seeds)} models: {layout.n_weights:,} weights in "
            f"{len(layout.chromosomes)} chromosome(s), split at any {wanted.split}, {wanted.angle} angle"
        ]
    space = problem.space
    shown = space.parameters[:6]
    lines = [f"space       {space.dimension} parameter{'s' if space.dimension > 1 else ''}"]
    lines += [f"            {parameter.name} in {_values(parameter)}" for parameter in shown]
    if len(shown) < space.dimension:
        lines.append(f"            ... {space.dimension - len(shown)} more")
    return lines


def _values(parameter: Parameter) -> str:
    """The bounds of a parameter, or the first six choices of a categorical one."""
    if not parameter.choices:
        return f"[{parameter.low:g}, {parameter.high:g}]"
    more = ", ..." if len(parameter.choices) > 6 else ""
    return f"{{{', '.join(parameter.choices[:6])}{more}}}"
