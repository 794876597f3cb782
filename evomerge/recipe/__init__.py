"""Recipes: what determines a merged model, and their file formats."""

from evomerge.recipe.files import read_recipe, recipe_from_yaml, recipe_to_yaml, write_recipe
from evomerge.recipe.methods import METHODS, BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.parts import Parameters, ParameterValue, Setting, Slice, Source
from evomerge.recipe.recipe import DTYPES, Recipe
from evomerge.recipe.template import (
    AXES,
    MODULE_GROUPS,
    RecipeTemplate,
    SearchedParameter,
    allowed_axes,
    default_searched,
    even_layer_groups,
)
from evomerge.recipe.validation import check_recipe, check_setting

__all__ = [
    "AXES",
    "DTYPES",
    "METHODS",
    "MODULE_GROUPS",
    "BaseRole",
    "MethodSpec",
    "ParameterSpec",
    "ParameterValue",
    "Parameters",
    "Recipe",
    "RecipeTemplate",
    "Scope",
    "SearchedParameter",
    "Setting",
    "Slice",
    "Source",
    "allowed_axes",
    "check_recipe",
    "check_setting",
    "default_searched",
    "even_layer_groups",
    "method_spec",
    "read_recipe",
    "recipe_from_yaml",
    "recipe_to_yaml",
    "write_recipe",
]
