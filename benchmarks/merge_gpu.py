"""How fast candidates of 8B-shaped models appear in a GPU's memory, compared with the rate at which that GPU copies.

    python benchmarks/merge_gpu.py --json benchmarks/results/merge-gpu-DATE.json
    python benchmarks/merge_gpu.py --layers 16      # on a smaller GPU
    python benchmarks/merge_gpu.py --tiny           # a tiny model on a GPU: checks in seconds whether everything runs
    python benchmarks/merge_gpu.py --interpret      # the same without a GPU, under Triton's interpreter; its times mean nothing

32 layers need 81 GB of the GPU and 10 GB of host memory; della needs another 48 GB of both, for ranks. Base and three experts in bfloat16 are
merged into parameters laid out as in an engine (q, k, v and gate, up fused). Each row is one method:

    first s       the first candidate: sources are copied, statistics are computed, kernels are compiled
    compile s     of that, the first launch of each of its kernels, compilation included, with an empty cache
    kernels ms    a candidate's time on the GPU, best of the rounds; every round has different weights and densities
    candidate ms  the same from recipe values to weights in place, as a search sees it
    share         bytes that have to be read and written, divided by the kernels' time, as a share of the copy rate in the same run
    target        whether the share reaches the target, for the methods that have one
    bits          whether some of the tensors have the same bits as the CPU's kernels produce for the last candidate

dare_ties, dare_linear and della are measured with `rescale`, mergekit's default.
If a row fails, it says why, and the next one is measured. The exit status is 1 if a row failed or bits differ.

The target is a share of 85% on an H200 for linear, task_arithmetic, ties and dare_ties. No figure has been measured yet, as
no GPU was available.
"""

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

N_EXPERTS = 3

TARGET = 0.85

TARGETED = ("linear", "task_arithmetic", "ties", "dare_ties")

METHODS: dict[str, dict[str, bool]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False},
    "ties": {"normalize": True, "rescale": False},
    "dare_ties": {"normalize": False, "rescale": True},
    "dare_linear": {"normalize": False, "rescale": True},
    "breadcrumbs": {"normalize": False, "rescale": False},
    "slerp": {},
    "della": {"normalize": False, "rescale": True},
}
"""row -> shared parameters; `della` last, as its ranks may not fit"""

N_CHECKED = 3
"""tensors, one per shape, whose bits are compared with the CPU's"""

SPARE_BYTES = 1 << 30
"""left free on the GPU, in addition to models and ranks"""


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    hidden: int
    intermediate: int
    kv: int
    vocabulary: int

    def tensors(self, n_layers: int) -> dict[str, tuple[int, ...]]:
        """Checkpoint name -> shape."""
        h, i, kv = self.hidden, self.intermediate, self.kv
        layer = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h), "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, h)}
        for index in range(n_layers):
            found |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": (h,), "lm_head.weight": (self.vocabulary, h)}


LLAMA_8B = Shape(4096, 14336, 1024, 128256)
TINY = Shape(32, 48, 16, 40)

FUSED = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def parameters(shapes: dict[str, tuple[int, ...]], device: str):
    """A target whose fused parameters occupy one block of memory each, as in vLLM."""
    import torch

    from evomerge.plan import Region

    views: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        parts = next((parts for parts in FUSED.values() if any(part in name for part in parts)), None)
        if parts is None:
            views[name] = torch.empty(shape, dtype=torch.bfloat16, device=device)
        elif parts[0] in name:
            names = [name.replace(parts[0], part) for part in parts]
            rows = [shapes[other][0] for other in names]
            memory = torch.empty(sum(rows), shape[1], dtype=torch.bfloat16, device=device)
            views |= dict(zip(names, memory.split(rows), strict=True))

    class Parameters:
        def names(self) -> list[str]:
            return list(views)

        def regions(self, tensor: str) -> list[Region]:
            return [Region(tuple(slice(0, size) for size in shapes[tensor]), views[tensor])]

    return Parameters()


def make_pool(shapes: dict[str, tuple[int, ...]]):
    """Base and experts. On the host a model is one buffer little larger than its largest tensor, so that 8B models do not need 64 GB.

    Each tensor starts at a different offset, because tensors that start at the same address are copied to the GPU only once.
    """
    import torch

    from evomerge.weights import WeightPool

    step = 64
    n_elements = max(math.prod(shape) for shape in shapes.values()) + step * len(shapes)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n_elements, generator=generator).mul_(0.02)
    buffers = {"base": base.bfloat16()}
    for expert in range(N_EXPERTS):
        buffers[f"expert{expert}"] = torch.randn(n_elements, generator=generator).mul_(0.001).add_(base).bfloat16()
    return WeightPool.holding(
        {
            (model, name): buffer[step * index :][: math.prod(shape)].view(shape)
            for model, buffer in buffers.items()
            for index, (name, shape) in enumerate(shapes.items())
        }
    )


def make_plan(row: str, shapes: dict[str, tuple[int, ...]], variation: float):
    """One candidate; `variation` in [0, 1) makes each one different."""
    from evomerge.plan import MergePlan, TensorInput, TensorStep

    own = {"weight": 0.3 + 0.3 * variation, "density": 0.3 + 0.3 * variation, "gamma": 0.01, "epsilon": 0.1}
    shared = METHODS[row] | ({"t": 0.2 + 0.6 * variation} if row == "slerp" else {"lambda": 1.0})
    n_inputs = 1 if row == "slerp" else N_EXPERTS
    steps = [
        TensorStep(
            name,
            shape,
            row,
            tuple([TensorInput(f"expert{expert}", name, own) for expert in range(n_inputs)]),
            None if row == "linear" else TensorInput("base", name, {}),
            shared,
        )
        for name, shape in shapes.items()
    ]
    return MergePlan(tuple(steps), 0, 0, "bfloat16", "float32", 0)


def bytes_moved(row: str, n_elements: int) -> int:
    """Bytes that a candidate has to read and write: sources, with their ranks for della, and the result."""
    n_inputs = 1 if row == "slerp" else N_EXPERTS
    n_read = n_inputs * (2 if row == "della" else 1) + (row != "linear")
    return 2 * n_elements * (n_read + 1)


def bytes_held(row: str, n_elements: int) -> int:
    """Bytes that stay on the GPU: parameters, base, experts and ranks."""
    return 2 * n_elements * (2 + N_EXPERTS * (2 if row == "della" else 1)) + SPARE_BYTES


class Clock:
    """Times launches: on the GPU with its events, under the interpreter with the wall clock."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[object, object]] = []
        self._seen: set[str] = set()
        self.compile_s = 0.0

    def wrap(self, kernel, n_programs: int):
        """Replaces `evomerge.weights.triton.batch._kernel`."""
        launch = kernel[(n_programs,)]

        def timed(*arguments: object, **constants: object) -> None:
            variant = f"{kernel.__name__} {sorted(constants.items())}"
            before, start = self._now(), time.perf_counter()
            launch(*arguments, **constants)
            if variant not in self._seen:
                self.compile_s += time.perf_counter() - start
            self._seen.add(variant)
            self._spans.append((before, self._now()))

        return timed

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds spent in launches since the last call.

        Raises:
            RuntimeError: there were none.
        """
        spans, self._spans = self._spans, []
        if not spans:
            raise RuntimeError("no kernel was launched: merged on the CPU, the log says why")
        return sum(a.elapsed_time(b) / 1e3 if self._on_gpu else b - a for a, b in spans)


def copy_rate(device: str, n_elements: int, rounds: int) -> float:
    """Bytes read and written per second by one large copy."""
    import torch

    source = torch.ones(n_elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    clock, best = Clock(on_gpu=device != "cpu"), math.inf
    for _ in range(rounds + 1):
        before = clock._now()
        target.copy_(source)
        clock._spans.append((before, clock._now()))
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock.take())
    return 4 * n_elements / best


def measure(row: str, shapes, target, merger, clock: Clock, rounds: int) -> dict[str, object]:
    """First-candidate, compile, kernel and candidate seconds of one method, and whether its last candidate has the CPU's bits."""
    clock.compile_s = 0.0
    start = time.perf_counter()
    merger.write(make_plan(row, shapes, 0.0), target)
    first = time.perf_counter() - start
    clock.take()
    kernels = candidate = math.inf
    for index in range(1, rounds + 1):
        plan = make_plan(row, shapes, index / (rounds + 1))
        start = time.perf_counter()
        merger.write(plan, target)
        candidate = min(candidate, time.perf_counter() - start)
        kernels = min(kernels, clock.take())
    return {
        "first_s": first,
        "compile_s": clock.compile_s,
        "kernels_s": kernels,
        "candidate_s": candidate,
        "bits_equal": bits_equal(plan, target, merger),
    }


def bits_equal(plan, target, merger) -> bool:
    """Whether `target` holds what the CPU makes of `plan`, for the smallest tensors of different shapes."""
    import torch

    of_shape = {step.shape: step for step in plan.steps}
    steps = sorted(of_shape.values(), key=lambda step: math.prod(step.shape))[:N_CHECKED]
    for name, merged in merger.tensors(replace(plan, steps=tuple(steps))):
        (region,) = target.regions(name)
        if not torch.equal(region.view.cpu().view(torch.int16), merged.view(torch.int16)):
            return False
    return True


def refuse(message: str) -> None:
    print(f"merge_gpu.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--interpret", action="store_true", help="a tiny model under Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the rows there too, after each of them")
    options = parser.parse_args()
    unknown = [row for row in options.methods.split(",") if row not in METHODS]
    if unknown:
        refuse(f"no method {unknown[0]!r} here; there are: {', '.join(METHODS)}")
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    if options.interpret or options.tiny:
        options.layers = 1
    if options.interpret:
        options.rounds = 1
    import torch

    if not options.interpret and not torch.cuda.is_available():
        refuse("needs a CUDA GPU, and torch sees none; --interpret runs a tiny model without one")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # an empty cache, so that compilation is measured
        complete = run(options, "cpu" if options.interpret else "cuda")
    raise SystemExit(0 if complete else 1)


def run(options: argparse.Namespace, device: str) -> bool:
    """Measures the rows; returns whether all could be measured and have the CPU's bits."""
    import torch

    from evomerge.weights import Merger

    try:
        import triton

        from evomerge.weights.triton import batch
    except ImportError:
        refuse("triton is not installed; requirements/gpu.txt has it")
    reason = batch.obstacle(torch.device(device))
    if reason is not None:
        refuse(reason)
    tiny = options.tiny or options.interpret
    shapes = (TINY if tiny else LLAMA_8B).tensors(options.layers)
    n_elements = sum(math.prod(shape) for shape in shapes.values())
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else math.inf
    if bytes_held("linear", n_elements) > free:
        needed = bytes_held("linear", n_elements)
        refuse(f"{options.layers} layers need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; use fewer --layers")
    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter (times mean nothing)"
    rate = copy_rate(device, 1 << 16 if tiny else 1 << 30, options.rounds)
    if device == "cuda":
        torch.cuda.empty_cache()
    result = {
        "date": datetime.date.today().isoformat(), "gpu": name, "torch": torch.__version__, "triton": triton.__version__,
        "n_parameters": n_elements, "n_experts": N_EXPERTS, "copy_bytes_per_s": rate, "target_share": TARGET, "rows": [],
    }  # fmt: skip
    print(f"{result['date']}, {name}: copies {rate / 1e9:.0f} GB/s")
    print(
        f"{n_elements / 1e9:.2f}B parameters in bfloat16, {N_EXPERTS} experts; target: {TARGET:.0%} of the copy rate on an H200"
    )
    print("method             first s   compile s   kernels ms   candidate ms   share   of candidate   target   bits")
    pool, target, clock = make_pool(shapes), parameters(shapes, device), Clock(on_gpu=device == "cuda")
    batch._kernel = clock.wrap
    merger = Merger(pool)
    for row in options.methods.split(","):
        try:
            if bytes_held(row, n_elements) > free:
                raise RuntimeError(
                    f"needs {bytes_held(row, n_elements) / 1e9:.0f} GB of the GPU, {free / 1e9:.0f} are free"
                )
            found = {"method": row, **measure(row, shapes, target, merger, clock, options.rounds)}
            found |= shares(found, n_elements, rate, timed=device == "cuda" and not tiny)
        except Exception as error:  # noqa: BLE001 (the other rows are measured whatever the error is)
            found = {"method": row, "error": f"{type(error).__name__}: {error}"}
            merger = Merger(pool)  # a merger that ran out of room or lost its sources would keep to the CPU
        result["rows"].append(found)
        print(line(found), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    return all(found.get("bits_equal", False) for found in result["rows"])


def shares(found, n_elements: int, rate: float, *, timed: bool) -> dict[str, object]:
    """Bytes moved per time, as shares of the copy rate, and whether the target is met; None if there is no target or times mean nothing."""
    row = found["method"]
    share, of_candidate = (bytes_moved(row, n_elements) / found[key] / rate for key in ("kernels_s", "candidate_s"))
    met = bool(share >= TARGET) if timed and row in TARGETED else None
    return {"share_of_copy": share, "candidate_share_of_copy": of_candidate, "target_met": met}


def line(found) -> str:
    """A row of the table."""
    if "error" in found:
        return f"{found['method']:18s} failed: {found['error']}"
    target = {True: "met", False: "missed", None: "-"}[found["target_met"]]
    return (
        f"{found['method']:18s} {found['first_s']:7.1f} {found['compile_s']:11.1f} {found['kernels_s'] * 1e3:12.2f} "
        f"{found['candidate_s'] * 1e3:14.2f} {found['share_of_copy']:7.1%} {found['candidate_share_of_copy']:14.1%}   "
        f"{target:6s}   {'equal' if found['bits_equal'] else 'DIFFER'}"
    )


if __name__ == "__main__":
    main()
