"""nuslerp: spherical interpolation between two models by relative weight, t = w_2 / (w_1 + w_2) (mergekit's NuSLERP).

Interpolates whole tensors as vectors (`nuslerp_flatten`), or each row (over the last dimension) or, with `nuslerp_row_wise`, each column
(over the first). With a base, the two task vectors are interpolated and added to it.
"""

import torch

from evomerge.weights.row_blocks import by_rows
from evomerge.weights.tensor_group import TensorGroup

_TINY_NORM = 1e-7
PARALLEL = 1e-16
"""two vectors count as parallel if the squared sine of their angle is at most this"""


def merge(group: TensorGroup) -> torch.Tensor:
    """The point between the two sources."""
    t = share_of_second(*group.values("weight"))
    a, b = group.tensors
    if group.base is not None:
        a, b = a - group.base, b - group.base
    shape = a.shape
    if group.shared["nuslerp_flatten"] or not shape:
        a, b = a.reshape(1, -1), b.reshape(1, -1)
        merged = _interpolate(a, b, angles(a, b), t).reshape(shape)
    elif group.shared["nuslerp_row_wise"]:
        a, b = a.transpose(0, -1), b.transpose(0, -1)
        merged = _interpolate(a, b, angles(a, b), t).transpose(0, -1)
    else:
        angle = by_rows(angles, [a, b], a.dtype).reshape(*shape[:-1], 1) if a.numel() else a
        merged = _interpolate(a, b, angle, t)
    return merged if group.base is None else group.base + merged


def share_of_second(first: float, second: float) -> float:
    """t for two weights."""
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angles between vectors along the last dimension, whose size becomes 1; 0 for parallel and opposite vectors."""
    unit_a = a / a.norm(dim=-1, keepdim=True).clamp(min=_TINY_NORM)
    unit_b = b / b.norm(dim=-1, keepdim=True).clamp(min=_TINY_NORM)
    cosine = (unit_a * unit_b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cosine.square() <= PARALLEL
    return torch.where(parallel, torch.zeros_like(cosine), torch.acos(cosine))


def _interpolate(a: torch.Tensor, b: torch.Tensor, angle: torch.Tensor, t: float) -> torch.Tensor:
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(angle == 0, (1 - t) * a + t * b, arc)
