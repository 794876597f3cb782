"""How fast candidates of 8B-shaped models appear in a GPU's memory, beside the rate at which that GPU copies.

    python benchmarks/merge_gpu.py                  # on a GPU: needs 81 GB for 32 layers, and 10 GB of host memory
    python benchmarks/merge_gpu.py --layers 16      # on a smaller one
    python benchmarks/merge_gpu.py --interpret      # without one: a tiny model under Triton's interpreter; its times mean nothing

Base and three experts in bfloat16, merged into parameters as an engine has them (q, k, v and gate, up fused). Each row is one method:

    compile s     the first launch of each of its kernels, compilation included, with an empty cache
    kernels ms    a candidate's time on the GPU, best of the rounds; every round has other weights and densities
    candidate ms  the same from recipe values to weights in place, as a search sees it
    share         bytes that have to be read and written, over the kernels' time, as a share of the copy rate of the same run

dare_ties is measured with and without `rescale` (mergekit's default), which reads everything twice: once for the norms.

The target is a share of 85% on an H200 for linear, task_arithmetic, ties and dare_ties. No figure has been measured yet: there was
no GPU at hand.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

N_EXPERTS = 3

TARGET = 0.85

METHODS: dict[str, dict[str, bool]] = {
    "linear": {"normalize": True},
    "task_arithmetic": {"normalize": False},
    "ties": {"normalize": True, "rescale": False},
    "dare_ties": {"normalize": False, "rescale": False},
    "dare_ties+rescale": {"normalize": False, "rescale": True},
    "dare_linear": {"normalize": False, "rescale": False},
    "breadcrumbs": {"normalize": False, "rescale": False},
    "slerp": {},
}


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
    """A target whose fused parameters lie in one block of memory each, as in vLLM."""
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
    """Base and experts; on the host, tensors of one shape share memory, so that 8B models need no 64 GB of it."""
    import torch

    from evomerge.weights import WeightPool

    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
    for shape in dict.fromkeys(shapes.values()):
        base = torch.randn(shape, generator=generator) * 0.02
        made["base", shape] = base.bfloat16()
        for expert in range(N_EXPERTS):
            made[f"expert{expert}", shape] = (base + 0.001 * torch.randn(shape, generator=generator)).bfloat16()
    models = ("base", *(f"expert{expert}" for expert in range(N_EXPERTS)))
    return WeightPool.holding({(model, name): made[model, shape] for model in models for name, shape in shapes.items()})


def make_plan(row: str, shapes: dict[str, tuple[int, ...]], variation: float):
    """One candidate; `variation` in [0, 1) makes each another one."""
    from evomerge.plan import MergePlan, TensorInput, TensorStep

    method = row.split("+")[0]
    own = {"weight": 0.3 + 0.3 * variation, "density": 0.3 + 0.3 * variation, "gamma": 0.01}
    shared = METHODS[row] | ({"t": 0.2 + 0.6 * variation} if method == "slerp" else {"lambda": 1.0})
    n_inputs = 1 if method == "slerp" else N_EXPERTS
    steps = [
        TensorStep(
            name,
            shape,
            method,
            tuple([TensorInput(f"expert{expert}", name, own) for expert in range(n_inputs)]),
            None if method == "linear" else TensorInput("base", name, {}),
            shared,
        )
        for name, shape in shapes.items()
    ]
    return MergePlan(tuple(steps), 0, 0, "bfloat16", "float32", int(1000 * variation))


def bytes_moved(row: str, n_elements: int) -> int:
    """What a candidate has to read and write."""
    n_inputs = 1 if row == "slerp" else N_EXPERTS
    passes = [n_inputs + (row != "linear") + 1]
    if METHODS[row].get("rescale"):
        passes.append(n_inputs + 1)
    return 2 * n_elements * sum(passes)


class Clock:
    """Times launches: on the GPU by its events, under the interpreter by the wall."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[object, object]] = []
        self._seen: set[str] = set()
        self.compile_s = 0.0

    def wrap(self, kernel, n_programs: int):
        """Stands in for `evomerge.weights.triton.batch._kernel`."""
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
        """Seconds of the launches since the last call."""
        spans, self._spans = self._spans, []
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


def measure(row: str, shapes, target, merger, clock: Clock, rounds: int) -> dict[str, float]:
    """First-candidate, compile, kernel and candidate seconds of one method."""
    clock.compile_s = 0.0
    start = time.perf_counter()
    merger.write(make_plan(row, shapes, 0.0), target)
    first = time.perf_counter() - start
    clock.take()
    kernels = candidate = math.inf
    for index in range(1, rounds + 1):
        start = time.perf_counter()
        merger.write(make_plan(row, shapes, index / (rounds + 1)), target)
        candidate = min(candidate, time.perf_counter() - start)
        kernels = min(kernels, clock.take())
    return {"first_s": first, "compile_s": clock.compile_s, "kernels_s": kernels, "candidate_s": candidate}


def refuse(message: str) -> None:
    print(f"merge_gpu.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--interpret", action="store_true", help="a tiny model under Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    unknown = [row for row in options.methods.split(",") if row not in METHODS]
    if unknown:
        refuse(f"no method {unknown[0]!r} here; there are: {', '.join(METHODS)}")
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
        options.layers, options.rounds = 1, 1
    import torch

    if not options.interpret and not torch.cuda.is_available():
        refuse("needs a CUDA GPU, and torch sees none; --interpret runs a tiny model without one")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # so that compilation is measured
        run(options, "cpu" if options.interpret else "cuda")


def run(options: argparse.Namespace, device: str) -> None:
    import torch

    from evomerge.weights import Merger

    try:
        from evomerge.weights.triton import batch
    except ImportError:
        refuse("triton is not installed; requirements/gpu.txt has it")
    shapes = (TINY if options.interpret else LLAMA_8B).tensors(options.layers)
    n_elements = sum(math.prod(shape) for shape in shapes.values())
    if device == "cuda":
        needed, free = 2 * n_elements * (N_EXPERTS + 2) + (1 << 30), torch.cuda.mem_get_info()[0]
        if needed > free:
            refuse(
                f"{options.layers} layers need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free; use fewer --layers"
            )
    name = torch.cuda.get_device_name() if device == "cuda" else "Triton's interpreter (times mean nothing)"
    rate = copy_rate(device, 1 << 16 if options.interpret else 1 << 30, options.rounds)
    print(f"{name}: copies {rate / 1e9:.0f} GB/s")
    print(
        f"{n_elements / 1e9:.2f}B parameters in bfloat16, {N_EXPERTS} experts; target: {TARGET:.0%} of the copy rate on an H200"
    )
    print("method             first s   compile s   kernels ms   candidate ms   share   of candidate")
    pool, target, clock = make_pool(shapes), parameters(shapes, device), Clock(on_gpu=device == "cuda")
    batch._kernel = clock.wrap
    merger = Merger(pool)
    rows = []
    for row in options.methods.split(","):
        found = measure(row, shapes, target, merger, clock, options.rounds)
        share, of_candidate = (bytes_moved(row, n_elements) / found[key] / rate for key in ("kernels_s", "candidate_s"))
        rows.append({"method": row, **found, "share_of_copy": share, "candidate_share_of_copy": of_candidate})
        print(
            f"{row:18s} {found['first_s']:7.1f} {found['compile_s']:11.1f} {found['kernels_s'] * 1e3:12.2f} "
            f"{found['candidate_s'] * 1e3:14.2f} {share:7.1%} {of_candidate:14.1%}",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"gpu": name, "copy_bytes_per_s": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
