"""`MergedModel`: description of a merge, for writing the files that accompany its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from evomerge.plan import MergePlan, ModelHeader
from evomerge.recipe import Recipe, RecipeFile
from evomerge.weights.checkpoint.vocabulary import Alignment

RECIPE_FILE = "recipe.yaml"
"""the complete recipe, next to the weights"""


@dataclass(frozen=True, eq=False)
class MergedModel:
    """A merge.

    Attributes:
        file: the recipes for its recipe file and model card.
        recipe: the merge itself, whose models are folders.
        plan, headers: of the merge.
        alignment: the vocabulary; None = the base's.
        warning: about models that are unrelated to the others; None if there are none.
        chat_template: Jinja text; None = the tokenizer's own.
        with_code: whether to copy Python files that the model refers to.
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
        """The model whose config and generation settings are used."""
        return self.headers[self.recipe.models()[0]]
