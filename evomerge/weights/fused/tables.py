"""The tables that drive the compiled kernels: one row per output tensor, per input, and per chunk of work."""

import numpy as np
import torch

from evomerge.weights.fused.blocks import BF16, F16, F32, ZEROS

OUTPUT = np.dtype(
    [
        ("base_address", np.int64),
        ("n_elements", np.int64),
        ("first_input", np.int32),
        ("n_inputs", np.int32),
        ("out_kind", np.int32),
        ("base_kind", np.int32),
        ("divisor", np.float32),
        ("scale", np.float32),
        ("has_base", np.bool_),
        ("elect_sign", np.bool_),
        ("normalize", np.bool_),
        ("precision", np.int32),  # the kind to which arithmetic rounds
        ("formula", np.int32),
        ("parameter", np.float32),
        ("number_address", np.int64),  # a float32 per row, in consecutive arrays
        ("n_numbers", np.int32),  # number of arrays
        ("n_columns", np.int64),  # of the rows
    ],
    align=True,
)

INPUT = np.dtype(
    [
        ("address", np.int64),
        ("cutoff", np.int64),
        ("top_cutoff", np.int64),
        ("mask_address", np.int64),  # a bit per element; see `lanes.store_truths`
        ("rank_address", np.int64),  # uint16 (sce: uint32) per element, padded to whole windows
        ("kind", np.int32),
        ("mode", np.int32),
        ("key0", np.uint32),
        ("key1", np.uint32),
        ("keep", np.uint32),
        ("weight", np.float32),
        ("threshold", np.float32),
        ("top_threshold", np.float32),
        ("step", np.float32),
        ("scale", np.float32),
        ("measure", np.bool_),
        ("grid", np.float64),  # of norms; see `norms.addend_grid`
    ],
    align=True,
)

CHUNK = np.dtype(
    [
        ("start", np.int64),
        ("end", np.int64),
        ("out_address", np.int64),  # where the tensor's flat element 0 would be
        ("l1", np.float64),
        ("output", np.int32),
        ("input", np.int32),
        ("largest", np.uint32),
    ],
    align=True,
)

CHUNK_ELEMENTS = 1 << 18
"""elements of one chunk: small enough to distribute over threads, large enough that handing it out costs nothing"""

KINDS = {torch.bfloat16: BF16, torch.float32: F32, torch.float16: F16}
"""dtypes that the kernels read, and to which their arithmetic can round"""

DTYPE_OF = {kind: dtype for dtype, kind in KINDS.items()}


Delta = tuple[int, int, int, int, int]
"""a difference of two tensors for compiled code: address and kind of the base and of the other tensor, and the kind to which both and the difference are rounded"""


def delta_of(base: torch.Tensor | None, tensor: torch.Tensor, precision: int) -> Delta:
    """`tensor - base`, or `tensor` alone; both must be contiguous, on the CPU, with a dtype in `KINDS`."""
    origin = (0, ZEROS) if base is None else (base.data_ptr(), KINDS[base.dtype])
    return *origin, tensor.data_ptr(), KINDS[tensor.dtype], precision


def kind_of(tensor: torch.Tensor) -> int | None:
    """The kind with which the kernels read `tensor`; None if they cannot."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return None
    return KINDS.get(tensor.dtype)


def chunks_of(ranges: np.ndarray) -> np.ndarray:
    """Chunks that cover `ranges`, a structured array with output, input, start, end and out_address, in order.

    Chunk edges are multiples of `CHUNK_ELEMENTS`, so a partial sum per chunk does not depend on the number of threads.
    """
    first = ranges["start"] // CHUNK_ELEMENTS
    n_chunks = -(-ranges["end"] // CHUNK_ELEMENTS) - first
    rows = np.repeat(np.arange(len(ranges)), n_chunks)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks) + first[rows]
    chunks = np.zeros(len(rows), CHUNK)
    for name in ("output", "input", "out_address"):
        chunks[name] = ranges[name][rows]
    chunks["start"] = np.maximum(number * CHUNK_ELEMENTS, ranges["start"][rows])
    chunks["end"] = np.minimum((number + 1) * CHUNK_ELEMENTS, ranges["end"][rows])
    return chunks
