"""nuslerp: spherical interpolation between two models by relative weight, t = w_2 / (w_1 + w_2) (mergekit's NuSLERP).

Whole tensors as vectors (`nuslerp_flatten`), or each row (over the last dimension) or, with `nuslerp_row_wise`, each column
(over the first). With a base the two task vectors are interpolated and added to it.
"""

import torch

from evomerge.weights.tensor_group import TensorGroup

_TINY_NORM = 1e-7
_PARALLEL = 1e-16
"""below this squared sine two vectors count as parallel"""


def _interpolate(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Along the last dimension."""
    unit_a = a / a.norm(dim=-1, keepdim=True).clamp(min=_TINY_NORM)
    unit_b = b / b.norm(dim=-1, keepdim=True).clamp(min=_TINY_NORM)
    cosine = (unit_a * unit_b).sum(dim=-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cosine.square() <= _PARALLEL
    angle = torch.acos(torch.where(parallel, torch.zeros_like(cosine), cosine))
    arc = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(parallel, (1 - t) * a + t * b, arc)


def merge(group: TensorGroup) -> torch.Tensor:
    """The point between the two sources."""
    first, second = group.values("weight")
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    a, b = group.tensors
    if group.base is not None:
        a, b = a - group.base, b - group.base
    shape = a.shape
    if group.shared["nuslerp_flatten"] or not shape:
        merged = _interpolate(a.reshape(-1), b.reshape(-1), t).reshape(shape)
    elif group.shared["nuslerp_row_wise"]:
        merged = _interpolate(a.transpose(0, -1), b.transpose(0, -1), t).transpose(0, -1)
    else:
        merged = _interpolate(a, b, t)
    return merged if group.base is None else group.base + merged
