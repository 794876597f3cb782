"""Recipes: what determines a merged model, and their file formats."""

from evomerge.recipe.methods import METHODS, BaseRole, MethodSpec, ParameterSpec, Scope, method_spec
from evomerge.recipe.recipe import Parameters, Recipe, Setting, Slice, Source

__all__ = [
    "METHODS",
    "BaseRole",
    "MethodSpec",
    "ParameterSpec",
    "Parameters",
    "Recipe",
    "Scope",
    "Setting",
    "Slice",
    "Source",
    "method_spec",
]
