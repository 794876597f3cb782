"""Turns crossovers into recipes: every descendant of K seed models is a piecewise-constant linear combination of them.

SLERP of two weight vectors is `a A + b B` with two scalars, so a child of two combinations is again a combination: its pieces are
its parents' pieces, split once more per chromosome. The scalars depend on the angle between the parents, which follows from the
seeds' inner products over each piece (`SeedProducts`); no weights are read here. All numbers are float64.

M2N2 (arXiv 2508.16204). Deviation: for noise, expected inner products are used (1 per weight with itself, 0 with everything
else), which differ from the actual ones by a relative error of about 1 / sqrt(number of weights).
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evomerge.core import Candidate, CrossoverGenome, Genome, RecipeError, VectorGenome
from evomerge.recipe.methods import PIECEWISE
from evomerge.recipe.parts import Slice, Source
from evomerge.recipe.pieces import PieceTable, Span
from evomerge.recipe.recipe import Recipe

Floats = NDArray[np.float64]

_PARALLEL = 1e-6
"""vectors whose angle has at most this sine are interpolated linearly, as in the released code"""

_OPPOSITE = -1.0 + 1e-6
"""vectors whose angle has a cosine below this are too: the arc between opposite vectors is undefined, and its factors grow without bound"""

_REMEMBERED = 1024
"""number of combinations cached; older ones are recomputed from their ancestors"""


class Angle(StrEnum):
    """The angle used in a crossover's SLERP."""

    GLOBAL = "global"
    """the angle between the whole weight vectors (the released code)"""
    SEGMENT = "segment"
    """a separate angle for each side of each split point (the paper's formula)"""


class SplitAt(StrEnum):
    """Where a split point may be."""

    ELEMENT = "element"
    """anywhere, including inside a tensor (the paper)"""
    TENSOR = "tensor"
    """at the nearest tensor boundary; mergekit can express the result"""


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The flattened weights of a model: for each chromosome, (name, number of elements) of its float tensors in order."""

    chromosomes: tuple[tuple[tuple[str, int], ...], ...]

    def ends(self, chromosome: int) -> NDArray[np.int64]:
        """End position of each tensor of a chromosome, (n_tensors,)."""
        return np.cumsum([size for _, size in self.chromosomes[chromosome]], dtype=np.int64)

    @property
    def n_weights(self) -> int:
        """Total number of elements of all chromosomes."""
        return sum(size for chromosome in self.chromosomes for _, size in chromosome)


class SeedProducts(Protocol):
    """Inner products of the K seed models."""

    def before(self, chromosome: int, position: int) -> Floats:
        """Over the first `position` weights of a chromosome: (K, K), float64."""
        ...


@dataclass(frozen=True, slots=True)
class Combination:
    """A piecewise-constant linear combination of K seed models and noise terms.

    Attributes:
        ends: per chromosome, the end of each piece, (n_pieces,), increasing up to the chromosome's number of weights.
        rows: per chromosome, the coefficients, (n_pieces, K + n_noise).
        noise: seeds of the noise terms.
        factors: for a crossover, the factors of its parents, (n_chromosomes, 2, 2): left and right of the split, first and second
            parent. With them, it can be rebuilt without inner products. None for a point.
    """

    ends: tuple[NDArray[np.int64], ...]
    rows: tuple[Floats, ...]
    noise: tuple[int, ...] = ()
    factors: Floats | None = None

    @property
    def n_bytes(self) -> int:
        """Memory used by its numbers."""
        return sum(array.nbytes for array in (*self.ends, *self.rows)) + 8 * len(self.noise)


class Lineage:
    """Computes the combinations and recipes of the candidates of one run.

    Args:
        seeds: the seed models (whole models), in the order of the space's coordinates.
        layout: their flattened weights.
        products: their inner products.
        angle, split: see the enumerations.
        out_dtype: of the recipes.
    """

    def __init__(
        self,
        seeds: Sequence[Source],
        layout: WeightLayout,
        products: SeedProducts,
        *,
        angle: Angle = Angle.GLOBAL,
        split: SplitAt = SplitAt.ELEMENT,
        out_dtype: str | None = None,
    ) -> None:
        self._seeds, self._layout, self._products = tuple(seeds), layout, products
        self._angle, self._split, self._out_dtype = angle, split, out_dtype
        self._tensor_ends = [layout.ends(index) for index in range(len(layout.chromosomes))]
        self._known: OrderedDict[str, Combination] = OrderedDict()

    def combination(
        self,
        candidate: Candidate,
        genome_of: Callable[[str], Genome],
        factors_of: Callable[[str], Sequence[float] | None] = lambda name: None,
    ) -> Combination:
        """The combination of seeds and noise that gives `candidate`.

        Args:
            candidate: a point or a crossover.
            genome_of: id -> genome, for its ancestors.
            factors_of: id -> flattened `Combination.factors`, for it and its ancestors; None if unknown, so that inner products are needed.

        Raises:
            RecipeError: a genome or factors do not match the number of seeds or chromosomes.
        """
        found: dict[str, Combination] = {}
        open_ids = [candidate.id]
        while open_ids:  # iterative, because lineages can be as deep as a run is long
            name = open_ids[-1]
            genome = candidate.genome if name == candidate.id else genome_of(name)
            parents = genome.parents if isinstance(genome, CrossoverGenome) else ()
            known = self._known.get(name)
            missing = [parent for parent in parents if parent not in found] if known is None else []
            if missing:
                open_ids += missing
                continue
            if name not in found:
                found[name] = known or self._make(genome, [found[parent] for parent in parents], factors_of(name))
                self._remember(name, found[name])
            open_ids.pop()
        return found[candidate.id]

    def recipe(self, candidate: Candidate, genome_of: Callable[[str], Genome]) -> Recipe:
        """The merge that gives `candidate`. Raises as `combination` does."""
        return self.recipe_of(self.combination(candidate, genome_of), name=candidate.id)

    def recipe_of(self, combination: Combination, name: str | None = None) -> Recipe:
        """The merge that gives `combination`."""
        rows: list[tuple[float, ...]] = []
        tensors: dict[str, tuple[Span, ...]] = {}
        for chromosome, tensor_ends, ends, table in zip(
            self._layout.chromosomes, self._tensor_ends, combination.ends, combination.rows, strict=True
        ):
            for (tensor, size), end in zip(chromosome, tensor_ends.tolist(), strict=True):
                first = int(np.searchsorted(ends, end - size, side="right")) if size else 0
                last = int(np.searchsorted(ends, end - 1, side="right")) if size else 0
                inner = [int(ends[piece]) - (end - size) for piece in range(first, last)]
                pieces = range(len(rows) + first, len(rows) + last + 1)
                tensors[tensor] = tuple(Span(*entry) for entry in zip([*inner, None], pieces, strict=True))
            rows += [tuple(row) for row in table.tolist()]
        return Recipe(
            method=PIECEWISE.name,
            slices=(Slice(self._seeds),),
            out_dtype=self._out_dtype,
            name=name,
            pieces=PieceTable(tuple(rows), tensors, combination.noise),
        )

    def _make(self, genome: Genome, parents: Sequence[Combination], factors: Sequence[float] | None) -> Combination:
        if isinstance(genome, VectorGenome):
            if len(genome.values) != len(self._seeds):
                raise RecipeError(
                    f"a point has {len(genome.values)} coordinates, but there are {len(self._seeds)} seed models"
                )
            row = np.array([genome.values])
            return Combination(
                tuple(ends[-1:] for ends in self._tensor_ends), tuple(row for _ in self._tensor_ends), ()
            )
        if len(genome.splits) != len(self._tensor_ends):
            raise RecipeError(
                f"a crossover has {len(genome.splits)} split points, but there are {len(self._tensor_ends)} chromosomes"
            )
        first, second = parents
        noise = tuple(dict.fromkeys((*first.noise, *second.noise)))
        n_seeds = len(self._seeds)
        child = _aligned(first, second, noise, n_seeds, self._cuts(genome))
        made = self._factors(child, genome.mix) if factors is None else self._recorded(factors)
        rows = []
        for a, b, ends, cut, (left, right) in zip(child.first, child.second, child.ends, child.cuts, made, strict=True):
            of_both = np.where((ends <= cut)[:, None], left, right)
            rows.append(of_both[:, :1] * a + of_both[:, 1:] * b)
        if genome.mutation is not None:
            noise = (*noise, genome.mutation.seed)
            rows = [np.hstack([table, np.full((len(table), 1), genome.mutation.sigma)]) for table in rows]
        joined = [_joined(ends, table) for ends, table in zip(child.ends, rows, strict=True)]
        return Combination(tuple(ends for ends, _ in joined), tuple(table for _, table in joined), noise, made)

    def _cuts(self, genome: CrossoverGenome) -> list[int]:
        """The split point of each chromosome, as a number of weights."""
        cuts = []
        for share, ends in zip(genome.splits, self._tensor_ends, strict=True):
            cut = min(int(share * int(ends[-1])), int(ends[-1]))
            if self._split is SplitAt.TENSOR:
                edges = np.concatenate([[0], ends])
                cut = int(edges[np.argmin(np.abs(edges - cut))])
            cuts.append(cut)
        return cuts

    def _factors(self, child: "_Aligned", mix: float) -> Floats:
        """Compute `Combination.factors` from inner products."""
        products = [self._piece_products(child, index) for index in range(len(child.ends))]
        whole = sum((table.sum(axis=0) for table in products), np.zeros(3))
        factors = np.empty((len(products), 2, 2))
        for of_sides, table, ends, cut in zip(factors, products, child.ends, child.cuts, strict=True):
            is_left = ends <= cut
            for row, side, share in ((0, is_left, mix), (1, ~is_left, 1.0 - mix)):
                sums = whole if self._angle is Angle.GLOBAL else table[side].sum(axis=0)
                of_sides[row] = slerp_factors(share, *sums.tolist())
        return factors

    def _recorded(self, factors: Sequence[float]) -> Floats:
        n_chromosomes = len(self._tensor_ends)
        if len(factors) != 4 * n_chromosomes:
            raise RecipeError(
                f"a crossover has {len(factors)} factors, but {n_chromosomes} chromosomes need {4 * n_chromosomes}"
            )
        return np.array(factors).reshape(n_chromosomes, 2, 2)

    def _piece_products(self, child: "_Aligned", chromosome: int) -> Floats:
        """<A, A>, <B, B> and <A, B> of every piece, (n_pieces, 3)."""
        ends = [0, *child.ends[chromosome].tolist()]
        n_seeds = len(self._seeds)
        gram = np.diff([self._products.before(chromosome, end) for end in ends], axis=0)
        lengths = np.diff(ends)
        first, second = child.first[chromosome], child.second[chromosome]
        columns = []
        for a, b in ((first, first), (second, second), (first, second)):
            of_seeds = np.einsum("pi,pij,pj->p", a[:, :n_seeds], gram, b[:, :n_seeds])
            columns.append(of_seeds + lengths * np.sum(a[:, n_seeds:] * b[:, n_seeds:], axis=1))
        return np.stack(columns, axis=1)

    def _remember(self, name: str, combination: Combination) -> None:
        self._known[name] = combination
        self._known.move_to_end(name)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


def slerp_factors(share: float, norm2_a: float, norm2_b: float, product: float) -> tuple[float, float]:
    """SLERP factors (of A, of B) from squared norms and inner product; those of LERP for parallel, opposite and zero vectors."""
    scale = math.sqrt(max(norm2_a, 0.0)) * math.sqrt(max(norm2_b, 0.0))
    cosine = min(max(product / scale, -1.0), 1.0) if scale > 0.0 else 1.0
    angle = math.acos(cosine)
    sine = math.sin(angle)
    if sine <= _PARALLEL or cosine < _OPPOSITE:
        return 1.0 - share, share
    return math.sin((1.0 - share) * angle) / sine, math.sin(share * angle) / sine


@dataclass(frozen=True, slots=True)
class _Aligned:
    """Two parents on common pieces and noise terms, also split at the child's split points."""

    cuts: list[int]
    ends: list[NDArray[np.int64]]
    first: list[Floats]
    second: list[Floats]


def _aligned(
    first: Combination, second: Combination, noise: tuple[int, ...], n_seeds: int, cuts: list[int]
) -> _Aligned:
    ends = [
        np.unique(np.concatenate([a, b, np.array([cut] if cut else [], dtype=np.int64)]))
        for a, b, cut in zip(first.ends, second.ends, cuts, strict=True)
    ]

    def spread(parent: Combination) -> list[Floats]:
        columns = [*range(n_seeds), *(n_seeds + noise.index(seed) for seed in parent.noise)]
        tables = []
        for own, table, wanted in zip(parent.ends, parent.rows, ends, strict=True):
            rows = np.zeros((len(wanted), n_seeds + len(noise)))
            rows[:, columns] = table[np.searchsorted(own, wanted - 1, side="right")]
            tables.append(rows)
        return tables

    return _Aligned(cuts, ends, spread(first), spread(second))


def _joined(ends: NDArray[np.int64], rows: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Merge adjacent pieces with equal coefficients."""
    kept = np.append(np.any(rows[1:] != rows[:-1], axis=1), True)
    return ends[kept], rows[kept]
