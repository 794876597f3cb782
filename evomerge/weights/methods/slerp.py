"""slerp: spherical interpolation between two tensors as flat vectors, t = 0 the base and t = 1 the other (Shoemake, SIGGRAPH 1985).

The angle is that of the unit vectors, but the interpolated vectors are not normalised; nearly parallel ones are interpolated
linearly. Arithmetic is in float32 at least, as in mergekit.
"""

import math

import torch

from evomerge.weights.tensor_group import TensorGroup

_PARALLEL = 0.9995
_TINY_NORM = 1e-8


def coefficients(t: float, norm_a: float, norm_b: float, product: float) -> tuple[float, float]:
    """The factors of both vectors.

    Args:
        t: position in [0, 1].
        norm_a, norm_b: L2 norms.
        product: inner product of the two vectors.
    """
    scale = (norm_a if norm_a > _TINY_NORM else 1.0) * (norm_b if norm_b > _TINY_NORM else 1.0)
    cosine = min(max(product / scale, -1.0), 1.0)
    if abs(cosine) > _PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def merge(group: TensorGroup) -> torch.Tensor:
    """The point at `t` on the arc from the base to the source."""
    a, b = group.required_base().float(), group.tensors[0].float()
    flat_a, flat_b = a.reshape(-1).double(), b.reshape(-1).double()
    of_a, of_b = coefficients(
        float(group.shared["t"]), flat_a.norm().item(), flat_b.norm().item(), torch.dot(flat_a, flat_b).item()
    )
    return (a * of_a + b * of_b).to(group.tensors[0].dtype)
