"""arcee_fusion: take over only the expert's most important changes (arcee.ai, Arcee Fusion).

importance = |d| * row-wise KL(softmax(expert) || softmax(base)); entries of at least median + 1.5 (q3 - q1) are taken.
Quantiles are exact (entry int(q (n - 1)) of the sorted scores); mergekit estimates them for more than 10^6 entries.
"""

import torch

from evomerge.weights.row_blocks import blocks_of_rows
from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-8


def merge(group: TensorGroup) -> torch.Tensor:
    """The base with the important entries replaced by the expert's."""
    base, expert = group.required_base(), group.tensors[0]
    if base.numel() == 0:
        return base.clone()
    divergence, least = important(base, expert, base.dtype)
    rows = (base - expert).abs().reshape(len(divergence), -1)
    taken = (rows * divergence.unsqueeze(-1) >= least).reshape(base.shape)
    return base + (expert - base).float() * taken  # float32 even in lower precision, because of mergekit's float32 mask


def important(base: torch.Tensor, expert: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of every row (rows,), by which |d| is multiplied, and the smallest product () that is taken; both of `dtype`."""
    divergences: list[torch.Tensor] = []
    scores = torch.empty(base.numel(), dtype=dtype, device=base.device)
    done = 0
    for origin, changed in blocks_of_rows([tensor.reshape(tensor.shape or (1,)) for tensor in (base, expert)], dtype):
        p, q = (torch.softmax(rows, dim=-1) + _TINY for rows in (changed, origin))
        divergences.append((p * torch.log(p / q)).sum(dim=-1))
        torch.mul(
            (changed - origin).abs(),
            divergences[-1].unsqueeze(-1),
            out=scores[done : done + origin.numel()].view(origin.shape),
        )
        done += origin.numel()
    places = [int(share * (done - 1)) for share in (0.25, 0.5, 0.75)]
    held = scores.float().cpu().numpy()
    held.partition(places)
    q1, median, q3 = torch.from_numpy(held[places]).to(base.device, dtype)
    return torch.cat(divergences), median + 1.5 * (q3 - q1)
