"""The CPU's work for a candidate that a GPU merges: plan, thresholds, tables. Needs no GPU.

    PYTHONPATH=.triton:. python benchmarks/merge_host.py --json benchmarks/results/merge-host-DATE.json

Base and three experts with the 291 tensors of an 8B Llama, or (`--model experts`) the 18,867 of a 30B Qwen3 with 128 experts in each layer,
made small; launches are left out. Each row is one method:

    first ms   from recipe to the first launch; the GPU waits meanwhile
    all ms     from recipe to the last launch; the GPU computes in between
    GPU ms     the time an H200 needs for that many parameters at 85% of its 4.8 TB/s, the target of `benchmarks/merge_gpu.py`
    all / GPU  above 1 the GPU waits for the CPU

Times are the best of the rounds, each of which has different weights and densities, with the median in brackets.
"""

import argparse
import datetime
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch
from merge import SIZES, Buffers, recipe_for, write_models
from merge_gpu import LLAMA_8B, TARGET, bytes_moved
from safetensors.torch import load_file, save_file

from evomerge.core import collect_rarely
from evomerge.plan import make_plan
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.fused import statistics as known

try:
    from evomerge.weights.triton import batch
except ImportError:
    raise SystemExit("merge_host.py: triton is not installed; `make triton-test` puts it into .triton") from None

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "breadcrumbs", "slerp")
N_LAYERS = 32
MODELS = {"8b": sum(math.prod(shape) for shape in LLAMA_8B.tensors(N_LAYERS).values()), "experts": 30_532_122_624}
"""models that the small ones stand for, with their numbers of parameters (`experts` is Qwen3-30B-A3B)"""

H200_BYTES_PER_S = 4.8e12
SIZES["8b"] = {
    "n_layers": N_LAYERS, "hidden": 64, "vocab": 512, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tied": False,
}  # fmt: skip


def write_experts(base: Path) -> None:
    """Writes a model with as many tensors as Qwen3-30B-A3B: a small Llama whose layers each get 128 small MLPs, a router, and norms for q and k."""
    n_experts, size = 128, 16
    shape = {"n_layers": 48, "hidden": size, "vocab": 512, "intermediate_size": size}
    write_tiny_llama(base, seed=0, tied=False, num_attention_heads=2, num_key_value_heads=2, **shape)
    weights, noise = load_file(base / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in weights if ".mlp." in name]:
        layer, _, last = name.partition(".mlp.")
        mlp = weights.pop(name)
        for expert in range(n_experts):
            weights[f"{layer}.mlp.experts.{expert}.{last}"] = (
                mlp + 0.01 * torch.randn(mlp.shape, generator=noise).bfloat16()
            )
        weights[f"{layer}.mlp.gate.weight"] = torch.randn(n_experts, size, generator=noise).bfloat16()
        for norm in ("q_norm", "k_norm"):
            weights[f"{layer}.self_attn.{norm}.weight"] = torch.ones(size // 2).bfloat16()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": n_experts}
    (base / "config.json").write_text(json.dumps(config))


def no_launch(times: list[float]):
    """Replaces `evomerge.weights.triton.batch._kernel`: records the time."""

    def kernel(_kernel: object, _n_programs: int):
        return lambda *arguments, **constants: times.append(time.perf_counter())

    return kernel


def measure(method: str, models: list[str], pool: WeightPool, merger: Merger, launches: list[float], rounds: int):
    """Milliseconds from recipe to first and last launch."""
    buffers = Buffers(make_plan(recipe_for(method, models, 0.0), pool.headers))
    first, last = [], []
    for index in range(rounds + 1):
        recipe = recipe_for(method, models, index / (rounds + 1))
        launches.clear()
        start = time.perf_counter()
        merger.write(make_plan(recipe, pool.headers), buffers)
        first.append(1e3 * (launches[0] - start))
        last.append(1e3 * (launches[-1] - start))
    return first[1:], last[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--model", choices=MODELS, default="8b", help="default: 8b")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    unknown = [method for method in options.methods.split(",") if method not in METHODS]
    if unknown:
        parser.error(f"no method {unknown[0]!r} here; there are: {', '.join(METHODS)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    collect_rarely()  # as every worker does
    known.LARGE_TENSOR = 0  # tensors of an 8B model are large, so their norms are known
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "experts":
            write_experts(Path(folder) / "experts" / "base")
        models = write_models(Path(folder), options.model)
        pool = WeightPool.from_folders(models)
        merger, launches = Merger(pool), list[float]()
        plan = make_plan(recipe_for("linear", models, 0.5), pool.headers)
        one = replace(plan, steps=plan.steps[:1])
        merger.write(one, Buffers(one))  # this finds out that kernels run here
        batch._kernel = no_launch(launches)
        batch.OVERFLOW_BITS = [math.inf] * len(batch.OVERFLOW_BITS)  # nothing is computed, so nothing can overflow
        print("method            first ms          all ms   GPU ms   all / GPU")
        for method in options.methods.split(","):
            first, last = measure(method, models, pool, merger, launches, options.rounds)
            on_gpu = 1e3 * bytes_moved(method, MODELS[options.model]) / (TARGET * H200_BYTES_PER_S)
            rows.append(
                {"method": method, "first_ms": min(first), "first_median_ms": statistics.median(first),
                 "all_ms": min(last), "all_median_ms": statistics.median(last), "gpu_ms": on_gpu}
            )  # fmt: skip
            print(
                f"{method:16s} {min(first):5.1f} ({statistics.median(first):4.1f})   {min(last):5.1f} ({statistics.median(last):4.1f})"
                f" {on_gpu:8.1f} {min(last) / on_gpu:11.2f}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"date": datetime.date.today().isoformat(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
