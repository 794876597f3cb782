"""Memory that rank-based merges need in addition to the models. Reads headers only.

Methods that prune by rank keep, for every element of an expert, its rank by magnitude within its row; `sce` keeps, for every element of
the base, its place in its tensor when ordered by variance over the experts.
"""

import math
from collections.abc import Sequence

from evomerge.plan.merge_plan import TensorStep
from evomerge.plan.model_header import FLOAT_DTYPES, ModelHeader

RANKED_METHODS = ("della", "della_linear")
"""methods that prune by rank"""

RANK_BYTES = 2
"""bytes per rank"""

MOST_RANKS = 1 << (8 * RANK_BYTES)
"""longest row (in columns) whose ranks are kept; ranks of longer rows do not fit into `RANK_BYTES` and are recomputed for every merge"""

PLACE_BYTES = 4
"""bytes per place"""


def rank_bytes(methods: tuple[str, ...], experts: Sequence[ModelHeader]) -> int:
    """Size of the ranks and places that merges of `experts` by `methods` keep; 0 if they need none."""
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
    """Number of elements of a row, within which ranks are computed; a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


def keeps_ranks(step: TensorStep) -> bool:
    """Whether a merge of the step with resident sources keeps ranks or places."""
    return step.method in RANKED_METHODS or (step.method == "sce" and float(step.parameters["select_topk"]) < 1)
