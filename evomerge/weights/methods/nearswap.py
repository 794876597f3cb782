"""nearswap: the closer two entries are, the more the expert's replaces the base's (QuartetAnemoi-70B-t0.0001).

w = clamp(t / max(|a - b|, 1e-6), 0, 1);  w b + (1 - w) a.
"""

import torch

from evomerge.weights.tensor_group import TensorGroup


def merge(group: TensorGroup) -> torch.Tensor:
    """Entry-wise interpolation from base to expert."""
    base, expert = group.required_base(), group.tensors[0]
    distance = (base - expert).abs().clamp(min=1e-6)
    # the reciprocal of 1e-6 is infinite in float16, and gives NaN if t = 0
    share = (float(group.shared["t"]) / distance).nan_to_num(nan=0.0).clamp(min=0, max=1)
    return share * expert + (1 - share) * base
