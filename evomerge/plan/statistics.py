"""Memory that merges on a CPU need in addition to models and ranks: histograms of magnitudes, or random masks and the norms of the kept elements.

Reads headers only.
"""

import math
from collections.abc import Sequence

from evomerge.plan.model_header import FLOAT_DTYPES, ModelHeader
from evomerge.plan.ranks import RANKED_METHODS

_PRUNE_BY_MAGNITUDE = ("ties", "breadcrumbs", "breadcrumbs_ties")
_MASK_AT_RANDOM = ("dare_linear", "dare_ties", *RANKED_METHODS)

_HISTOGRAM_BYTES = 0.4
"""bytes per element of an expert, the largest observed: in bfloat16 with deltas of about 0.001, counts took 0.18 and magnitudes with lower bits
0.22. If most magnitudes have such bits, as in float32, they are not listed: 0.2 to 0.3"""

LARGE_TENSOR = 1 << 19
"""minimum number of elements for which the norms kept by every density are stored (half a megabyte each, half the size of the smallest such tensor in bfloat16)"""

_NORM_BYTES = 8 * ((1 << 16) + 1)
"""a float64 for each threshold of a mask"""

MOST_KEPT_NORMS = 2048
"""maximum number of stored norm tables, 1 GB; a Llama of 8B with three experts has 678"""


_MASK_BYTES = 1 / 8
"""bytes per element of an expert: a candidate's masks are generated before it is merged. A GPU merges without them"""


def statistics_bytes(methods: tuple[str, ...], experts: Sequence[ModelHeader]) -> int:
    """Approximate number of bytes that merges of `experts` by `methods` need, with `rescale` if they have it."""
    tensors = [tensor for header in experts for tensor in header.tensors.values() if tensor.dtype in FLOAT_DTYPES]
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    n_bytes = 0
    if set(_PRUNE_BY_MAGNITUDE) & set(methods):
        n_bytes += int(_HISTOGRAM_BYTES * sum(sizes))
    if set(_MASK_AT_RANDOM) & set(methods):
        norms = _NORM_BYTES * min(MOST_KEPT_NORMS, sum(size >= LARGE_TENSOR for size in sizes))
        n_bytes += norms + int(_MASK_BYTES * sum(sizes))
    return n_bytes
