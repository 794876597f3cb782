"""Applies a LoRA adapter to one tensor of its model. The result equals that of PEFT's `merge_and_unload`, rounded once."""

import torch

from evomerge.plan import LoraUpdate


def apply_update(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor | None, update: LoraUpdate
) -> torch.Tensor:
    """`weight` with the adapter applied, computed in float32 and rounded once to its own dtype.

    Args:
        weight: (out, in), or (in, out) if `update.transposed`.
        a, b: factors of shapes (rank, in) and (out, rank).
        magnitude: norms of the result's rows (DoRA), (out,); None without DoRA.
        update: the scale, and how `weight` is stored.
    """
    delta = b.float() @ a.float()
    changed = weight.float() + update.scale * (delta.T if update.transposed else delta)
    if magnitude is not None:
        changed *= (magnitude.float() / changed.norm(dim=1)).unsqueeze(1)
    return changed.to(weight.dtype)
