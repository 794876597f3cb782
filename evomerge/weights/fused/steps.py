"""The methods that the fused kernels compute, and the conversion of their steps to table rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.plan import MOST_RANKS, PLACE_BYTES, RANKED_METHODS, TensorInput, TensorStep, keeps_ranks, n_columns
from evomerge.weights.fused import directions
from evomerge.weights.fused.blocks import F32
from evomerge.weights.fused.formulas import ARC, FUSION, NEARSWAP, RAM, SCE, STOCK, SUM
from evomerge.weights.fused.kernels import BAND, KEEP_ALL, MAGNITUDE, RANDOM, RANKED
from evomerge.weights.fused.magnitudes import Cut
from evomerge.weights.fused.norms import Norms
from evomerge.weights.fused.statistics import MOST_PLACES, Experts, Pair, Statistics
from evomerge.weights.fused.tables import DTYPE_OF
from evomerge.weights.methods.breadcrumbs import band
from evomerge.weights.methods.della import keep_by_rank
from evomerge.weights.methods.model_stock import shares
from evomerge.weights.methods.nuslerp import angles, share_of_second
from evomerge.weights.methods.ramplus_tl import own_factor
from evomerge.weights.methods.sce import expert_weights, n_selected
from evomerge.weights.methods.slerp import coefficients
from evomerge.weights.philox import DECISIONS, keep_threshold, mask_key
from evomerge.weights.task_vectors import n_largest, weight_sum

_NO_CUT = Cut(0.0, 0)


class Prune(NamedTuple):
    """How an input's delta is pruned; the fields are columns of the input table."""

    mode: int = KEEP_ALL
    low: Cut = _NO_CUT
    key0: int = 0
    key1: int = 0
    keep: int = 0
    top: Cut = _NO_CUT
    step: float = 0.0
    ranks: NDArray[np.uint16] | None = None
    places: NDArray[np.uint32] | None = None

    @property
    def keeps_nothing(self) -> bool:
        """Whether it is a random mask that keeps no elements."""
        return self.mode == RANDOM and self.keep == 0


NO_PRUNE = Prune()

Term = tuple[TensorInput, float, Prune]
"""an input, its weight and its pruning"""


class FusedStep(NamedTuple):
    """A step in the form that the kernels take.

    Attributes:
        inputs: the summed inputs, each with its weight and pruning.
        base: subtracted from the inputs and added at the end; None for plain sums.
        elect_sign, normalize: sign consensus, and division by the agreeing weights.
        divisor, scale: applied to the sum, in this order.
        norms: by position, norms of the inputs whose pruned deltas are rescaled to their original L1 norm.
        pieces: (end, form) of consecutive stretches of flat elements, instead of all of the above.
        precision: the kind to which arithmetic rounds; without a base, only inputs and result are rounded.
        formula, parameter: one of `evomerge.weights.fused.formulas`, which uses base, inputs and their weights, and its parameter.
        numbers: per-row numbers that the formula needs, (numbers, rows).
    """

    inputs: Sequence[Term]
    base: TensorInput | None = None
    elect_sign: bool = False
    normalize: bool = False
    divisor: float = 1.0
    scale: float = 1.0
    norms: Mapping[int, Norms] = MappingProxyType({})
    pieces: tuple[tuple[int, "FusedStep"], ...] = ()
    precision: int = F32
    formula: int = SUM
    parameter: float = 0.0
    numbers: NDArray[np.float32] | None = None


Builder = Callable[[TensorStep, Statistics], FusedStep | None]
"""(step, statistics) -> its fused form; None if the kernels cannot compute it"""


def fuse(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    """The fused form of `step`, with the precision and seed of `statistics`; None if there is none.

    Its cuts are valid once `statistics.find_cuts` has returned.
    """
    precision = statistics.precision
    build = _piecewise if step.pieces else _BUILDERS.get(step.method)
    if build is None:
        return None
    # inner products exist only in float32, and not for a single tensor or empty ones
    if step.method in _DIRECTIONS and (precision != F32 or len(step.inputs) < 2 or step.n_elements == 0):
        return None
    form = build(step, statistics)
    if form is None or precision == F32:
        return form
    pieces = tuple([(end, piece._replace(precision=precision)) for end, piece in form.pieces])
    return form._replace(pieces=pieces, precision=precision)


@lru_cache(maxsize=4096)
def _weight_sum(weights: tuple[float, ...]) -> float:
    """The sum in float32 and in torch's order of summation, as in the references."""
    return torch.tensor(weights, dtype=torch.float32).sum().item()


@lru_cache(maxsize=4096)
def _as_held(weights: tuple[float, ...], precision: int) -> tuple[tuple[float, ...], float]:
    """Weights of task vectors and the divisor of their sum, rounded as in the references."""
    held = torch.tensor(weights, dtype=DTYPE_OF[precision])
    return tuple(held.tolist()), weight_sum(held).item()


def _weights(step: TensorStep) -> tuple[float, ...]:
    return tuple([float(entry.parameters["weight"]) for entry in step.inputs])


def _weighted(step: TensorStep, weights: Iterable[float], prune: Prune = NO_PRUNE) -> list[Term]:
    return [(entry, weight, prune) for entry, weight in zip(step.inputs, weights, strict=True)]


def _unweighted(step: TensorStep) -> list[Term]:
    return [(entry, 1.0, NO_PRUNE) for entry in step.inputs]


def _linear(step: TensorStep, statistics: Statistics) -> FusedStep:
    weights = _weights(step)
    divisor = _weight_sum(weights) if step.parameters["normalize"] else 1.0
    return FusedStep(_weighted(step, weights), divisor=divisor)


def _passthrough(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    if not step.inputs[0].parameters:
        return None  # an integer buffer
    return FusedStep([(step.inputs[0], float(step.inputs[0].parameters["scale"]), NO_PRUNE)])


def _shifted_linear(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    if step.parameters["shift"]:
        return None  # only norms have a shift, and they are small
    return FusedStep(_weighted(step, _weights(step)))


def _slerp(step: TensorStep, statistics: Statistics) -> FusedStep:
    base, other = step.required_base, step.inputs[0]
    (aa, _), (ab, bb) = statistics.gram(None, _pair(base, other)).tolist()
    of_base, of_other = coefficients(float(step.parameters["t"]), aa**0.5, bb**0.5, ab)
    return FusedStep([(base, of_base, NO_PRUNE), (other, of_other, NO_PRUNE)])


def _gram(step: TensorStep, statistics: Statistics) -> NDArray[np.float64]:
    base = None if step.base is None else step.base.key
    return statistics.gram(base, [entry.key for entry in step.inputs])


def _sum(step: TensorStep, factors: Iterable[float] | None) -> FusedStep | None:
    """The sum of the sources (or of the base and their task vectors) with these factors; None without factors."""
    return None if factors is None else FusedStep(_weighted(step, map(float, factors)), step.base)


def _model_stock(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    base = step.required_base
    if step.parameters["filter_wise"] and len(step.shape) > 1:
        numbers = statistics.of_rows(shares, [base, *step.inputs])[None]
        return FusedStep(_unweighted(step), base, formula=STOCK, numbers=numbers)
    t = directions.model_stock(_gram(step, statistics))
    if t is None:
        return None
    share = t / len(step.inputs)
    return FusedStep([(base, 1 - t, NO_PRUNE), *_weighted(step, [share] * len(step.inputs))])


def _nuslerp(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    if not step.parameters["nuslerp_flatten"] and step.shape:
        return None if step.parameters["nuslerp_row_wise"] else _nuslerp_rows(step, statistics)
    return _sum(step, directions.nuslerp(_gram(step, statistics), _weights(step)))


def _nuslerp_rows(step: TensorStep, statistics: Statistics) -> FusedStep:
    t = share_of_second(*_weights(step))
    angle = torch.from_numpy(statistics.of_rows(angles, step.inputs, step.base))
    numbers = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle), torch.sin(angle)])
    numbers[:, angle == 0] = torch.tensor([[1 - t], [t], [1.0]])
    return FusedStep(_unweighted(step), step.base, formula=ARC, numbers=numbers.numpy())


def _multislerp(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    weights = _weights(step)
    total = sum(weights) if step.parameters["normalize_weights"] else 1.0
    relative = [weight / total for weight in weights]
    return _sum(step, directions.multislerp(_gram(step, statistics), relative, float(step.parameters["eps"])))


def _karcher(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    limit, tolerance = int(step.parameters["max_iter"]), float(step.parameters["tol"])
    return _sum(step, directions.karcher(_gram(step, statistics), limit, tolerance))


def _nearswap(step: TensorStep, statistics: Statistics) -> FusedStep:
    return FusedStep(_unweighted(step), step.base, formula=NEARSWAP, parameter=float(step.parameters["t"]))


def _ram(step: TensorStep, statistics: Statistics) -> FusedStep:
    epsilon = float(step.parameters["epsilon"])
    return FusedStep(_unweighted(step), step.base, normalize=True, formula=RAM, parameter=epsilon)


def _ramplus_tl(step: TensorStep, statistics: Statistics) -> FusedStep:
    r, alpha, epsilon = (float(step.parameters[name]) for name in ("r", "alpha", "epsilon"))
    alone, together = statistics.changed_by(_experts(step), epsilon)
    factors = [own_factor(*counts, r, alpha, epsilon) for counts in zip(alone, together, strict=True)]
    return FusedStep(_weighted(step, factors), step.base, formula=RAM, parameter=epsilon)


def _sce(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    if step.n_elements > MOST_PLACES:
        return None
    share, experts, prune = float(step.parameters["select_topk"]), _experts(step), NO_PRUNE
    if share < 1:
        order, limit = statistics.most_varied(experts, lambda n_varied: n_selected(n_varied, share))
        prune = Prune(low=Cut(0.0, limit), places=order)
    sums = statistics.square_sums(experts, prune.places, prune.low.cutoff)
    energy = torch.tensor(sums, dtype=torch.float64) / max(step.n_elements, 1)
    weights = expert_weights(energy.to(DTYPE_OF[statistics.precision])).tolist()
    return FusedStep(_weighted(step, weights, prune), step.base, formula=SCE)


def _arcee_fusion(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    if step.n_elements == 0:
        return FusedStep(_unweighted(step), step.base)  # nothing is computed
    divergence, least = statistics.important(_pair(step.required_base, step.inputs[0]))
    return FusedStep(_unweighted(step), step.base, formula=FUSION, parameter=least, numbers=divergence[None])


def _experts(step: TensorStep) -> Experts:
    """The input tensors of a step, followed by its base."""
    return tuple([entry.key for entry in (*step.inputs, step.required_base)])


def _piecewise(step: TensorStep, statistics: Statistics) -> FusedStep | None:
    """A plain sum for each piece; None if there is noise."""
    if any(piece.noise for piece in step.pieces):
        return None
    return FusedStep([], pieces=tuple((piece.end, FusedStep(_weighted(step, piece.weights))) for piece in step.pieces))


class _TaskVector(NamedTuple):
    """A task vector of a step.

    Attributes:
        step, position, entry: the step, and the position and tensor of the input.
        pair: base and input.
        n_elements: of the tensor.
    """

    step: TensorStep
    position: int
    entry: TensorInput
    pair: Pair
    n_elements: int


PruneBuilder = Callable[[_TaskVector, Statistics], Prune | None]
"""(task vector, statistics) -> how to prune it; None if the kernels cannot"""


def _keep_largest(vector: _TaskVector, statistics: Statistics) -> Prune:
    density, n_elements = float(vector.entry.parameters["density"]), vector.n_elements
    if density >= 1 or n_elements == 0:
        return NO_PRUNE
    return Prune(MAGNITUDE, statistics.cut(vector.pair, n_largest(n_elements, density)))


def _keep_random(vector: _TaskVector, statistics: Statistics) -> Prune:
    keep = keep_threshold(float(vector.entry.parameters["density"]))
    if keep == DECISIONS:
        return NO_PRUNE
    key0, key1 = mask_key(statistics.seed, vector.step.output, vector.position)
    return Prune(RANDOM, key0=key0, key1=key1, keep=keep)


def _keep_ranked(vector: _TaskVector, statistics: Statistics) -> Prune | None:
    parameters, columns = vector.entry.parameters, n_columns(vector.step.shape)
    density, epsilon = float(parameters["density"]), float(parameters["epsilon"])
    if density >= 1 or vector.n_elements == 0:
        return NO_PRUNE
    key0, key1 = mask_key(statistics.seed, vector.step.output, vector.position)
    if density <= 0:
        return Prune(RANDOM, key0=key0, key1=key1, keep=0)
    if columns > MOST_RANKS:
        return None
    keep, rise = keep_by_rank(columns, density, epsilon)
    if keep == DECISIONS:
        return NO_PRUNE
    ranks = statistics.ranks(vector.pair, columns)
    return Prune(RANKED, key0=key0, key1=key1, keep=keep, step=rise, ranks=ranks)


def _keep_band(vector: _TaskVector, statistics: Statistics) -> Prune:
    density, n_elements = float(vector.entry.parameters["density"]), vector.n_elements
    if density >= 1 or n_elements == 0:
        return NO_PRUNE
    dropped, keep = band(n_elements, density, float(vector.entry.parameters["gamma"]))
    low, top = statistics.cut(vector.pair, dropped + keep), statistics.cut(vector.pair, dropped)
    return Prune(BAND, low, top=top)


def _norms(pair: Pair, prune: Prune, statistics: Statistics) -> Norms:
    kept = None
    if prune.mode in (RANDOM, RANKED):
        kept = statistics.kept_l1(pair, (prune.key0, prune.key1), prune.keep, prune.ranks, prune.step)
    return Norms(statistics.l1(pair), kept)


def _pair(base: TensorInput, other: TensorInput) -> Pair:
    return base.key, other.key


def _task_arithmetic(step: TensorStep, statistics: Statistics) -> FusedStep:
    weights, divisor = _as_held(_weights(step), statistics.precision)
    if not step.parameters["normalize"]:
        divisor = 1.0
    return FusedStep(
        _weighted(step, weights), step.required_base, divisor=divisor, scale=float(step.parameters["lambda"])
    )


def _task_vectors(prune: PruneBuilder, *, elect_sign: bool) -> Builder:
    def build(step: TensorStep, statistics: Statistics) -> FusedStep | None:
        weights, divisor = _as_held(_weights(step), statistics.precision)
        base, n_elements, is_rescaled = step.required_base, step.n_elements, step.parameters.get("rescale", False)
        base_key = base.key
        inputs: list[Term] = []
        norms: dict[int, Norms] = {}
        for position, (entry, weight) in enumerate(zip(step.inputs, weights, strict=True)):
            vector = _TaskVector(step, position, entry, (base_key, entry.key), n_elements)
            pruned = prune(vector, statistics)
            if pruned is None:
                return None
            inputs.append((entry, weight, pruned))
            if is_rescaled and pruned.mode != KEEP_ALL and not pruned.keeps_nothing:
                norms[position] = _norms(vector.pair, pruned, statistics)
        normalize = bool(step.parameters["normalize"])
        if elect_sign or not normalize:
            divisor = 1.0
        scale = float(step.parameters["lambda"])
        return FusedStep(inputs, base, elect_sign, normalize and elect_sign, divisor, scale, norms)

    return build


_SUMS: Mapping[str, Builder] = {
    "linear": _linear,
    "passthrough": _passthrough,
    "shifted_linear": _shifted_linear,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _task_vectors(_keep_largest, elect_sign=True),
    "dare_ties": _task_vectors(_keep_random, elect_sign=True),
    "dare_linear": _task_vectors(_keep_random, elect_sign=False),
    "della": _task_vectors(_keep_ranked, elect_sign=True),
    "della_linear": _task_vectors(_keep_ranked, elect_sign=False),
    "breadcrumbs": _task_vectors(_keep_band, elect_sign=False),
    "breadcrumbs_ties": _task_vectors(_keep_band, elect_sign=True),
}
"""methods whose forms are sums, which both CPU and GPU kernels compute"""

_DIRECTIONS: Mapping[str, Builder] = {
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _karcher,
    "model_stock": _model_stock,
}
"""methods of `evomerge.weights.fused.directions`, which may return None because of rounding errors; sums unless computed by rows"""

_FORMULAS: Mapping[str, Builder] = {
    "nearswap": _nearswap,
    "ram": _ram,
    "ramplus_tl": _ramplus_tl,
    "sce": _sce,
    "arcee_fusion": _arcee_fusion,
}
"""methods with their own formulas, which only the CPU kernels compute"""

_BUILDERS: Mapping[str, Builder] = {**_SUMS, **_DIRECTIONS, **_FORMULAS}

CPU_ONLY = tuple(_FORMULAS)

_SCORE_BYTES = 8
"""bytes per element: an importance as computed, and its copy for finding quartiles"""


def costs_a_pass(step: TensorStep) -> bool:
    """Whether every new value of its parameters needs a pass over the tensors before the merge."""
    return step.method == "sce" and keeps_ranks(step)


def scratch_bytes(step: TensorStep) -> int:
    """Bytes per element that `fuse` needs to prepare the step, in addition to sources and result."""
    return PLACE_BYTES if costs_a_pass(step) else _SCORE_BYTES if step.method == "arcee_fusion" else 0


def may_need_reference(step: TensorStep) -> bool:
    """Whether `fuse` may return None for the step, which may depend on the values of its tensors."""
    ranked = step.method in RANKED_METHODS and n_columns(step.shape) > MOST_RANKS
    too_large = step.method == "sce" and step.n_elements > MOST_PLACES
    return step.method not in _BUILDERS or step.method in _DIRECTIONS or ranked or too_large


def fused_methods() -> tuple[str, ...]:
    """Methods that have a fused form."""
    return tuple(_BUILDERS)
