"""What merges need to know of whole tensors (norms, inner products, magnitude histograms, ranks): computed when first asked for, kept for ever."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import TensorInput, TensorKey
from evomerge.weights.blocks import BLOCK, F32, as_bits, load_block, load_delta, round_block
from evomerge.weights.fused.experts import changed_by, mark_cut, places_of, sort_keys, square_sums, variances
from evomerge.weights.fused.lanes import LANES
from evomerge.weights.fused.magnitudes import Cut, MagnitudeHistogram
from evomerge.weights.fused.norms import addend_grid, kept_norms
from evomerge.weights.fused.selection import cut_once
from evomerge.weights.fused.tables import DTYPE_OF, KINDS
from evomerge.weights.methods.arcee_fusion import important
from evomerge.weights.pool import WeightPool
from evomerge.weights.row_blocks import by_rows

Pair = tuple[TensorKey, TensorKey]
"""a base and what is compared with it"""

Experts = tuple[TensorKey, ...]
"""the tensors of experts and, last, of the base"""

_REMEMBERED_CUTS = 64
"""per pair; a search with fixed densities asks for the same ones again and again"""

_REMEMBERED_COUNTS = 1 << 16
"""of changed entries, in all; a search that varies their threshold asks for new ones each time"""

_LARGE = 1 << 19
"""elements of tensors of which it is kept what every density keeps (512 KB): half of the smallest in bfloat16"""

_MOST_KEPT_NORMS = 2048
"""1 GB of them; a Llama of 8B with three experts has 678"""

_SORTED_AT_ONCE = 1 << 20
"""elements whose sort keys (8 bytes each) are in memory at a time"""

MOST_PLACES = 2**32 - 1
"""elements of a tensor whose order fits what is kept of it"""


class Products(NamedTuple):
    """L2 norms of two tensors and their inner product, in float64."""

    norm_a: float
    norm_b: float
    product: float


class Statistics:
    """Statistics of the tensors of one pool. Safe to use from several threads.

    Args:
        pool: the tensors.
        precision: the kind that tensors and their differences are rounded to (for `gram`: not at all).
        once: for a single merge: nothing is made that pays only when asked again.

    Attributes:
        precision: as given.
    """

    def __init__(self, pool: WeightPool, precision: int = F32, *, once: bool = False) -> None:
        self._pool = pool
        self.precision = precision
        self._once = once
        self._histograms: dict[Pair, MagnitudeHistogram] = {}
        self._cuts: dict[Pair, dict[int, Cut]] = {}
        self._products: dict[Pair, Products] = {}
        self._inner: dict[tuple[TensorKey | None, TensorKey, TensorKey], float] = {}
        self._l1: dict[Pair, float] = {}
        self._seed = 0
        self._kept_norms: dict[tuple[Pair, tuple[int, int], bool], tuple[float, NDArray[np.float64]]] = {}
        self._ranks: dict[Pair, NDArray[np.uint16]] = {}
        self._orders: dict[TensorKey, tuple[Experts, NDArray[np.uint32], int]] = {}
        self._square_sums: dict[Experts, dict[int, list[float]]] = {}
        self._of_rows: dict[tuple[object, ...], NDArray[np.float32]] = {}
        self._important: dict[Pair, tuple[NDArray[np.float32], float]] = {}
        self._changed: dict[tuple[Experts, float], tuple[list[int], list[int]]] = {}

    def use_seed(self, seed: int) -> None:
        """Says which seed the masks have from now on; what is known of others' is forgotten. Not while other threads ask."""
        if seed != self._seed:
            self._seed = seed
            self._kept_norms.clear()

    def cut(self, pair: Pair, k: int) -> Cut:
        """What separates the `k` largest magnitudes of `other - base`."""
        known = self._cuts.setdefault(pair, {})
        cut = known.get(k)
        if cut is None and self._once:
            cut = known[k] = cut_once(*self._tensors(pair), k, self.precision)
        elif cut is None:
            if pair not in self._histograms:
                self._histograms[pair] = MagnitudeHistogram(*self._tensors(pair), self.precision)
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
            aa, bb, ab = _products(*_places(a, b), self.precision, a.numel())
            found = self._products[pair] = Products(aa**0.5, bb**0.5, ab)
        return found

    def gram(self, base: TensorKey | None, others: Sequence[TensorKey]) -> NDArray[np.float64]:
        """Inner products (n, n) of the tensors `others`, of their differences to `base` (rounded to float32) where there is one."""
        matrix = np.empty((len(others), len(others)))
        for row, a in enumerate(others):
            for column, b in enumerate(others[: row + 1]):
                key = (base, a, b)
                found = self._inner.get(key)
                if found is None:
                    first, second = self._pool.tensor(*a), self._pool.tensor(*b)
                    origin = first if base is None else self._pool.tensor(*base)
                    found = self._inner[key] = float(
                        _inner(
                            origin.data_ptr(), KINDS[origin.dtype], base is not None, first.data_ptr(), KINDS[first.dtype],
                            second.data_ptr(), KINDS[second.dtype], first.numel(),
                        )
                    )  # fmt: skip
                matrix[row, column] = matrix[column, row] = found
        return matrix

    def l1(self, pair: Pair) -> float:
        """L1 norm of `other - base`."""
        found = self._l1.get(pair)
        if found is None:
            base, tensor = self._tensors(pair)
            found = self._l1[pair] = float(_l1(*_places(base, tensor), self.precision, tensor.numel()))
        return found

    def kept_l1(
        self, pair: Pair, key: tuple[int, int], keep: int, ranks: NDArray[np.uint16] | None = None, step: float = 0.0
    ) -> float | None:
        """L1 norm of what a mask with this key keeps of `other - base`; None where the merge had better measure it.

        Args:
            pair: base and other.
            key: of the mask, see `evomerge.weights.philox`.
            keep: how many of its numbers, from 0 on, keep an element, of rank 0 where there are ranks.
            ranks: of the elements.
            step: how many more numbers each rank adds. Norms are known for the first one asked for.
        """
        mask = (pair, key, ranks is not None)
        found = self._kept_norms.get(mask)
        if found is None:
            base, tensor = self._tensors(pair)
            if self._once or tensor.numel() < _LARGE or len(self._kept_norms) >= _MOST_KEPT_NORMS:
                return None
            rank_address, grid = 0 if ranks is None else ranks.ctypes.data, addend_grid(self.l1(pair))
            norms = kept_norms(
                *_places(base, tensor), self.precision, tensor.numel(), *key, rank_address, np.float32(step), grid
            )
            found = self._kept_norms[mask] = step, norms
        return float(found[1][keep]) if found[0] == step else None

    def ranks(self, pair: Pair, n_columns: int) -> NDArray[np.uint16]:
        """Rank of every `|other - base|` in its row, from 0 for the smallest; of equal ones the first is lower.

        Args:
            pair: base and other, of at least one element.
            n_columns: elements of a row, at most `evomerge.plan.MOST_RANKS`.

        Returns:
            Flat, padded to whole windows of the kernels.
        """
        found = self._ranks.get(pair)
        if found is None:
            base, tensor = self._tensors(pair)
            n_elements = tensor.numel()
            found = np.zeros(-(-n_elements // LANES) * LANES, np.uint16)
            rows_at_once = max(1, _SORTED_AT_ONCE // n_columns)
            for start in range(0, n_elements, rows_at_once * n_columns):
                keys = np.empty((min(rows_at_once, (n_elements - start) // n_columns), n_columns), np.uint64)
                _rank_keys(*_places(base, tensor), self.precision, start, keys)
                keys.sort(axis=1)
                _ranks_of(keys, found[start:])
            if not self._once:
                self._ranks[pair] = found
        return found

    def square_sums(self, experts: Experts, order: NDArray[np.uint32] | None, limit: int) -> list[float]:
        """Sum of squares of each task vector, over the entries whose place in `order` (None: all) is below `limit`."""
        known = self._square_sums.setdefault(experts, {})
        key = -1 if order is None else limit
        found = known.get(key)
        if found is None:
            address = 0 if order is None else order.ctypes.data
            found = square_sums(*self._all_places(experts), address, np.uint32(limit)).tolist()
            if len(known) >= _REMEMBERED_CUTS:
                known.clear()
            if order is None or not self._once:
                known[key] = found
        return found

    def most_varied(self, experts: Experts, wanted: Callable[[int], int]) -> tuple[NDArray[np.uint32], int]:
        """Places of all entries by variance over the task vectors, and the place before which the most varied `wanted` are.

        Of equal variances the first count as larger. `wanted` is given how many variances are not 0. Places are padded to whole windows of
        the kernels. Those of one set of experts are kept for each base.
        """
        held, order, n_varied = self._orders.get(experts[-1], ((), np.zeros(0, np.uint32), 0))
        if held == experts:
            return order, wanted(n_varied)
        places = self._all_places(experts)
        n_elements = places[-1]
        order = np.zeros(n_elements + LANES, np.uint32)
        variance = order.view(np.float32)[:n_elements]
        variances(*places, variance)
        if self._once:
            cut = cut_once(None, torch.from_numpy(variance), wanted(int(np.count_nonzero(variance))))
            mark_cut(variance, np.float32(cut.threshold), cut.cutoff)
            return order, 1
        keys = np.empty(n_elements, np.uint64)
        n_varied = int(sort_keys(variance, keys))
        keys.sort()
        places_of(keys, order)
        self._orders[experts[-1]] = (experts, order, n_varied)
        return order, wanted(n_varied)

    def changed_by(self, experts: Experts, epsilon: float) -> tuple[list[int], list[int]]:
        """How many entries each expert changes by more than `epsilon`: those that no other does, and those that others do too."""
        key = (experts, epsilon)
        found = self._changed.get(key)
        if found is None:
            held = np.array([epsilon], np.float32)
            round_block(held, 1, self.precision)
            alone, together = changed_by(*self._all_places(experts), held[0]).tolist()
            if len(self._changed) >= _REMEMBERED_COUNTS:
                self._changed.clear()
            found = self._changed[key] = (alone, together)
        return found

    def important(self, pair: Pair) -> tuple[NDArray[np.float32], float]:
        """Which changes of other `arcee_fusion` takes, see there."""
        found = self._important.get(pair)
        if found is None:
            divergence, least = important(*self._tensors(pair), DTYPE_OF[self.precision])
            found = self._important[pair] = (divergence.float().numpy(), least.item())
        return found

    def of_rows(
        self, function: Callable[..., torch.Tensor], entries: Sequence[TensorInput], base: TensorInput | None = None
    ) -> NDArray[np.float32]:
        """`function` of the rows of tensors, or of their differences to a base, as `evomerge.weights.row_blocks.by_rows`: (rows,)."""
        keys = [entry.key for entry in (*entries, *([] if base is None else [base]))]
        key = (function, base is None, *keys)
        found = self._of_rows.get(key)
        if found is None:

            def of_differences(*rows: torch.Tensor) -> torch.Tensor:
                return function(*rows) if base is None else function(*[row - rows[-1] for row in rows[:-1]])

            tensors = [self._pool.tensor(*key) for key in keys]
            found = self._of_rows[key] = by_rows(of_differences, tensors, DTYPE_OF[self.precision]).float().numpy()
        return found

    def _all_places(self, experts: Experts) -> tuple[NDArray[np.int64], NDArray[np.int32], int, int]:
        """Addresses and kinds of the tensors, precision and number of elements."""
        tensors = [self._pool.tensor(*key) for key in experts]
        addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        kinds = np.array([KINDS[tensor.dtype] for tensor in tensors], np.int32)
        return addresses, kinds, self.precision, tensors[0].numel()

    def _tensors(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.tensor(*pair[0]), self._pool.tensor(*pair[1])


def _places(a: torch.Tensor, b: torch.Tensor) -> tuple[int, int, int, int]:
    """Where both are and how the kernels read them."""
    return a.data_ptr(), KINDS[a.dtype], b.data_ptr(), KINDS[b.dtype]


@numba.njit(cache=True, nogil=True)
def _products(address_a, kind_a, address_b, kind_b, precision, n_elements):  # type: ignore[no-untyped-def]
    """Sums of a*a, b*b and a*b in float64, in eight lanes each so that the compiler can use vector registers."""
    a, b = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sums = np.zeros((3, 8), np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_block(address_a, kind_a, start, count, a)
        load_block(address_b, kind_b, start, count, b)
        round_block(a, count, precision)
        round_block(b, count, precision)
        a[count:] = np.float32(0.0)
        b[count:] = np.float32(0.0)
        for i in range(0, BLOCK, 8):
            for lane in range(8):
                x, y = np.float64(a[i + lane]), np.float64(b[i + lane])
                sums[0, lane] += x * x
                sums[1, lane] += y * y
                sums[2, lane] += x * y
    return sums[0].sum(), sums[1].sum(), sums[2].sum()


@numba.njit(cache=True, nogil=True)
def _inner(base_address, base_kind, has_base, address_a, kind_a, address_b, kind_b, n_elements):  # type: ignore[no-untyped-def]
    """Sum of (a - base)(b - base) in float64, in lanes as above; of a*b without a base."""
    a, b, base = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    sums = np.zeros(8, np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_block(address_a, kind_a, start, count, a)
        load_block(address_b, kind_b, start, count, b)
        if has_base:
            load_block(base_address, base_kind, start, count, base)
        a[count:] = np.float32(0.0)
        b[count:] = np.float32(0.0)
        base[count:] = np.float32(0.0)
        for i in range(0, BLOCK, 8):
            for lane in range(8):
                x, y = a[i + lane] - base[i + lane], b[i + lane] - base[i + lane]
                sums[lane] += np.float64(x) * np.float64(y)
    return sums.sum()


@numba.njit(cache=True, nogil=True)
def _l1(base_address, base_kind, address, kind, precision, n_elements):  # type: ignore[no-untyped-def]
    """Sum of |other - base| in float64, in lanes as above."""
    base, block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sums = np.zeros(8, np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_delta(base_address, base_kind, address, kind, precision, start, count, base, block)
        block[count:] = np.float32(0.0)
        for i in range(0, BLOCK, 8):
            for lane in range(8):
                sums[lane] += np.float64(abs(block[i + lane]))
    return sums.sum()


@numba.njit(cache=True, nogil=True)
def _rank_keys(base_address, base_kind, address, kind, precision, start, keys):  # type: ignore[no-untyped-def]
    """Fills `keys` (rows, columns) with magnitude bits above the column, from flat element `start` on."""
    n_columns = keys.shape[1]
    base, row = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    for r in range(keys.shape[0]):
        load_delta(base_address, base_kind, address, kind, precision, start + r * n_columns, n_columns, base, row)
        for i in range(n_columns):
            bits = as_bits(row[i]) & np.uint32(0x7FFFFFFF)
            keys[r, i] = (np.uint64(bits) << np.uint64(16)) | np.uint64(i)


@numba.njit(cache=True, nogil=True)
def _ranks_of(keys, ranks):  # type: ignore[no-untyped-def]
    """Writes the place of every column of sorted `keys` into `ranks`, flat."""
    n_columns = keys.shape[1]
    for r in range(keys.shape[0]):
        for place in range(n_columns):
            ranks[r * n_columns + np.int64(keys[r, place] & np.uint64(0xFFFF))] = np.uint16(place)
