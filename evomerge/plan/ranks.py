"""What pruning by rank keeps in memory beside the models: for every element of an expert its rank by magnitude in its row. Reads headers only."""

import math
from collections.abc import Iterable

from evomerge.plan.model_header import FLOAT_DTYPES, ModelHeader

RANKED_METHODS = ("della", "della_linear")
"""methods that prune by rank"""

RANK_BYTES = 2
"""of one rank"""

MOST_RANKS = 1 << (8 * RANK_BYTES)
"""columns of a row whose ranks are kept; those of longer rows are found anew for every merge, as ranks do not fit"""


def rank_bytes(method: str, experts: Iterable[ModelHeader]) -> int:
    """Size of the ranks that merges of `experts` by `method` keep; 0 where they prune otherwise."""
    if method not in RANKED_METHODS:
        return 0
    return RANK_BYTES * sum(
        math.prod(tensor.shape)
        for header in experts
        for tensor in header.tensors.values()
        if tensor.dtype in FLOAT_DTYPES and n_columns(tensor.shape) <= MOST_RANKS
    )


def n_columns(shape: tuple[int, ...]) -> int:
    """Elements of a row, within which ranks are: a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)
