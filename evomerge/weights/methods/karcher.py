"""karcher: the Karcher (Riemannian) mean of the tensors' directions with equal weights, times their mean norm (arXiv 2603.04972).

mu = normalised mean; repeat T = sum alpha (th / sin th) (u - <u, mu> mu) with th = angle(u, mu), skipping th < tol;
stop when |T| < tol; mu = cos|T| mu + sin|T| T / |T|. Tensors with a norm of at most tol have no direction.
"""

import torch

from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The mean direction, scaled by the mean norm of all sources."""
    if len(group.tensors) == 1:
        return group.tensors[0].clone()
    dtype = group.tensors[0].dtype
    tolerance = float(group.shared["tol"])
    flat = [tensor.reshape(-1).float() for tensor in group.tensors]
    norms = [vector.norm() for vector in flat]
    units = [vector / norm for vector, norm in zip(flat, norms, strict=True) if norm > tolerance]
    if not units:
        return torch.zeros_like(group.tensors[0])
    mean = _normalised(torch.stack(units).mean(dim=0), units[0], tolerance)
    for _ in range(int(group.shared["max_iter"])):
        tangent = _tangent(mean, units, tolerance)
        length = tangent.norm()
        if length < tolerance:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * (tangent / length)
        mean = _normalised(mean, mean, tolerance)
    scale = torch.stack(norms).mean()
    return (scale * mean).to(dtype).reshape(group.tensors[0].shape)


def _tangent(mean: torch.Tensor, units: list[torch.Tensor], tolerance: float) -> torch.Tensor:
    """Mean of the logarithms of `units` at `mean`."""
    tangent = torch.zeros_like(mean)
    for unit in units:
        cosine = torch.dot(mean, unit).clamp(-1.0, 1.0)
        angle = torch.arccos(cosine)
        if angle >= tolerance:
            tangent += (angle / torch.sin(angle)) * (unit - cosine * mean) / len(units)
    return tangent


def _normalised(vector: torch.Tensor, otherwise: torch.Tensor, tolerance: float) -> torch.Tensor:
    norm = vector.norm()
    return vector / norm if norm > tolerance else otherwise
