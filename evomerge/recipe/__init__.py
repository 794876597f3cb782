"""Recipes: what determines a merged model, and their file formats."""

from evomerge.recipe.methods import METHODS, BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.recipe import Parameters, Recipe, Setting, Slice, Source
from evomerge.recipe.template import (
    AXES,
    MODULE_GROUPS,
    RecipeTemplate,
    SearchedParameter,
    allowed_axes,
    default_searched,
    even_layer_groups,
)

__all__ = [
    "AXES",
    "METHODS",
    "MODULE_GROUPS",
    "BaseRole",
    "MethodSpec",
    "ParameterSpec",
    "Parameters",
    "Recipe",
    "RecipeTemplate",
    "Scope",
    "SearchedParameter",
    "Setting",
    "Slice",
    "Source",
    "allowed_axes",
    "default_searched",
    "even_layer_groups",
    "method_spec",
]
