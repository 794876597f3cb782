"""`make_plan`: turns a recipe and its models' headers into the list of steps to compute. Runs once per candidate, in milliseconds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from evomerge.core import RecipeError
from evomerge.plan.merge_plan import COPY_METHOD, MergePlan, Scalars, TensorInput, TensorStep
from evomerge.plan.model_header import ModelHeader
from evomerge.plan.piecewise import check_tensors, piecewise_step
from evomerge.plan.structure import OutputTensor, SourceLayers, StructureKey, build_structure
from evomerge.recipe import (
    BaseRole,
    MethodSpec,
    Parameters,
    ParameterSpec,
    Recipe,
    Scope,
    Setting,
    Slice,
    Source,
    check_recipe,
    method_spec,
)

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""dtype of merged weights -> bytes per element"""

_NOTHING: Scalars = {}

_Inputs = list[tuple[int, str, Scalars]]
"""(position in the slice, key, parameters) of each input"""


def make_plan(recipe: Recipe, headers: Mapping[str, ModelHeader]) -> MergePlan:
    """The steps for every tensor of the merged model.

    Parameters are resolved as in mergekit: source before slice before global; within a level, the first setting whose filter is
    part of the tensor's name applies (the input's name for parameters of a source, the output's for global ones). Gradients are
    interpolated over the slice's layers, and tensors outside the layers are at depth 0 of the first or last slice.

    Args:
        recipe: the merge.
        headers: model key -> header, for every model in the recipe (`Recipe.models`).

    Raises:
        RecipeError: a header or parameter is missing, a parameter is out of range, or the models do not fit each other.
        CheckpointError: a model lacks a tensor or has an unexpected one.
    """
    check_recipe(recipe)
    spec = method_spec(recipe.method)
    slices = slices_with_inputs(recipe)
    structure = build_structure(_structure_key(recipe, spec, slices, headers))
    dtype = recipe.out_dtype or recipe.dtype or default_dtype(headers[recipe.models()[0]])
    if recipe.pieces is not None:
        check_tensors(recipe.pieces, [output.name for output in structure.outputs if output.is_float])
    steps = _Steps(recipe, spec, slices)
    return MergePlan(
        steps=tuple([steps.of(output) for output in structure.outputs]),
        n_layers=structure.n_layers,
        output_bytes=sum(output.n_bytes or output.n_elements * DTYPE_BYTES[dtype] for output in structure.outputs),
        dtype=dtype,
        math_dtype=recipe.dtype or "float32",
        seed=recipe.seed,
    )


def default_dtype(header: ModelHeader) -> str:
    """The default dtype of merges of a model: its own, or float32 if that is wider."""
    return header.dtype if header.dtype in DTYPE_BYTES else "float32"


def slices_with_inputs(recipe: Recipe) -> tuple[Slice, ...]:
    """The recipe's slices, with the base appended as an input of a whole-model `linear` or `karcher`, as in mergekit."""
    base, spec = recipe.base, method_spec(recipe.method)
    if spec.base is not BaseRole.SOURCE or base is None:
        return recipe.slices
    return tuple(
        replace(part, sources=(*part.sources, Source(base)))
        if spec.appends_base(part, recipe.parameters) and all(source.key != base for source in part.sources)
        else part
        for part in recipe.slices
    )


def _structure_key(
    recipe: Recipe, spec: MethodSpec, slices: Sequence[Slice], headers: Mapping[str, ModelHeader]
) -> StructureKey:
    models = recipe.models()
    missing = [key for key in models if key not in headers]
    if missing:
        raise RecipeError(f"no model header for {', '.join(missing)}; headers given: {', '.join(headers) or 'none'}")
    return StructureKey(
        tuple(tuple(SourceLayers(source.key, source.layer_range) for source in part.sources) for part in slices),
        tuple(part.module for part in slices),
        tuple(None if spec.base is BaseRole.SOURCE else recipe.base_of(part) for part in slices),
        models[0],
        recipe.filters(),
        tuple((key, headers[key]) for key in models),
    )


class _Steps:
    """The steps of one recipe. The tensors of a group share their parameters, which are looked up once."""

    def __init__(self, recipe: Recipe, spec: MethodSpec, slices: Sequence[Slice]) -> None:
        self._recipe = recipe
        self._spec = spec
        self._slices = slices
        self._keys = [source.key for source in slices[0].sources]
        self._shared = [parameter for parameter in spec.parameters if parameter.scope is Scope.GLOBAL]
        self._per_model = [parameter for parameter in spec.parameters if parameter.scope is Scope.MODEL]
        self._resolved: dict[int, tuple[Scalars, _Inputs]] = {}

    def of(self, output: OutputTensor) -> TensorStep:
        """The step for `output`."""
        recipe = self._recipe
        if not output.is_float:
            source = TensorInput(self._slices[output.slice_index].sources[0].key, output.tensors[0], _NOTHING)
            return TensorStep(output.name, output.shape, COPY_METHOD, (source,), None, _NOTHING)
        if recipe.pieces is not None:
            return piecewise_step(output, recipe.pieces, self._keys)
        if output.group not in self._resolved:
            self._resolved[output.group] = self._resolve(output)
        shared, inputs = self._resolved[output.group]
        base, owner = None, recipe.base_of(self._slices[output.slice_index])
        if output.base_tensor is not None and owner is not None:
            base = TensorInput(owner, output.base_tensor, _NOTHING)
        if not inputs and base is not None:
            alone = TensorInput(base.source, base.tensor, {"scale": 1.0})
            return TensorStep(output.name, output.shape, "passthrough", (alone,), None, _NOTHING)
        named = tuple([TensorInput(key, output.tensors[index], values) for index, key, values in inputs])
        return TensorStep(output.name, output.shape, recipe.method, named, base, shared)

    def _resolve(self, output: OutputTensor) -> tuple[Scalars, _Inputs]:
        """The method's global parameters, and every input except the base."""
        part = self._slices[output.slice_index]
        levels = (part.parameters, self._recipe.parameters)
        shared = {
            parameter.name: _value(parameter, levels, output.name, output.depth, self._recipe.method)
            for parameter in self._shared
        }
        inputs: _Inputs = []
        for index, source in enumerate(part.sources):
            if source.key == self._recipe.base_of(part) and self._spec.base is not BaseRole.SOURCE:
                continue
            name = output.names[index]
            own = (source.parameters, *levels)
            values = {
                parameter.name: _value(parameter, own, name, output.depth, source.key) for parameter in self._per_model
            }
            inputs.append((index, source.key, values))
        check = _EXTRA_CHECKS.get(self._recipe.method)
        if check is not None:
            check(output.name, shared, [values for _, _, values in inputs])
        if self._recipe.method == "linear":
            inputs = _alone_if_others_are_idle(inputs)
        return shared, inputs


def _alone_if_others_are_idle(inputs: _Inputs) -> _Inputs:
    """The only input with a nonzero weight, if there is just one, so that the others need not be read; else all inputs."""
    weighted = [entry for entry in inputs if entry[2]["weight"]]
    return weighted if len(weighted) == 1 else inputs


def _value(
    parameter: ParameterSpec, levels: Sequence[Parameters], tensor: str, depth: float, owner: str
) -> float | bool:
    for level in levels:
        for setting in level.get(parameter.name, ()):
            if setting.filter is None or setting.filter == "*" or setting.filter in tensor:
                return _typed(parameter, setting, depth)
    if parameter.default is None:
        places = "the recipe's" if parameter.scope is Scope.GLOBAL else "that model's, or the recipe's,"
        raise RecipeError(
            f"parameter {parameter.name!r} of {owner} has no value for tensor {tensor!r}; set it under {places} `parameters`"
        )
    return parameter.default


def _typed(parameter: ParameterSpec, setting: Setting, depth: float) -> float | bool:
    """The setting's value at `depth`, as a number or bool like the parameter; `check_recipe` has refused strings."""
    return setting.switch(depth) if isinstance(parameter.default, bool) else setting.number(depth)


def _check_linear(tensor: str, shared: Scalars, inputs: Sequence[Scalars]) -> None:
    if shared["normalize"]:
        _check_weight_sum(tensor, inputs, "normalize")


def _check_della(tensor: str, shared: Scalars, inputs: Sequence[Scalars]) -> None:
    for values in inputs:
        density, epsilon = float(values["density"]), float(values["epsilon"])
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise RecipeError(
                f"della of {tensor!r}: density {density} +- epsilon {epsilon} must stay between 0 and 1; use a smaller epsilon"
            )


def _check_multislerp(tensor: str, shared: Scalars, inputs: Sequence[Scalars]) -> None:
    if len(inputs) > 1 and shared["normalize_weights"]:
        _check_weight_sum(tensor, inputs, "normalize_weights")


def _check_weight_sum(tensor: str, inputs: Sequence[Scalars], switch: str) -> None:
    if sum(values["weight"] for values in inputs) == 0:
        raise RecipeError(
            f"the weights of {tensor!r} sum to 0 and cannot be normalised; change them or set {switch}: false"
        )


_EXTRA_CHECKS: Mapping[str, Callable[[str, Scalars, Sequence[Scalars]], None]] = {
    "linear": _check_linear,
    "della": _check_della,
    "della_linear": _check_della,
    "multislerp": _check_multislerp,
}
