"""`MethodsTemplate`: a merge whose method is searched too.

Parameters that several methods search between the same bounds share a coordinate, so that what is learnt about one method's weights
carries over to the others: with three experts, four task-vector methods need seven coordinates instead of 22.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from evomerge.core import SpaceError
from evomerge.recipe.recipe import Recipe
from evomerge.recipe.template import RecipeTemplate
from evomerge.space import Parameter, SearchSpace

METHOD = "method"
"""name of the coordinate that chooses the method; parameters used by a single method may be called METHOD.PARAMETER"""


class MethodsTemplate:
    """A choice among templates for the same models with different methods.

    Args:
        templates: one per method, at least two.

    Attributes:
        methods: these templates.

    Raises:
        SpaceError: a method is listed twice.
    """

    def __init__(self, templates: Sequence[RecipeTemplate]) -> None:
        self.methods = tuple(templates)
        names = [template.method for template in templates]
        if len(set(names)) < len(names):
            raise SpaceError(f"method: {', '.join(names)}: a method appears twice; list each once")
        parameters: dict[str, Parameter] = {}
        shared: dict[tuple[str, float, float], str] = {}
        for template in templates:
            for parameter in template.parameters:
                key = (parameter.name, parameter.low, parameter.high)
                if key not in shared:
                    prefix = f"{template.method}." if parameter.name in parameters else ""
                    shared[key] = name = prefix + parameter.name
                    parameters[name] = replace(parameter, name=name, family=prefix + parameter.family)
        self._names = [
            {item.name: shared[item.name, item.low, item.high] for item in template.parameters}
            for template in templates
        ]
        """for each template: its coordinate -> the coordinate's name here"""
        users = {
            name: tuple(number for number, own in enumerate(self._names) if name in own.values()) for name in parameters
        }
        chosen = Parameter.categorical(METHOD, names)
        self.space = SearchSpace(
            [
                chosen,
                *(
                    item if len(users[item.name]) == len(names) else replace(item, used_with=(METHOD, users[item.name]))
                    for item in parameters.values()
                ),
            ]
        )

    def recipe(self, values: Mapping[str, float], name: str | None = None) -> Recipe:
        """The recipe of decoded parameter values (`space.decode`)."""
        chosen = int(values[METHOD])
        own = {coordinate: values[shared] for coordinate, shared in self._names[chosen].items()}
        return self.methods[chosen].recipe(own, name)

    def samples(self) -> Iterator[Recipe]:
        """A recipe for every method, to check beforehand whether the models fit it."""
        for template in self.methods:
            yield from template.samples()

    def baselines(self, task_arithmetic_weights: Sequence[float]) -> dict[str, Recipe]:
        """See `RecipeTemplate.baselines`; those of all methods."""
        every = [template.baselines(task_arithmetic_weights) for template in self.methods]
        return {name: recipe for recipes in every for name, recipe in recipes.items()}

    def baseline_values(self, task_arithmetic_weights: Sequence[float]) -> dict[str, dict[str, float]]:
        """For each baseline that is a point of this space, its parameter values, with the first method that gives it."""
        points: dict[str, dict[str, float]] = {}
        for template in self.methods:
            for name, own in template.baseline_values(task_arithmetic_weights).items():
                points.setdefault(name, self.point_of(template, own))
        return points

    def point_of(self, template: RecipeTemplate, own: Mapping[str, float]) -> dict[str, float]:
        """The values in this space of a point of one template; coordinates that only other templates have are in the middle."""
        chosen = self.methods.index(template)
        middle = self.space.decode([0.5] * self.space.dimension)
        return middle | {METHOD: float(chosen)} | {self._names[chosen][name]: value for name, value in own.items()}
