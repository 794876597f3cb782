"""Statistics of whole tensors that merges need (norms, inner products, magnitude histograms, ranks), computed on first use and cached.

Norms are dropped when the masks' seed changes; square sums, counts and orders of entries are dropped when their cache is full.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import LARGE_TENSOR, MOST_KEPT_NORMS, TensorInput, TensorKey
from evomerge.weights.fused.blocks import BLOCK, F32, as_bits, load_delta, round_block
from evomerge.weights.fused.experts import (
    changed_by,
    inner_products,
    mark_cut,
    places_of,
    sort_keys,
    square_sums,
    variances,
)
from evomerge.weights.fused.lanes import LANES
from evomerge.weights.fused.magnitudes import Cut, MagnitudeHistogram, find_cuts
from evomerge.weights.fused.norms import addend_grid, kept_norms
from evomerge.weights.fused.selection import cut_once
from evomerge.weights.fused.tables import DTYPE_OF, KINDS, Delta, delta_of
from evomerge.weights.fused.threads import Threads
from evomerge.weights.methods.arcee_fusion import important
from evomerge.weights.pool import WeightPool
from evomerge.weights.row_blocks import by_rows

Pair = tuple[TensorKey, TensorKey]
"""a base and the tensor compared with it"""

Experts = tuple[TensorKey, ...]
"""the tensors of the experts followed by that of the base"""

_REMEMBERED_SUMS = 64
"""number of sums cached per set of experts; a search with fixed densities asks for the same ones repeatedly"""

_REMEMBERED_COUNTS = 1 << 16
"""total number of counts of changed entries that are cached; a search that varies their threshold asks for new ones each time"""

_SORTED_AT_ONCE = 1 << 20
"""number of elements whose sort keys (8 bytes each) are in memory at a time"""

MOST_PLACES = 2**32 - 1
"""maximum number of elements of a tensor whose order can be stored"""


Known = TypeVar("Known")


class Statistics:
    """Statistics of the tensors of one pool. Safe to use from several threads.

    Args:
        pool: the tensors.
        precision: the kind to which tensors and their differences are rounded.
        once: for a single merge: compute nothing that pays off only with repeated use.

    Attributes:
        precision: as given.
        seed: of the masks; 0 until `use_seed` is called.
    """

    def __init__(self, pool: WeightPool, precision: int = F32, *, once: bool = False) -> None:
        self._pool = pool
        self.precision = precision
        self._once = once
        self._histograms: dict[Pair, MagnitudeHistogram] = {}
        self._asked_cuts: list[tuple[MagnitudeHistogram, int, Cut]] = []
        self._known: dict[tuple[object, ...], Any] = {}
        self.seed = 0
        self._kept_norms: dict[tuple[Pair, tuple[int, int], bool], tuple[float, NDArray[np.float64]]] = {}
        self._ranks: dict[Pair, NDArray[np.uint16]] = {}
        self._orders: dict[TensorKey, tuple[Experts, NDArray[np.uint32], int]] = {}
        self._square_sums: dict[Experts, dict[int, list[float]]] = {}
        self._changed: dict[tuple[Experts, float], tuple[list[int], list[int]]] = {}

    def use_seed(self, seed: int) -> None:
        """Set the seed of the masks and drop norms for other seeds. Must not be called while other threads use the statistics."""
        if seed != self.seed:
            self.seed = seed
            self._kept_norms.clear()

    def cut(self, pair: Pair, k: int) -> Cut:
        """The cut that separates the `k` largest magnitudes of `other - base`; valid once `find_cuts` has returned."""
        if self._once:
            return cut_once(*self._tensors(pair), k, self.precision)
        histogram = self._histograms.get(pair)
        if histogram is None:
            histogram = self._histograms[pair] = MagnitudeHistogram(*self._tensors(pair), self.precision)
        cut, is_new = histogram.cut(k)
        if is_new:
            self._asked_cuts.append((histogram, k, cut))
        return cut

    def find_cuts(self, threads: Threads) -> None:
        """Compute all requested cuts. Must not be called while other threads request cuts."""
        if self._asked_cuts:
            find_cuts(self._asked_cuts, threads)
        self._asked_cuts.clear()

    def gram(self, base: TensorKey | None, others: Sequence[TensorKey]) -> NDArray[np.float64]:
        """Inner products (n, n) of the tensors `others`, or of their differences from `base`."""
        keys = (*others, *([] if base is None else [base]))
        return self._asked(("gram", base is None, *keys), lambda: inner_products(*self._stored(keys), base is not None))

    def l1(self, pair: Pair) -> float:
        """L1 norm of `other - base`."""
        return self._asked(("l1", pair), lambda: float(_l1(*self._delta(pair))))

    def kept_l1(
        self, pair: Pair, key: tuple[int, int], keep: int, ranks: NDArray[np.uint16] | None = None, step: float = 0.0
    ) -> float | None:
        """L1 norm of the elements of `other - base` kept by a mask with this key; None if the merge should measure it instead.

        Args:
            pair: base and other.
            key: of the mask, see `evomerge.weights.philox`.
            keep: how many of its numbers, from 0 on, keep an element (with ranks: an element of rank 0).
            ranks: of the elements.
            step: how many more numbers each rank adds. Norms are cached only for the first value requested.
        """
        mask = (pair, key, ranks is not None)
        found = self._kept_norms.get(mask)
        if found is None:
            if self._once or len(self._kept_norms) >= MOST_KEPT_NORMS:
                return None
            delta, n_elements = self._delta(pair)
            if n_elements < LARGE_TENSOR:
                return None
            rank_address, grid = 0 if ranks is None else ranks.ctypes.data, addend_grid(self.l1(pair))
            norms = kept_norms(delta, n_elements, *key, rank_address, np.float32(step), grid)
            found = self._kept_norms[mask] = step, norms
        return float(found[1][keep]) if found[0] == step else None

    def ranks(self, pair: Pair, n_columns: int) -> NDArray[np.uint16]:
        """Rank of every `|other - base|` in its row, from 0 for the smallest; of equal ones, the first has the lower rank.

        Args:
            pair: base and other, of at least one element.
            n_columns: elements of a row, at most `evomerge.plan.MOST_RANKS`.

        Returns:
            Flat, padded to whole windows of the kernels.
        """
        found = self._ranks.get(pair)
        if found is None:
            delta, n_elements = self._delta(pair)
            found = np.zeros(-(-n_elements // LANES) * LANES, np.uint16)
            rows_at_once = max(1, _SORTED_AT_ONCE // n_columns)
            for start in range(0, n_elements, rows_at_once * n_columns):
                keys = np.empty((min(rows_at_once, (n_elements - start) // n_columns), n_columns), np.uint64)
                _rank_keys(delta, start, keys)
                keys.sort(axis=1)
                _ranks_of(keys, found[start:])
            if not self._once:
                # two threads may request a layer of a stack at once: keep a single array, because a GPU identifies ranks by their address
                found = self._ranks.setdefault(pair, found)
        return found

    def square_sums(self, experts: Experts, order: NDArray[np.uint32] | None, limit: int) -> list[float]:
        """Sum of squares of each task vector, over the entries whose place in `order` (None: all) is below `limit`."""
        known = self._square_sums.setdefault(experts, {})
        key = -1 if order is None else limit
        found = known.get(key)
        if found is None:
            address = 0 if order is None else order.ctypes.data
            found = square_sums(*self._stored(experts), address, np.uint32(limit)).tolist()
            if len(known) >= _REMEMBERED_SUMS:
                known.clear()
            if order is None or not self._once:
                known[key] = found
        return found

    def most_varied(self, experts: Experts, wanted: Callable[[int], int]) -> tuple[NDArray[np.uint32], int]:
        """Places of all entries when ordered by variance over the task vectors, and the number of entries to select (the limit on places).

        Of equal variances, the first count as larger. `wanted` maps the number of nonzero variances to the number of entries to select. Places are
        padded to whole windows of the kernels. For each base, those of one set of experts are cached.
        """
        held, order, n_varied = self._orders.get(experts[-1], ((), np.zeros(0, np.uint32), 0))
        if held == experts:
            return order, wanted(n_varied)
        stored = self._stored(experts)
        n_elements = stored[-1]
        order = np.zeros(n_elements + LANES, np.uint32)
        variance = order.view(np.float32)[:n_elements]
        variances(*stored, variance)
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
        """For each expert, the number of entries that only it changes by more than `epsilon`, and of those that others change too."""
        key = (experts, epsilon)
        found = self._changed.get(key)
        if found is None:
            held = np.array([epsilon], np.float32)
            round_block(held, 1, self.precision)
            alone, together = changed_by(*self._stored(experts), held[0]).tolist()
            if len(self._changed) >= _REMEMBERED_COUNTS:
                self._changed.clear()
            found = self._changed[key] = (alone, together)
        return found

    def important(self, pair: Pair) -> tuple[NDArray[np.float32], float]:
        """The changes that `arcee_fusion` selects: divergence of every row and the threshold, see `important` there."""

        def found() -> tuple[NDArray[np.float32], float]:
            divergence, least = important(*self._tensors(pair), DTYPE_OF[self.precision])
            return divergence.float().numpy(), least.item()

        return self._asked(("important", pair), found)

    def of_rows(
        self, function: Callable[..., torch.Tensor], entries: Sequence[TensorInput], base: TensorInput | None = None
    ) -> NDArray[np.float32]:
        """`function` of the rows of tensors, or of their differences from a base, in float32: (rows,)."""
        keys = [entry.key for entry in (*entries, *([] if base is None else [base]))]

        def of_differences(*rows: torch.Tensor) -> torch.Tensor:
            return function(*rows) if base is None else function(*[row - rows[-1] for row in rows[:-1]])

        def found() -> NDArray[np.float32]:
            tensors = [self._pool.tensor(*key) for key in keys]
            return by_rows(of_differences, tensors, torch.float32).numpy()

        return self._asked((function, base is None, *keys), found)

    def _asked(self, key: tuple[object, ...], compute: Callable[[], Known]) -> Known:
        """The result of `compute`, cached by `key`."""
        if key not in self._known:
            self._known[key] = compute()
        found: Known = self._known[key]
        return found

    def _stored(self, keys: Sequence[TensorKey]) -> tuple[NDArray[np.int64], NDArray[np.int32], int, int]:
        """Addresses and kinds of tensors of equal size, precision, and number of elements: the arguments of `evomerge.weights.fused.experts`."""
        tensors = [self._pool.tensor(*key) for key in keys]
        addresses = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
        kinds = np.array([KINDS[tensor.dtype] for tensor in tensors], np.int32)
        return addresses, kinds, self.precision, tensors[0].numel()

    def _delta(self, pair: Pair) -> tuple[Delta, int]:
        """The `Delta` of `other - base`, and its number of elements."""
        base, tensor = self._tensors(pair)
        return delta_of(base, tensor, self.precision), tensor.numel()

    def _tensors(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.tensor(*pair[0]), self._pool.tensor(*pair[1])


@numba.njit(cache=True, nogil=True)
def _l1(delta, n_elements):  # type: ignore[no-untyped-def]
    """Sum of |other - base| in float64, in eight lanes so that the compiler can use vector registers."""
    base, block = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    sums = np.zeros(8, np.float64)
    for start in range(0, n_elements, BLOCK):
        count = min(BLOCK, n_elements - start)
        load_delta(delta, start, count, base, block)
        block[count:] = np.float32(0.0)
        for i in range(0, BLOCK, 8):
            for lane in range(8):
                sums[lane] += np.float64(abs(block[i + lane]))
    return sums.sum()


@numba.njit(cache=True, nogil=True)
def _rank_keys(delta, start, keys):  # type: ignore[no-untyped-def]
    """Fill `keys` (rows, columns), from flat element `start` on, with the magnitude bits in the upper and the column in the lower bits."""
    n_columns = keys.shape[1]
    base, row = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    for r in range(keys.shape[0]):
        load_delta(delta, start + r * n_columns, n_columns, base, row)
        for i in range(n_columns):
            bits = as_bits(row[i]) & np.uint32(0x7FFFFFFF)
            keys[r, i] = (np.uint64(bits) << np.uint64(16)) | np.uint64(i)


@numba.njit(cache=True, nogil=True)
def _ranks_of(keys, ranks):  # type: ignore[no-untyped-def]
    """Write the place of every column of sorted `keys` into `ranks`, flat."""
    n_columns = keys.shape[1]
    for r in range(keys.shape[0]):
        for place in range(n_columns):
            ranks[r * n_columns + np.int64(keys[r, place] & np.uint64(0xFFFF))] = np.uint16(place)
