"""`MergedModel`: what was merged, for those who write what stands beside its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.plan import MergePlan, ModelHeader
from evomerge.recipe import Recipe, RecipeFile
from evomerge.weights.checkpoint.vocabulary import Alignment

RECIPE_FILE = "recipe.yaml"
"""the complete recipe, beside the weights"""


@dataclass(frozen=True, eq=False)
class MergedModel:
    """What was merged.

    Attributes:
        file: what its recipe file and card say.
        recipe: the merge itself, with models that are folders.
        plan, headers: of the merge.
        alignment: the vocabulary; None = the base's.
        warning: of models that are no relatives of the others.
        chat_template: Jinja text; None = the tokenizer's own.
        with_code: whether Python files that the model names are copied too.
    """

    file: RecipeFile
    recipe: Recipe
    plan: MergePlan
    headers: Mapping[str, ModelHeader]
    alignment: Alignment | None
    warning: str | None
    chat_template: str | None = None
    with_code: bool = False

    @property
    def owner(self) -> ModelHeader:
        """The model that lends config and generation settings."""
        return self.headers[self.recipe.models()[0]]
