"""piecewise: sum w_i theta_i with weights that change along the flattened tensor, plus seeded noise (M2N2, arXiv 2508.16204).

Every piece is a `linear` merge without normalisation: float32, in the order of the sources.
"""

import torch

from evomerge.weights.noise import normal_noise
from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """The pieces side by side."""
    first = group.tensors[0]
    total = torch.zeros(first.numel(), dtype=torch.float32, device=first.device)
    flat = [tensor.reshape(-1) for tensor in group.tensors]
    start = 0
    for piece in group.pieces:
        part = total[start : piece.end]
        for tensor, weight in zip(flat, torch.tensor(piece.weights, dtype=torch.float32), strict=True):
            part += tensor[start : piece.end].float() * weight
        for seed, scale in piece.noise:
            noise = normal_noise(seed, group.output, start, piece.end - start).to(first.device)
            part += noise * torch.tensor(scale, dtype=torch.float32)
        start = piece.end
    return total.reshape(first.shape).to(first.dtype)
