"""Splits a sorted list of sequences into batches with little padding."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_PADDING = 0.25
"""A batch accepts sequences shorter than its longest by up to this fraction plus `_SLACK` tokens; beyond that, padding costs more
than another forward pass."""
_SLACK = 16


def batches(items: Sequence[Item], length: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """Consecutive batches of `items`, each of at most `budget` padded tokens (but at least one item).

    Args:
        items: sorted by decreasing length, at least roughly.
        length: number of tokens of an item.
        budget: upper limit on a batch's number of items times the length of its longest item.
    """
    batch: list[Item] = []
    longest = 0
    for item in items:
        size = length(item)
        grown = max(longest, size)
        if batch and ((len(batch) + 1) * grown > budget or size < longest * (1 - _PADDING) - _SLACK):
            yield batch
            batch, grown = [], size
        batch.append(item)
        longest = grown
    if batch:
        yield batch
