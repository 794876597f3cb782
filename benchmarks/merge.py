"""Merging compared with memory bandwidth and with mergekit, in parts that take minutes each.

    python benchmarks/merge.py resident [--size 110m|1.1b|tiny] [--methods ties,linear] [--dtype bfloat16] [--threads N] [--json FILE]
    python benchmarks/merge.py disk     [--size 1.1b|110m|tiny] [--methods ties,linear] [--dtype bfloat16] [--json FILE]

`resident`: one run measures everything it compares: a resident candidate (plan and write into engine-like buffers,
parameters changed every time); between the candidates two copies, one of plain memory and one of a model, tensor by
tensor, into those buffers; and mergekit in its own environment, whose import, reading and writing are not counted: only its
`method` call is timed, on tensors in memory. Each method is finished, mergekit included, before the next one starts, so
an interrupted run loses only its last line.

`disk`: wall time and peak memory of the commands `evomerge merge` and `mergekit-yaml` on the same recipe, each run once
after the files have been read once.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evomerge.plan import MergePlan, Region, make_plan
from evomerge.recipe import BaseRole, Recipe, Scope, Setting, Slice, Source, method_spec, recipe_to_yaml
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "della", "breadcrumbs", "slerp")
SIZES = {
    "tiny": {"n_layers": 4, "hidden": 256, "vocab": 4096, "intermediate_size": 688},
    "110m": {
        "n_layers": 12, "hidden": 768, "vocab": 32000, "intermediate_size": 2048,
        "num_attention_heads": 12, "num_key_value_heads": 12,
    },
    "1.1b": {
        "n_layers": 22, "hidden": 2048, "vocab": 32000, "intermediate_size": 5632,
        "num_attention_heads": 32, "num_key_value_heads": 4, "tied": False,
    },
}  # fmt: skip
N_EXPERTS = 3
ROUNDS = 20
"""candidates after the first; the best one counts, as does the best of the copies between them"""

MERGEKIT_MERGE = """
import json, sys, time, torch
from safetensors.torch import load_file
from mergekit import merge_methods
from mergekit.merge_methods.base import PerInputValues, TensorGroup
jobs = json.load(open(sys.argv[1]))
torch.set_num_threads(jobs["threads"])
models = [load_file(f"{folder}/model.safetensors") for folder in jobs["models"]]
for name, job in jobs["methods"].items():
    method = merge_methods.get(name)
    chosen = models if not job["two"] else models[:2]
    def merge(tensor):
        base = 0 if job["base"] else None
        inputs = chosen if job["base"] else chosen[1:]
        group = TensorGroup.from_tensors([m[tensor].to(getattr(torch, jobs["dtype"])) for m in inputs], base_index=base, name=tensor)
        entries = group.entries if not job["base"] else group.non_base
        parameters = dict(job["shared"])
        parameters |= {k: PerInputValues([(e.id, v) for e in entries]) for k, v in job["per_model"].items()}
        (merged,) = method((group,), parameters=parameters)
        merged.to(torch.bfloat16)
    merge(min(models[0], key=lambda tensor: models[0][tensor].numel()))  # what is imported on first use is not counted
    start, cpu = time.perf_counter(), time.process_time()
    for tensor in models[0]:
        merge(tensor)
    print(json.dumps({name: [time.perf_counter() - start, time.process_time() - cpu]}), flush=True)
"""


class Buffers:
    """Engine-like parameters: one bfloat16 tensor per output."""

    def __init__(self, plan: MergePlan) -> None:
        self._views = {step.output: torch.empty(step.shape, dtype=torch.bfloat16) for step in plan.steps}
        self._regions = {
            name: Region(tuple(slice(0, size) for size in view.shape), view) for name, view in self._views.items()
        }

    def names(self) -> list[str]:
        return list(self._views)

    def hold(self, model: str, plan: MergePlan, pool: WeightPool) -> None:
        """Copies each tensor of a model to the place where its merge goes."""
        for step in plan.steps:
            self._views[step.output].copy_(pool.tensor(model, step.inputs[0].tensor))

    def regions(self, tensor: str) -> list[Region]:
        return [self._regions[tensor]]


def write_models(folder: Path, size: str) -> list[str]:
    """Writes a base and its experts (base plus noise) once."""
    base = folder / size / "base"
    if not (base / "model.safetensors").exists():
        write_tiny_llama(base, seed=0, init_std=0.02, **SIZES[size])
    weights = load_file(base / "model.safetensors")
    models = [str(base)]
    for expert in range(1, N_EXPERTS + 1):
        path = folder / size / f"expert{expert}"
        models.append(str(path))
        if (path / "model.safetensors").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        for file in base.iterdir():
            if file.suffix == ".json":
                (path / file.name).write_bytes(file.read_bytes())
        noise = torch.Generator().manual_seed(expert)
        changed = {
            name: (tensor.float() + 0.001 * torch.randn(tensor.shape, generator=noise)).bfloat16()
            for name, tensor in weights.items()
        }
        save_file(changed, path / "model.safetensors", metadata={"format": "pt"})
    return models


def values_for(method: str, variation: float) -> dict[str, dict[str, float]]:
    """Parameters of one candidate by scope; `variation` in [0, 1) makes every candidate different."""
    values = {
        "weight": 0.3 + 0.3 * variation, "density": 0.3 + 0.3 * variation, "t": 0.2 + 0.6 * variation,
        "gamma": 0.01, "epsilon": 0.1, "select_topk": 0.3 + 0.3 * variation, "r": 0.1 + 0.3 * variation, "alpha": 0.2,
    }  # fmt: skip
    if method in ("nearswap", "ram", "ramplus_tl"):  # distances between weights, which are about 0.001
        values |= {"t": values["t"] / 1000, "epsilon": 1e-5}
    spec = method_spec(method)
    return {
        scope.value: {p.name: values[p.name] for p in spec.parameters if p.scope is scope and p.name in values}
        for scope in Scope
    }


def recipe_for(method: str, models: list[str], variation: float, dtype: str | None = None) -> Recipe:
    spec = method_spec(method)
    settings = {name: (Setting(v),) for group in values_for(method, variation).values() for name, v in group.items()}
    experts = models[1 : 1 + (spec.max_sources or N_EXPERTS)]
    base = models[0] if spec.base is not BaseRole.SOURCE else None
    return Recipe(method, (Slice(tuple(Source(model) for model in experts)),), base, settings, dtype, "bfloat16")


class Copy:
    """A large copy, timed repeatedly."""

    def __init__(self, n_elements: int) -> None:
        self._source = torch.ones(n_elements, dtype=torch.bfloat16)
        self._target = torch.empty_like(self._source).copy_(self._source)
        self._seconds: list[float] = []

    def run(self) -> None:
        start = time.perf_counter()
        self._target.copy_(self._source)
        self._seconds.append(time.perf_counter() - start)

    def rate(self) -> float:
        """Bytes read and written per second, at best."""
        return 4 * self._source.numel() / min(self._seconds)


def measure(
    method: str, models: list[str], pool: WeightPool, merger: Merger, copy: Copy, dtype: str
) -> tuple[list[float], list[float], int]:
    """Seconds for each candidate and for each copy of a model between them, and the bytes that a candidate reads and writes."""
    plan = make_plan(recipe_for(method, models, 0.0, dtype), pool.headers)
    buffers = Buffers(plan)
    times, copies = [], []
    for index in range(ROUNDS + 1):
        start = time.perf_counter()
        plan = make_plan(recipe_for(method, models, index / (ROUNDS + 1), dtype), pool.headers)
        merger.write(plan, buffers)
        times.append(time.perf_counter() - start)
        copy.run()
        start = time.perf_counter()
        buffers.hold(models[1], plan, pool)
        copies.append(time.perf_counter() - start)
    n_tensors = len(plan.steps[0].inputs) + (plan.steps[0].base is not None) + 1
    return times, copies, n_tensors * plan.output_bytes


def mergekit_seconds(
    python: str, models: list[str], methods: list[str], threads: int, dtype: str
) -> dict[str, list[float]]:
    """Wall and processor seconds of mergekit's arithmetic on tensors in memory, per method."""
    jobs = {
        method: {
            "base": method_spec(method).base is not BaseRole.SOURCE,
            "two": method_spec(method).max_sources == 1,
            "shared": values_for(method, 0.5)["global"],
            "per_model": values_for(method, 0.5)["model"],
        }
        for method in methods
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "jobs.json"
        file.write_text(json.dumps({"models": models, "methods": jobs, "threads": threads, "dtype": dtype}))
        lines = subprocess.run(
            [python, "-c", MERGEKIT_MERGE, file], check=True, capture_output=True, text=True
        ).stdout.splitlines()
    return {name: seconds for line in lines for name, seconds in json.loads(line).items()}


def resident(options: argparse.Namespace, models: list[str]) -> list[dict[str, object]]:
    """Prints and returns one row per method."""
    pool = WeightPool.from_folders(models)
    merger = Merger(pool, threads=options.threads)
    n_elements = sum(tensor.end - tensor.start for tensor in pool.headers[models[0]].tensors.values()) // 2
    print(
        f"{n_elements / 1e6:.0f}M parameters, {N_EXPERTS} experts, {options.threads} thread(s), bfloat16, arithmetic in {options.dtype}"
    )
    print(
        "method           first ms  best ms  median ms   copy GB/s  share   model copy GB/s  share   mergekit s (CPU s)   ratio"
    )
    rows: list[dict[str, object]] = []
    for method in options.methods.split(","):
        copy = Copy(n_elements)
        (first, *later), copies, n_bytes = measure(method, models, pool, merger, copy, options.dtype)
        best, median, rate = min(later), statistics.median(later), copy.rate()
        model_rate = 4 * n_elements / min(copies)
        row: dict[str, object] = {
            "method": method, "first_s": first, "best_s": best, "median_s": median,
            "copy_bytes_per_s": rate, "share_of_copy": n_bytes / best / rate,
            "model_copy_bytes_per_s": model_rate, "share_of_model_copy": n_bytes / best / model_rate,
        }  # fmt: skip
        line = (
            f"{method:16s} {first * 1e3:8.0f} {best * 1e3:8.1f} {median * 1e3:10.1f} {rate / 1e9:11.1f} {n_bytes / best / rate:6.2f}"
            f" {model_rate / 1e9:17.1f} {n_bytes / best / model_rate:6.2f}"
        )
        if Path(options.mergekit).exists():
            wall, cpu = mergekit_seconds(options.mergekit, models, [method], options.threads, options.dtype)[method]
            row |= {"mergekit_s": wall, "mergekit_cpu_s": cpu, "ratio": wall / best}
            line += f"   {wall:10.2f} ({cpu:5.1f}) {wall / best:8.0f}x"
        rows.append(row)
        print(line, flush=True)
    return rows


def command_cost(command: list[str]) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def disk(options: argparse.Namespace, models: list[str]) -> list[dict[str, object]]:
    """Prints and returns one row per method."""
    ours = [str(Path(sys.executable).with_name("evomerge"))]
    peer = Path(options.mergekit).with_name("mergekit-yaml")
    if not peer.exists():
        raise SystemExit(f"{peer} is missing: make unit builds it")
    for model in models:
        with (Path(model) / "model.safetensors").open("rb") as stream:
            while stream.read(1 << 24):
                pass
    start_up, _ = command_cost([*ours, "merge", "--help"])
    print(
        f"{options.size}, {N_EXPERTS} experts, bfloat16, arithmetic in {options.dtype}; start-up of `evomerge merge --help`: {start_up:.1f} s"
    )
    print("method           evomerge s   peak GB   mergekit s   peak GB   ratio")
    rows: list[dict[str, object]] = []
    for method in options.methods.split(","):
        with tempfile.TemporaryDirectory(dir=options.models) as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(recipe_to_yaml(recipe_for(method, models, 0.5, options.dtype)))
            seconds, peak = command_cost([*ours, "merge", str(recipe), f"{folder}/ours"])
            other_seconds, other_peak = command_cost([str(peer), str(recipe), f"{folder}/theirs", "--quiet"])
        rows.append(
            {"method": method, "evomerge_s": seconds, "evomerge_peak_bytes": peak, "mergekit_s": other_seconds,
             "mergekit_peak_bytes": other_peak, "ratio": other_seconds / seconds, "start_up_s": start_up}
        )  # fmt: skip
        print(
            f"{method:16s} {seconds:10.1f} {peak / 1e9:9.2f} {other_seconds:12.1f} {other_peak / 1e9:9.2f} {other_seconds / seconds:6.1f}x",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["resident", "disk"])
    parser.add_argument("--models", type=Path, default=Path("runs/benchmark-models"))
    parser.add_argument("--size", choices=SIZES, default="110m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the recipe")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--mergekit", default=".venv-mergekit/bin/python")
    parser.add_argument("--methods", help="comma-separated; default: all seven (resident), ties and linear (disk)")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    part = {"resident": resident, "disk": disk}[options.part]
    options.methods = options.methods or (",".join(METHODS) if options.part == "resident" else "ties,linear")
    torch.set_num_threads(options.threads)
    # in a separate process, as the peak memory of a command is at least what this process holds when starting it
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as writer:
        models = writer.submit(write_models, options.models, options.size).result()
    rows = part(options, models)
    if options.json is not None:
        run = {"date": datetime.date.today().isoformat(), "cpus": os.cpu_count(), "part": options.part}
        run |= {"size": options.size, "dtype": options.dtype, "threads": options.threads, "rows": rows}
        options.json.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
