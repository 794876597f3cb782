"""Methods based on directions: the result is a sum of the sources, with factors that depend only on their inner products.

Every function takes the Gram matrix of the sources (of their task vectors if there is a base), (n, n) in float64, and returns a factor
for each of them, or None if rounding errors would dominate (directions that cancel, angles or norms near 0): then the reference
implementation is used.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evomerge.weights.methods.nuslerp import PARALLEL, share_of_second

Gram = NDArray[np.float64]

_ILL = 1e-3
"""a denominator, a norm of a mean of unit vectors, or an angle below this is too small to divide by or to compare"""

_CANCELLED = 1e-2
"""if the norm of a weighted sum of unit vectors is below this fraction of the sum of weights, it has lost too much float32 precision"""

_TINY_NORM = 1e-6

_ARRIVED = 1e-12
"""a step below this has no effect in float32, and cannot be divided by; karcher's own tolerance may be 0"""


def model_stock(gram: Gram) -> float | None:
    """The weight t of the experts' average; the base has 1 - t (formula in `evomerge.weights.methods.model_stock`)."""
    norms = np.sqrt(np.diag(gram))
    if norms.min() < _TINY_NORM:
        return None
    n_sources = len(gram)
    above = np.triu_indices(n_sources, 1)
    cosine = float(np.clip(gram / np.maximum(np.outer(norms, norms), _TINY_NORM), -1, 1)[above].mean())
    denominator = 1 + (n_sources - 1) * cosine
    return None if abs(denominator) < _ILL else n_sources * cosine / denominator


def nuslerp(gram: Gram, weights: Sequence[float]) -> tuple[float, float] | None:
    """Factors of the two sources, treated as flat vectors."""
    t = share_of_second(*weights)
    norms = np.sqrt(np.diag(gram))
    if norms.min() < _TINY_NORM:
        return None
    cosine = float(gram[0, 1] / (norms[0] * norms[1]))
    if cosine < _ILL - 1:
        return None
    if 1 - cosine**2 <= PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def multislerp(gram: Gram, weights: Sequence[float], eps: float) -> NDArray[np.float64] | None:
    """Factors of two or more sources; `weights` are already normalised if required. The tangent part of the formula is 0 at the normalised mean."""
    norms = np.sqrt(np.diag(gram))
    if norms.min() < _TINY_NORM:
        return None
    factors = np.array(weights) / (norms + eps)
    mean_norm = _norm(factors, gram)
    if mean_norm < max(_CANCELLED * float(np.abs(weights).sum()), 2 * eps):
        return None
    return factors / mean_norm * math.cos(eps) * float(norms @ np.array(weights))


def karcher(gram: Gram, n_iterations: int, tolerance: float) -> NDArray[np.float64] | None:
    """Factors of two or more sources."""
    norms = np.sqrt(np.diag(gram))
    if norms.min() <= max(tolerance, _TINY_NORM):
        return None
    units = gram / np.outer(norms, norms)
    n_sources = len(gram)
    mean = np.full(n_sources, 1.0 / n_sources)
    for iteration in range(n_iterations + 1):
        length = _norm(mean, units)
        if length < max(_ILL, 2 * tolerance):
            return None
        mean = mean / length
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        if angles.min() < max(_ILL, 2 * tolerance) or cosines.min() < _ILL - 1:
            return None
        if iteration == n_iterations:
            break
        stretch = angles / np.sin(angles) / n_sources
        tangent = stretch - float(stretch @ cosines) * mean
        step = _norm(tangent, units)
        if step < max(tolerance, _ARRIVED):
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
    return np.asarray(mean / norms * norms.mean())


def _norm(factors: NDArray[np.float64], gram: Gram) -> float:
    """Norm of the sum with these factors."""
    return math.sqrt(max(float(factors @ gram @ factors), 0.0))
