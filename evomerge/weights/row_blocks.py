"""Numbers that belong to the rows of tensors, computed in blocks of rows that stay in the processor's cache.

References and compiled merges use the same blocks, so that sums over a row are made in the same order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

_BLOCK_ELEMENTS = 1 << 16


def blocks_of_rows(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Consecutive rows (over the last dimension) of tensors of one shape with elements, (rows, columns) of `dtype` each."""
    columns = tensors[0].shape[-1]
    flat = [tensor.reshape(-1, columns) for tensor in tensors]
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, len(flat[0]), step):
        yield [tensor[first : first + step].to(dtype) for tensor in flat]


def by_rows(function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`function` of the tensors' rows: one number for each, (rows,), from blocks (rows, columns) of every tensor."""
    return torch.cat([function(*block).reshape(-1) for block in blocks_of_rows(tensors, dtype)])
