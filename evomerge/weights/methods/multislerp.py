"""multislerp: barycentre of several tensors on a hypersphere (goddard.blog, "multislerp").

u_i = x_i / (|x_i| + eps);  mu = normalised sum w u;  v = sum w (u - <u, mu> mu);  k = |v| + eps;
(mu cos k + v sin(k) / k) sum w |x|.  With a base, x are the task vectors. A single source is returned unchanged.
"""

import torch

from evomerge.core import RecipeError
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The weighted barycentre.

    Raises:
        RecipeError: the weighted unit vectors of three or more sources cancel.
    """
    if len(group.tensors) == 1:
        return group.tensors[0].clone()
    eps = float(group.shared["eps"])
    vectors = torch.stack([tensor if group.base is None else tensor - group.base for tensor in group.tensors])
    flat = vectors.reshape(len(group.tensors), -1)
    weights = torch.tensor(group.values("weight"), dtype=flat.dtype, device=flat.device)
    if group.shared["normalize_weights"]:
        weights = weights / weights.sum()
    norms = flat.norm(dim=-1, keepdim=True)
    units = flat / (norms + eps)
    column = weights.reshape(-1, 1)
    mean = (units * column).sum(0)
    mean_norm = mean.norm()
    if mean_norm < eps:
        if len(group.tensors) > 2:
            raise RecipeError(
                f"multislerp of {group.output!r}: the weighted directions of the sources cancel; change the weights"
            )
        merged = (flat * column).sum(0)
    else:
        mean = mean / mean_norm
        tangents = units - (units * mean).sum(-1, keepdim=True) * mean
        tangent = (tangents * column).sum(0)
        length = tangent.norm() + eps
        merged = (mean * torch.cos(length) + tangent * (torch.sin(length) / length)) * (
            norms.reshape(-1) * weights
        ).sum()
    merged = merged.reshape(group.tensors[0].shape)
    return merged if group.base is None else group.base + merged
