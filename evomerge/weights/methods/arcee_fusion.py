"""arcee_fusion: take over only the expert's most important changes (arcee.ai, Arcee Fusion).

importance = |d| * row-wise KL(softmax(expert) || softmax(base)); entries from median + 1.5 (q3 - q1) on are taken.
Quantiles are exact (entry int(q (n - 1)) of the sorted scores); mergekit estimates those of more than 10^6 entries.
"""

import torch

from evomerge.weights.tensor_group import TensorGroup

_TINY = 1e-8


def merge(group: TensorGroup) -> torch.Tensor:
    """The base with the important entries replaced by the expert's."""
    base, expert = group.required_base(), group.tensors[0]
    if base.numel() == 0:
        return base.clone()
    rows = (expert, base) if base.dim() else (expert.reshape(1), base.reshape(1))
    p, q = (torch.softmax(tensor, dim=-1) + _TINY for tensor in rows)
    divergence = (p * torch.log(p / q)).sum(dim=-1, keepdim=True)
    importance = (rows[0] - rows[1]).abs() * divergence
    scores = torch.sort(importance.reshape(-1)).values
    last = scores.numel() - 1
    q1, median, q3 = (scores[int(share * last)] for share in (0.25, 0.5, 0.75))
    taken = (importance >= median + 1.5 * (q3 - q1)).reshape(base.shape).to(base.dtype)
    return base + (expert - base) * taken
