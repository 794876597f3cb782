"""`TritonBatch`: computes many output tensors on a GPU, each into memory provided by the caller, with one launch per variant.

The counterpart of `evomerge.weights.fused.batch.FusedBatch` on the CPU, with bit-identical results. Statistics (thresholds of magnitudes)
come from there; knows nothing of methods.
"""

import logging
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from triton.errors import TritonError

from evomerge.plan import TensorStep
from evomerge.weights.fused.batch import Destination, Part, parts_of
from evomerge.weights.fused.blocks import OVERFLOW_BITS
from evomerge.weights.fused.formulas import SUM
from evomerge.weights.fused.kernels import RANDOM, RANKED
from evomerge.weights.fused.norms import Norms, scales
from evomerge.weights.fused.steps import FusedStep
from evomerge.weights.fused.tables import KINDS
from evomerge.weights.pool import WeightPool
from evomerge.weights.triton.kernels import BLOCK, N_WARPS, answer_one, merge_chunks, pruned_l1_chunks
from evomerge.weights.triton.resident import Item, ResidentSources, Source
from evomerge.weights.triton.tables import Row, Tables, Variant, chunks_of, has_groups, row_of, tables_of, variant_of
from evomerge.weights.windows import Window

logger = logging.getLogger(__name__)

MAX_INPUTS = 16
"""maximum number of inputs of a step, over which kernels are unrolled"""

_UNSCALED = Norms(0.0, 0.0)


class _Launched(NamedTuple):
    """One launch: its parts, its chunks (row, ...), and the bits of the largest magnitude of each chunk."""

    parts: Sequence[Part]
    variant: Variant
    chunks: torch.Tensor
    largest: torch.Tensor


class TritonBatch:
    """Computes steps with the kernels of this package.

    Args:
        pool: the sources, on the CPU; copied to `device` on first use.
        device: a GPU, or the CPU with Triton's interpreter.
        most_bytes: maximum size of the copies of the sources on the device; None = the free memory.

    Attributes:
        device: device of the destinations.
        writes: supported dtypes of destinations.
        n_groups: recommended number of groups for `run`, because preparing a candidate on the CPU takes about as long as computing it here.
    """

    writes = tuple(KINDS)
    n_groups = 6

    def __init__(self, pool: WeightPool, device: torch.device, most_bytes: float | None = None) -> None:
        self.device = device
        self._resident = ResidentSources(pool, device, most_bytes)
        self._no_room = False
        self._reasons: set[str] = set()

    def covering(self, form: FusedStep, window: Window, entire: Window) -> Window:
        """The window that must be computed to obtain `window` of a tensor: `entire` (all of it) if an edge is inside a group of a random mask."""
        if has_groups(window):
            return window
        return entire if any(prune.mode in (RANDOM, RANKED) for _, _, prune in form.inputs) else window

    def ready(self, wanted: Iterable[tuple[FusedStep, Window]]) -> bool:
        """Whether these parts of steps can be computed, after copying their sources to the GPU if there is room.

        If not, the reason is logged once.
        """
        pieces = [(piece, window) for form, window in wanted for piece in _summed(form)]
        most = max([len(piece.inputs) for piece, _ in pieces], default=0)
        if most > MAX_INPUTS:
            return self._declined(f"{most} models are merged, but the GPU's kernels take at most {MAX_INPUTS}")
        if {piece.formula for piece, _ in pieces} - {SUM}:
            return self._declined("the recipe's method, with these settings, has kernels for the CPU only")
        held = [
            (source, window)
            for piece, window in pieces
            if not self._resident.knows(piece, window)
            for source in _read(piece)
        ]
        self._no_room = self._no_room or not self._hold(held)
        return not self._no_room

    def _hold(self, wanted: list[Item]) -> bool:
        missing = self._resident.missing_bytes(wanted)
        if not missing:  # nothing to copy, whatever memory is free now
            return True
        free = self._resident.free_bytes()
        if missing <= free and self._resident.hold(wanted):
            return True
        self._resident.drop()
        return self._declined(
            f"the sources need {missing / 1e9:.1f} GB there, but {free / 1e9:.1f} GB are free; leave more memory for them "
            "(lower engine.options.gpu_memory_utilization) or use fewer models"
        )

    def _declined(self, reason: str) -> bool:
        if reason not in self._reasons:
            logger.warning("merging on the CPU and copying to %s: %s", self.device, reason)
        self._reasons.add(reason)
        return False

    def run(self, groups: Iterable[Sequence[Destination]]) -> TensorStep | None:
        """Compute all destinations and wait for them; while one group is computed, `groups` may prepare the next.

        Returns:
            A step with a result outside the range of its dtype, if any.
        """
        launched: list[_Launched] = []
        for destinations in groups:
            with _on(self.device):
                launched += self._start(destinations)
        for each in launched:
            bad = each.chunks[each.largest >= OVERFLOW_BITS[each.variant.OUT], 0]
            if len(bad):
                return each.parts[int(bad.min())].destination.step
        return None

    def _start(self, destinations: Sequence[Destination]) -> list[_Launched]:
        """Start to compute `destinations`, one launch per variant."""
        variants: dict[Variant, list[Row]] = {}
        for destination in destinations:
            for part in parts_of(destination):
                row = row_of(part, self._resident)
                variants.setdefault(variant_of(row), []).append(row)
        return [self._launch(rows, variant) for variant, rows in variants.items()]

    def _launch(self, rows: list[Row], variant: Variant) -> _Launched:
        tables, parts = tables_of(rows, variant), [row.part for row in rows]
        if variant.RESCALE:
            self._rescale(parts, variant, tables)
        chunks = chunks_of(tables.ranges, self.device)
        largest = torch.empty(len(chunks), dtype=torch.int32, device=self.device)
        if len(chunks):
            _kernel(merge_chunks, len(chunks))(
                chunks,
                *self._on_device(tables),
                largest,
                **variant._asdict(),
                BLOCK=BLOCK,
                **merge_options(variant.K, variant.KINDS, variant.BASE, variant.MODE),
            )
        return _Launched(parts, variant, chunks, largest)

    def _rescale(self, parts: list[Part], variant: Variant, tables: Tables) -> None:
        """Set the scale of every input whose pruned delta must have the L1 norm of the whole delta."""
        norms = [[part.form.norms.get(k, _UNSCALED) for k in range(variant.K)] for part in parts]
        whole = np.array([[pair.whole for pair in row] for row in norms])
        known = np.array([[np.nan if pair.kept is None else pair.kept for pair in row] for row in norms])
        unknown = np.isnan(known)
        if unknown.any():
            known = np.where(unknown, self._measured(parts, unknown.any(axis=1), variant, tables), known)
        tables.rescale(scales(whole.reshape(-1), known.reshape(-1), variant.PRECISION).reshape(whole.shape))

    def _measured(
        self, parts: list[Part], wanted: NDArray[np.bool_], variant: Variant, tables: Tables
    ) -> NDArray[np.float64]:
        """(rows, inputs): L1 norms of pruned deltas for the rows `wanted`, whose windows are whole tensors; 0 for the others."""
        sizes = [part.destination.step.n_elements if row else 0 for part, row in zip(parts, wanted, strict=True)]
        chunks = chunks_of(tuple([(0, size) for size in sizes]), self.device)
        partial = torch.zeros(len(chunks), variant.K, dtype=torch.float64, device=self.device)
        if len(chunks):
            _kernel(pruned_l1_chunks, len(chunks))(
                chunks,
                *self._on_device(tables),
                partial,
                K=variant.K,
                KINDS=variant.KINDS,
                BASE=variant.BASE,
                MODE=variant.MODE,
                PRECISION=variant.PRECISION,
                BLOCK=BLOCK,
                **_OPTIONS,
            )
        sums, rows = partial.cpu().numpy(), chunks[:, 0].cpu().numpy()
        return np.stack([np.bincount(rows, column, len(parts)) for column in sums.T], axis=1)

    def _on_device(self, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy of the tables, made without waiting for earlier launches."""
        integers, floats = torch.from_numpy(tables.integers), torch.from_numpy(tables.floats)
        return integers.to(self.device, non_blocking=True), floats.to(self.device, non_blocking=True)


def obstacle(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`, found by running one; None if they can.

    triton builds launchers and compiles kernels at the first launch. Without a C compiler, Python's headers, a cache folder or support for
    this GPU it would fail there, in the middle of a search.
    """
    try:
        with _on(device):
            answer = torch.tensor([0], dtype=torch.int32, device=device)
            _kernel(answer_one, 1)(answer)
            if answer.item() == 1:
                return None
    except _LAUNCH_ERRORS as error:
        return f"triton's kernels do not run there: {type(error).__name__}: {error}"
    return "triton's kernels run there but have no effect"


_LAUNCH_ERRORS = (AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, TritonError)
"""exceptions of triton if it cannot build, compile or launch"""


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which kernels are launched on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# fused multiply-adds, with a single rounding, would differ from the CPU's results
_OPTIONS: dict[str, Any] = {"num_warps": N_WARPS, "enable_fp_fusion": False}

_REGISTERS = ((3, 64), (5, 80), (8, 128))
"""(maximum number of inputs, counting two more for ranks and two for a dtype other than bfloat16; number of registers per thread that suffices)"""


def merge_options(n_inputs: int, kinds: int, base: int, mode: int) -> dict[str, Any]:
    """Options of a launch of `merge_chunks` with these constants.

    The compiler would use up to 128 registers for three inputs. With 64, a Hopper multiprocessor runs four programs at a time instead of two,
    so that more loads are in flight, for up to 4% more instructions (counted as in `benchmarks/merge_gpu_instructions.py`).
    """
    size = n_inputs + 2 * (mode == RANKED) + 2 * (kinds != 0 or base > 0)
    return _OPTIONS | {"maxnreg": next((registers for most, registers in _REGISTERS if size <= most), None)}


def _kernel(kernel: Any, n_programs: int) -> Any:
    return kernel[(n_programs,)]


def _summed(form: FusedStep) -> Iterable[FusedStep]:
    """The sums that make up a form."""
    return [piece for _, piece in form.pieces] if form.pieces else (form,)


def _read(form: FusedStep) -> list[Source]:
    """The sources and ranks that a step reads."""
    ranks = [prune.ranks for _, _, prune in form.inputs if prune.ranks is not None]
    return [*[entry for entry, _, _ in form.inputs], *([] if form.base is None else [form.base]), *ranks]
