"""Recipes, which determine a merged model, and their file formats."""

from evomerge.recipe.coordinates import AXES, SearchedParameter
from evomerge.recipe.documents import RecipeFile, naming, with_adapters, with_folders
from evomerge.recipe.files import (
    read_recipe,
    read_recipe_file,
    recipe_file_from_yaml,
    recipe_to_yaml,
    write_recipe,
)
from evomerge.recipe.lineage import Angle, Combination, Lineage, SeedProducts, SplitAt, WeightLayout, slerp_factors
from evomerge.recipe.mergekit_fields import model_reference
from evomerge.recipe.mergekit_writer import mergekit_remark
from evomerge.recipe.methods import (
    METHODS,
    PIECEWISE,
    BaseRole,
    MethodSpec,
    ParameterSpec,
    Scope,
    method_spec,
)
from evomerge.recipe.methods_template import METHOD, MethodsTemplate
from evomerge.recipe.module_groups import REST, group_of, module_filters
from evomerge.recipe.parts import Parameters, Setting, Slice, Source
from evomerge.recipe.pieces import PieceTable, Span
from evomerge.recipe.recipe import DTYPES, Recipe
from evomerge.recipe.scale_range import scale_bounds
from evomerge.recipe.stack_paths import Categorical, Indicator, Moves, PathEncoding, StackFrame, Swap
from evomerge.recipe.stack_template import MERGED, StackedModels, StackTemplate
from evomerge.recipe.stacking import Folding, StackLayer, stack_recipe
from evomerge.recipe.template import (
    SAMPLE_SHARE,
    RecipeTemplate,
    allowed_axes,
    default_searched,
    default_switches,
    even_layer_groups,
)
from evomerge.recipe.tokenizer_spec import TokenizerSpec, TokenRule
from evomerge.recipe.validation import check_recipe

__all__ = [
    "AXES",
    "DTYPES",
    "MERGED",
    "METHOD",
    "METHODS",
    "PIECEWISE",
    "REST",
    "SAMPLE_SHARE",
    "Angle",
    "BaseRole",
    "Categorical",
    "Combination",
    "Folding",
    "Indicator",
    "Lineage",
    "MethodSpec",
    "MethodsTemplate",
    "Moves",
    "ParameterSpec",
    "Parameters",
    "PathEncoding",
    "PieceTable",
    "Recipe",
    "RecipeFile",
    "RecipeTemplate",
    "Scope",
    "SearchedParameter",
    "SeedProducts",
    "Setting",
    "Slice",
    "Source",
    "Span",
    "SplitAt",
    "StackFrame",
    "StackLayer",
    "StackTemplate",
    "StackedModels",
    "Swap",
    "TokenRule",
    "TokenizerSpec",
    "WeightLayout",
    "allowed_axes",
    "check_recipe",
    "default_searched",
    "default_switches",
    "even_layer_groups",
    "group_of",
    "mergekit_remark",
    "method_spec",
    "model_reference",
    "module_filters",
    "naming",
    "read_recipe",
    "read_recipe_file",
    "recipe_file_from_yaml",
    "recipe_to_yaml",
    "scale_bounds",
    "slerp_factors",
    "stack_recipe",
    "with_adapters",
    "with_folders",
    "write_recipe",
]
