"""Steps of `piecewise` recipes: plain `linear` steps for tensors with a single piece, steps with pieces for the others."""

from collections.abc import Sequence

from evomerge.core import RecipeError
from evomerge.plan.merge_plan import Piece, TensorInput, TensorStep
from evomerge.plan.structure import OutputTensor
from evomerge.recipe import PIECEWISE, PieceTable

_LINEAR = "linear"


def check_tensors(table: PieceTable, names: Sequence[str]) -> None:
    """Check that the table lists exactly the float tensors `names`.

    Raises:
        RecipeError: names a tensor that is missing or unknown.
    """
    missing = next((name for name in names if name not in table.tensors), None)
    if missing is not None:
        raise RecipeError(f"pieces.tensors: the models' tensor {missing!r} is missing; the recipe is for other models")
    unknown = next(iter(sorted(set(table.tensors) - set(names))), None)
    if unknown is not None:
        raise RecipeError(f"pieces.tensors: the models have no tensor {unknown!r}; the recipe is for other models")


def piecewise_step(output: OutputTensor, table: PieceTable, keys: Sequence[str]) -> TensorStep:
    """The step for `output`; `keys` names the sources in the order of the table's columns.

    Raises:
        RecipeError: a span ends outside the tensor.
    """
    n_sources = len(keys)
    pieces = []
    for span in table.tensors[output.name]:
        end = output.n_elements if span.end is None else span.end
        if span.end is not None and span.end >= output.n_elements:
            raise RecipeError(
                f"pieces.tensors.{output.name}: a span ends at element {end}, but the tensor has {output.n_elements} elements"
            )
        row = table.rows[span.row]
        noise = tuple((seed, scale) for seed, scale in zip(table.noise, row[n_sources:], strict=True) if scale)
        pieces.append(Piece(end, row[:n_sources], noise))
    if len(pieces) == 1 and not pieces[0].noise:
        return _linear_step(output, pieces[0].weights, keys)
    inputs = tuple(TensorInput(key, name, {}) for key, name in zip(keys, output.tensors, strict=True))
    return TensorStep(output.name, output.shape, PIECEWISE.name, inputs, None, {}, tuple(pieces))


def _linear_step(output: OutputTensor, weights: Sequence[float], keys: Sequence[str]) -> TensorStep:
    """A `linear` step that reads only sources with a nonzero weight (the first source if there are none)."""
    used = [index for index, weight in enumerate(weights) if weight] or [0]
    inputs = tuple(TensorInput(keys[index], output.tensors[index], {"weight": weights[index]}) for index in used)
    return TensorStep(output.name, output.shape, _LINEAR, inputs, None, {"normalize": False})
