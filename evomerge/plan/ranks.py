"""What merges by rank keep in memory beside the models. Reads headers only.

The methods that prune by rank keep, for every element of an expert, its rank by magnitude in its row; `sce` keeps for every element of
the base its place by variance over the experts in its tensor.
"""

import math
from collections.abc import Sequence

from evomerge.plan.merge_plan import TensorStep
from evomerge.plan.model_header import FLOAT_DTYPES, ModelHeader

RANKED_METHODS = ("della", "della_linear")
"""methods that prune by rank"""

RANK_BYTES = 2
"""of one rank"""

MOST_RANKS = 1 << (8 * RANK_BYTES)
"""columns of a row whose ranks are kept; those of longer rows are found anew for every merge, as ranks do not fit"""

PLACE_BYTES = 4
"""of one place"""


def rank_bytes(methods: tuple[str, ...], experts: Sequence[ModelHeader]) -> int:
    """Size of the ranks and places that merges of `experts` by `methods` keep; 0 where they need none."""
    n_bytes = 0
    if "sce" in methods:
        tensors = experts[0].tensors.values() if experts else ()
        n_bytes += PLACE_BYTES * sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype in FLOAT_DTYPES)
    if not set(RANKED_METHODS) & set(methods):
        return n_bytes
    return n_bytes + RANK_BYTES * sum(
        math.prod(tensor.shape)
        for header in experts
        for tensor in header.tensors.values()
        if tensor.dtype in FLOAT_DTYPES and n_columns(tensor.shape) <= MOST_RANKS
    )


def n_columns(shape: tuple[int, ...]) -> int:
    """Elements of a row, within which ranks are: a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


def keeps_ranks(step: TensorStep) -> bool:
    """Whether a resident merge of the step keeps ranks or places."""
    return step.method in RANKED_METHODS or (step.method == "sce" and float(step.parameters["select_topk"]) < 1)
