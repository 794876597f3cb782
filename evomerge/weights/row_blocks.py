"""Computes per-row numbers of tensors in blocks of rows that stay in the processor's cache.

References and compiled merges use the same blocks, so that sums over a row are computed in the same order.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

_BLOCK_ELEMENTS = 1 << 16


def blocks_of_rows(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """Consecutive rows (over the last dimension) of nonempty tensors of equal shape, (rows, columns) of `dtype` each."""
    columns = tensors[0].shape[-1]
    flat = [tensor.reshape(-1, columns) for tensor in tensors]
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, len(flat[0]), step):
        yield [tensor[first : first + step].to(dtype) for tensor in flat]


def by_rows(function: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """`function` of the tensors' rows, (rows,): it is given blocks (rows, columns) of every tensor and returns one number per row."""
    return torch.cat([function(*block).reshape(-1) for block in blocks_of_rows(tensors, dtype)])
