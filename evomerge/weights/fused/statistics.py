"""What merges need to know of whole tensors (norms, inner products, magnitude histograms): computed when first asked for, kept for ever."""

from typing import NamedTuple

import numba
import numpy as np
import torch

from evomerge.weights.blocks import BLOCK, load_block
from evomerge.weights.fused.magnitudes import Cut, MagnitudeHistogram
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.pool import WeightPool

Pair = tuple[str, str, str, str]
"""base model, its tensor, other model, its tensor"""

_REMEMBERED_CUTS = 64
"""per pair; a search with fixed densities asks for the same ones again and again"""


class Products(NamedTuple):
    """L2 norms of two tensors and their inner product, in float64."""

    norm_a: float
    norm_b: float
    product: float


class Statistics:
    """Statistics of the tensors of one pool. Safe to use from several threads."""

    def __init__(self, pool: WeightPool) -> None:
        self._pool = pool
        self._histograms: dict[Pair, MagnitudeHistogram] = {}
        self._cuts: dict[Pair, dict[int, Cut]] = {}
        self._products: dict[Pair, Products] = {}

    def cut(self, pair: Pair, k: int) -> Cut:
        """What separates the `k` largest magnitudes of `other - base`."""
        known = self._cuts.setdefault(pair, {})
        cut = known.get(k)
        if cut is None:
            if pair not in self._histograms:
                self._histograms[pair] = MagnitudeHistogram(*self._tensors(pair))
            cut = self._histograms[pair].cut(k)
            if len(known) >= _REMEMBERED_CUTS:
                known.clear()
            known[k] = cut
        return cut

    def products(self, pair: Pair) -> Products:
        """Norms and inner product of base and other."""
        found = self._products.get(pair)
        if found is None:
            a, b = self._tensors(pair)
            aa, bb, ab = _products(a.data_ptr(), KINDS[a.dtype], b.data_ptr(), KINDS[b.dtype], a.numel())
            found = self._products[pair] = Products(aa**0.5, bb**0.5, ab)
        return found

    def _tensors(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.tensor(pair[0], pair[1]), self._pool.tensor(pair[2], pair[3])


@numba.njit(cache=True, nogil=True)
def _products(address_a, kind_a, address_b, kind_b, n_elements):  # type: ignore[no-untyped-def]
    """Sums of a*a, b*b and a*b in float64, in eight lanes each so that the compiler can use vector registers."""
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sums = np.zeros((3, 8), np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_block(address_a, kind_a, start, count, a)
        load_block(address_b, kind_b, start, count, b)
        a[count:] = np.float32(0.0)
        b[count:] = np.float32(0.0)
        for i in range(0, BLOCK, 8):
            for lane in range(8):
                x, y = np.float64(a[i + lane]), np.float64(b[i + lane])
                sums[0, lane] += x * x
                sums[1, lane] += y * y
                sums[2, lane] += x * y
    return sums[0].sum(), sums[1].sum(), sums[2].sum()
