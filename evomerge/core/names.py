"""Names with a prefix that says what they mean: objectives that are costs (`cost.items`), and kinds of baselines (`source:math`)."""

UNIFORM = "uniform"
"""id of the baseline that is the mean of the experts"""

_COST = "cost."
_SOURCE, _OWN_RECIPE, _TASK_ARITHMETIC = "source:", "recipe:", "task_arithmetic:"


def cost_objective(key: str) -> str:
    """The name of the objective that is the cost `key` of an evaluation."""
    return _COST + key


def cost_key(objective: str) -> str | None:
    """The cost that an objective stands for; None if it is a task's score."""
    return objective.removeprefix(_COST) if objective.startswith(_COST) else None


def source_baseline(model: str) -> str:
    """The id of the baseline that is one of the models by itself: an expert's name, or `base`."""
    return _SOURCE + model


def model_of_baseline(baseline: str) -> str | None:
    """The model that a baseline consists of; None if it is a merge."""
    return baseline.removeprefix(_SOURCE) if baseline.startswith(_SOURCE) else None


def weighted_baseline(method: str, weight: float) -> str:
    """The id of the baseline that gives every expert the same weight in a merge by `method`."""
    return f"{method}:{weight:g}"


def is_task_arithmetic(baseline: str) -> bool:
    """Whether a baseline is task arithmetic with one weight for all experts."""
    return baseline.startswith(_TASK_ARITHMETIC)


def own_recipe_baseline(name: str) -> str:
    """The id of the baseline that is the user's own recipe in the file called `name`."""
    return _OWN_RECIPE + name
