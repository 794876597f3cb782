"""`FusedBatch`: computes many output tensors at once with the compiled kernels, each into memory provided by the caller."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from evomerge.plan import TensorInput, TensorKey, TensorStep, n_columns
from evomerge.weights.fused.blocks import F32, F32_AS_BF16, OVERFLOW_BITS
from evomerge.weights.fused.formulas import SUM, formula_chunks
from evomerge.weights.fused.kernels import RANDOM, RANKED, mask_chunks, merge_chunks
from evomerge.weights.fused.lanes import LANES
from evomerge.weights.fused.norms import Norms, addend_grid, scales
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import FusedStep, costs_a_pass, fuse
from evomerge.weights.fused.tables import INPUT, KINDS, OUTPUT, chunks_of, kind_of
from evomerge.weights.fused.threads import Threads, Work
from evomerge.weights.pool import WeightPool
from evomerge.weights.registry import ELEMENTWISE
from evomerge.weights.windows import Window, whole

_RANGE = np.dtype(
    [("output", np.int32), ("input", np.int32), ("start", np.int64), ("end", np.int64), ("out_address", np.int64)]
)


class Destination(NamedTuple):
    """The destination of a part of a step's output.

    Attributes:
        step: the step.
        form: its fused form.
        window: the elements to compute.
        memory: contiguous memory for these elements; bfloat16 or float32 (on a GPU also float16).
        round_to_bf16: for float32 memory, whether to round values to bfloat16.
    """

    step: TensorStep
    form: FusedStep
    window: Window
    memory: torch.Tensor
    round_to_bf16: bool

    def kind(self) -> int:
        """The kind with which the kernels write it."""
        kind = KINDS[self.memory.dtype]
        return F32_AS_BF16 if self.round_to_bf16 and kind == F32 else kind


class Part(NamedTuple):
    """Elements [first, end) of a destination, computed by one piece of its step; parts with equal `key` have the same `form`."""

    key: tuple[str, int]
    form: FusedStep
    destination: Destination
    first: int
    end: int

    def address(self) -> int:
        """Address of the destination's first element."""
        return self.destination.memory.data_ptr()


class _Started(NamedTuple):
    """A group that is being computed.

    Attributes:
        parts: its parts.
        outputs, chunks: tables that kernels read and write.
        masks: memory whose addresses are in the tables.
    """

    parts: Sequence[Part]
    outputs: np.ndarray
    chunks: np.ndarray
    masks: Sequence[np.ndarray]


def parts_of(destination: Destination) -> list[Part]:
    """The parts of the destination computed by each piece of its step; a single part if there are no pieces."""
    name, form, window = destination.step.output, destination.form, destination.window
    if not form.pieces:
        return [Part((name, 0), form, destination, 0, window.n_elements)]
    edges = [0, *[window.place(end) for end, _ in form.pieces]]
    return [
        Part((name, number), piece, destination, first, end)
        for number, ((first, end), (_, piece)) in enumerate(zip(pairwise(edges), form.pieces, strict=True))
        if first < end
    ]


class FusedBatch:
    """Computes steps with the compiled kernels.

    Args:
        pool: the sources.
        threads: number of threads; None = as many as torch uses.
        once: for a single merge, see `Statistics`.

    Attributes:
        device: device of the destinations.
        writes: supported dtypes of destinations.
        n_groups: recommended number of groups for `run`: one, because preparing the next would take a core from the kernels.
    """

    device = torch.device("cpu")
    writes = (torch.float32, torch.bfloat16)
    n_groups = 1

    def __init__(self, pool: WeightPool, threads: int | None = None, *, once: bool = False) -> None:
        self._pool = pool
        self._once = once
        self._statistics: dict[int, Statistics] = {}
        self._threads = Threads(threads)
        self._stored_at: dict[TensorKey, tuple[int, int | None]] = {}
        self._prepared: set[tuple[object, ...]] = set()

    def can_read(self, step: TensorStep) -> bool:
        """Whether the kernels support the dtypes of all of the step's tensors."""
        return None not in [self._stored(entry)[1] for entry in step.sources]

    def is_new(self, steps: Iterable[TensorStep], math_dtype: torch.dtype) -> bool:
        """Whether `prepare` will have to read tensors of `steps` for statistics that are not known yet."""
        return not _keys(steps, KINDS[math_dtype]) <= self._prepared or any(map(costs_a_pass, steps))

    def prepare(self, steps: Sequence[TensorStep], seed: int, math_dtype: torch.dtype) -> list[FusedStep | None]:
        """The fused form of each step (None if there is none); missing statistics are computed in threads."""
        precision = KINDS[math_dtype]
        statistics = self._statistics.setdefault(precision, Statistics(self._pool, precision, once=self._once))
        statistics.use_seed(seed)

        def form(step: TensorStep) -> FusedStep | None:
            return fuse(step, statistics) if self.can_read(step) else None

        # if only lookups are left, which hold the interpreter lock, one thread is enough
        if self.is_new(steps, math_dtype):
            forms = self._threads.map(form, steps)
            self._prepared |= _keys(steps, precision)
        else:
            forms = [form(step) for step in steps]
        statistics.find_cuts(self._threads)
        return forms

    def ready(self, wanted: Iterable[tuple[FusedStep, Window]]) -> bool:
        """Whether these parts of steps can be computed; always True, because the sources are in the pool."""
        return True

    def _stored(self, entry: TensorInput) -> tuple[int, int | None]:
        """Address of a source's tensor and its kind (None if the kernels cannot read it)."""
        key = entry.key
        found = self._stored_at.get(key)
        if found is None:
            tensor = self._pool.tensor(*key)
            found = self._stored_at[key] = (tensor.data_ptr(), kind_of(tensor))
        return found

    def covering(self, form: FusedStep, window: Window, entire: Window) -> Window:
        """The window that must be computed to obtain `window` of a tensor (`entire` is all of it); here `window` itself."""
        return window

    def measured(self, step: TensorStep, form: FusedStep) -> FusedStep:
        """`form` with all norms that `run` would measure, computed in a pass over the whole tensors."""
        unknown = [position for position, norms in form.norms.items() if norms.kept is None]
        if not unknown:
            return form
        window = whole(step.n_elements)
        nowhere = Destination(step, form, window, torch.empty(0), False)
        outputs, inputs = self._tables([Part((step.output, 0), form, nowhere, 0, window.n_elements)])
        masks = [np.empty(-(-step.n_elements // LANES) * LANES // 8, np.uint8) for _ in unknown]
        inputs["mask_address"][unknown] = [mask.ctypes.data for mask in masks]
        ranges = np.zeros(len(unknown), _RANGE)
        ranges["input"], ranges["end"] = unknown, step.n_elements
        kept = self._measured(ranges, outputs, inputs)
        del masks  # kept alive until here, because the table holds their addresses
        known = {position: form.norms[position]._replace(kept=float(kept[position])) for position in unknown}
        return form._replace(norms={**form.norms, **known})

    def run(self, groups: Iterable[Sequence[Destination]]) -> TensorStep | None:
        """Compute all destinations; while one group is computed, `groups` may prepare the next.

        Returns:
            A step with a result outside the range of its dtype, if any.
        """
        with self._threads.work() as work:
            started = [self._start(work, destinations) for destinations in groups]
        for each in started:
            limits = np.array(OVERFLOW_BITS, np.uint32)[each.outputs["out_kind"][each.chunks["output"]]]
            bad = np.flatnonzero(each.chunks["largest"] >= limits)
            if len(bad):
                return each.parts[int(each.chunks["output"][bad].min())].destination.step
        return None

    def _start(self, work: Work, destinations: Sequence[Destination]) -> "_Started":
        """Generate the random masks that `destinations` need, then start to compute these in threads."""
        parts = [part for destination in destinations for part in parts_of(destination)]
        parts.sort(key=lambda part: part.form.formula != SUM)
        distinct = {part.key: part for part in parts}
        by_form, inputs = self._tables(list(distinct.values()))
        row_of = {key: row for row, key in enumerate(distinct)}
        rows = np.array([row_of[part.key] for part in parts], np.int64)
        ranges = _ranges_of(parts)
        masks = self._make_masks([part.form for part in distinct.values()], by_form, inputs, ranges, rows)
        outputs = by_form[rows]
        outputs["out_kind"] = [part.destination.kind() for part in parts]
        chunks = chunks_of(ranges)
        n_sums = np.searchsorted(chunks["output"], sum(part.form.formula == SUM for part in parts))
        for kernel, own in ((merge_chunks, chunks[:n_sums]), (formula_chunks, chunks[n_sums:])):
            if len(own):
                work.start_chunks(kernel, own, outputs, inputs)
        return _Started(parts, outputs, chunks, masks)

    def _tables(self, parts: list[Part]) -> tuple[np.ndarray, np.ndarray]:
        """An output row for each form (without destinations) and all input rows (without masks, and with scales of 1)."""
        forms, steps = [part.form for part in parts], [part.destination.step for part in parts]
        outputs = np.zeros(len(forms), OUTPUT)
        bases = [(0, 0) if form.base is None else self._stored(form.base) for form in forms]
        outputs["base_address"], outputs["base_kind"] = [base[0] for base in bases], [base[1] for base in bases]
        outputs["has_base"] = [form.base is not None for form in forms]
        outputs["n_inputs"] = [len(form.inputs) for form in forms]
        outputs["first_input"] = np.cumsum(outputs["n_inputs"]) - outputs["n_inputs"]
        outputs["n_elements"] = [step.n_elements for step in steps]
        outputs["n_columns"] = [n_columns(step.shape) for step in steps]
        outputs["number_address"] = [0 if form.numbers is None else form.numbers.ctypes.data for form in forms]
        outputs["n_numbers"] = [0 if form.numbers is None else len(form.numbers) for form in forms]
        terms = [term for form in forms for term in form.inputs]
        prunes = [prune for _, _, prune in terms]
        inputs = np.zeros(len(terms), INPUT)
        stored = [self._stored(entry) for entry, _, _ in terms]
        inputs["address"], inputs["kind"] = [place[0] for place in stored], [place[1] for place in stored]
        ranks = [prune.ranks if prune.places is None else prune.places for prune in prunes]
        inputs["rank_address"] = [0 if array is None else array.ctypes.data for array in ranks]
        inputs["scale"] = 1.0
        norms = _norms_of(forms)
        inputs["measure"] = [pair is not None and pair.kept is None for pair in norms]
        inputs["grid"] = [0.0 if pair is None else addend_grid(pair.whole) for pair in norms]
        with np.errstate(over="ignore"):  # a weight beyond float32 becomes infinite and is reported with the result
            inputs["weight"] = [weight for _, weight, _ in terms]
            for name in ("divisor", "scale", "elect_sign", "normalize", "precision", "formula", "parameter"):
                outputs[name] = [getattr(form, name) for form in forms]
            for name in ("mode", "key0", "key1", "keep", "step"):
                inputs[name] = [getattr(prune, name) for prune in prunes]
            for name, cuts in (("", [prune.low for prune in prunes]), ("top_", [prune.top for prune in prunes])):
                inputs[f"{name}threshold"] = [cut.threshold for cut in cuts]
                inputs[f"{name}cutoff"] = [cut.cutoff for cut in cuts]
        return outputs, inputs

    def _make_masks(
        self, forms: list[FusedStep], by_form: np.ndarray, inputs: np.ndarray, ranges: np.ndarray, rows: np.ndarray
    ) -> list[np.ndarray]:
        """Generate random masks, and set the scale of every input whose pruned delta must have the L1 norm of the whole delta.

        Args:
            forms: the forms to compute.
            by_form, inputs: their tables, from `_tables`.
            ranges: the ranges that will be merged; their `output` is the number of the part.
            rows: for every part, its row in `by_form`.

        Returns:
            The masks, which must be kept alive until the last use of `inputs`.
        """
        output_of = np.repeat(np.arange(len(by_form)), by_form["n_inputs"])
        n_elements = by_form["n_elements"][output_of]
        is_random = np.isin(inputs["mode"], (RANDOM, RANKED))
        masks = [np.empty(-(-size // LANES) * LANES // 8, np.uint8) for size in n_elements[is_random].tolist()]
        inputs["mask_address"][is_random] = [mask.ctypes.data for mask in masks]
        unknown = np.flatnonzero(inputs["measure"])
        entire = np.zeros(len(unknown), _RANGE)
        entire["output"], entire["input"], entire["end"] = output_of[unknown], unknown, n_elements[unknown]
        drawn = _drawn(np.flatnonzero(is_random & ~inputs["measure"]), output_of, ranges, rows)
        kept_l1 = self._measured(np.concatenate([entire, drawn]), by_form, inputs)
        norms = {number: pair for number, pair in enumerate(_norms_of(forms)) if pair is not None}
        if norms:
            whole = np.array([pair.whole for pair in norms.values()])
            kept = np.array([kept_l1[n] if pair.kept is None else pair.kept for n, pair in norms.items()])
            inputs["scale"][list(norms)] = scales(whole, kept, forms[0].precision)
        return masks

    def _measured(self, ranges: np.ndarray, outputs: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """For each row of `inputs` that measures it, the L1 norm of the kept part of its delta; also writes the random masks."""
        if not len(ranges):
            return np.zeros(len(inputs))
        chunks = chunks_of(ranges)
        self._threads.run_chunks(mask_chunks, chunks, outputs, inputs)
        return np.bincount(chunks["input"], chunks["l1"], len(inputs))


def _keys(steps: Iterable[TensorStep], precision: int) -> set[tuple[object, ...]]:
    """Keys that identify steps with statistics."""
    return {
        (precision, step.method, step.output, *[entry.key for entry in step.inputs])
        for step in steps
        if step.method not in ELEMENTWISE
    }


def _ranges_of(parts: list[Part]) -> np.ndarray:
    """The contiguous stretches of tensor elements that make up `parts`, in order; part i belongs to row i of the outputs."""
    held = [(part.first, part.end, part.address(), part.destination.memory.element_size()) for part in parts]
    windows = np.array([part.destination.window for part in parts], np.int64).reshape(-1, 4)
    first, end, address, n_bytes = np.array(held, np.int64).reshape(-1, 4).T
    start, length, pitch = windows[:, 0], np.maximum(windows[:, 1], 1), windows[:, 2]
    n_stretches = -(-end // length) - first // length
    rows = np.repeat(np.arange(len(parts)), n_stretches)
    number = np.arange(len(rows)) - (np.cumsum(n_stretches) - n_stretches - first // length)[rows]
    skipped = start[rows] + number * (pitch - length)[rows]  # elements before a stretch that are not in the window
    ranges = np.zeros(len(rows), _RANGE)
    ranges["output"] = rows
    ranges["start"] = skipped + np.maximum(number * length[rows], first[rows])
    ranges["end"] = skipped + np.minimum((number + 1) * length[rows], end[rows])
    ranges["out_address"] = address[rows] - skipped * n_bytes[rows]
    return ranges


def _drawn(wanted: np.ndarray, output_of: np.ndarray, ranges: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each of `ranges` and each masked input of its form, the range of this input's mask that is needed.

    Args:
        wanted: rows of the masked inputs, ascending.
        output_of: for every input, the row of its form.
        ranges, rows: as in `_make_masks`.
    """
    n_inputs = np.bincount(output_of[wanted], minlength=rows.max(initial=0) + 1)
    row = rows[ranges["output"]]
    times = n_inputs[row]
    of_range = np.repeat(np.arange(len(ranges)), times)
    position = np.arange(len(of_range)) - np.repeat(np.cumsum(times) - times, times)
    drawn = ranges[of_range]
    drawn["output"] = row[of_range]
    drawn["input"] = wanted[(np.cumsum(n_inputs) - n_inputs)[row[of_range]] + position]
    drawn["start"] -= drawn["start"] % LANES
    return drawn


def _norms_of(forms: list[FusedStep]) -> list[Norms | None]:
    """The norms of every input of all forms; None if an input is not rescaled."""
    return [form.norms.get(position) for form in forms for position in range(len(form.inputs))]
