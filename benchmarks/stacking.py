"""Layer stacks: the time of a swap in a running engine, and the results of searches over stacks on the demo models.

    python benchmarks/stacking.py swaps [--paths 200] [--restarts 3] [--out FILE.json]
    python benchmarks/stacking.py search [CASE...] [--seeds 1 2 3] [--zoo zoo] [--out FILE.json]
    python benchmarks/stacking.py table FILE.json...

`swaps`: random paths over two random Llama models of 8 layers (13M parameters, float32), 1 to 12 layers with repeats and scales of 0.3 to
2, through one running vLLM engine. A swap consists of planning, padding, merging into the live parameters and clearing the cache. The cost of
a restart is measured for a few of the same paths in the same run: write the checkpoint, start an engine, close it. Every tenth
stack's log-probabilities are compared with those of the path's own checkpoint in transformers, in float32 and in float64; those of the
path that differs most also with a vLLM engine started from its checkpoint; and likewise for a model that is not stacked.

`search` and `table`: see `stacking_search.py`.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from evomerge.engine import engine_environment

os.environ.update(engine_environment())

import torch
from stacking_search import CASES, search, table
from transformers import AutoModelForCausalLM

from evomerge.core import Json
from evomerge.engine import LogLikelihoodRequest, make_engine
from evomerge.plan import folding_of, make_plan, padded, read_model_header
from evomerge.recipe import Recipe, StackLayer, stack_recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool, merge_to_folder, write_slots_folder

MAX_SLOTS = 12
N_LAYERS = 8
REQUESTS = [LogLikelihoodRequest(tuple(range(5, 25)), (token, 40)) for token in (30, 31, 32)]
SETTINGS: dict[str, Json] = {"kv_cache_memory_bytes": 64 << 20}


def random_path(models: list[str], draw: random.Random) -> list[StackLayer]:
    scale = (math.log(0.3), math.log(2.0))
    return [
        StackLayer(draw.randrange(N_LAYERS), ((draw.choice(models), 1.0),), math.exp(draw.uniform(*scale)))
        for _ in range(draw.randint(1, MAX_SLOTS))
    ]


def answers(kind: str, folder: Path) -> list[float]:
    """Log-probabilities from an engine started for this purpose."""
    engine = make_engine(kind, folder, dtype="float32", max_model_len=64, options=SETTINGS if kind == "vllm" else {})
    found = [answer.log_probability for answer in engine.loglikelihood(REQUESTS)]
    engine.close()
    return found


def exact_answers(folder: Path) -> list[float]:
    """Log-probabilities in float64 (transformers nevertheless computes its norms in float32)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for request in REQUESTS:
        tokens = torch.tensor([[*request.context, *request.continuation]])
        with torch.no_grad():
            rows = torch.log_softmax(model(tokens).logits[0], -1)[len(request.context) - 1 : -1]
        found.append(float(rows[range(len(request.continuation)), list(request.continuation)].sum()))
    return found


def apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def compared(vllm: Sequence[float], folder: Path) -> dict[str, float]:
    """How far vLLM's log-probabilities are from those of a checkpoint in transformers, and both from float64."""
    plain, exact = answers("transformers", folder), exact_answers(folder)
    return {
        "vllm_transformers": apart(vllm, plain),
        "vllm_float64": apart(vllm, exact),
        "transformers_float64": apart(plain, exact),
    }


def restart_s(recipe: Recipe, folder: Path) -> float:
    """Seconds needed to write a checkpoint and start an engine from it."""
    started = time.perf_counter()
    merge_to_folder(recipe, folder)
    engine = make_engine("vllm", folder, dtype="float32", max_model_len=64, options=SETTINGS)
    taken = time.perf_counter() - started
    engine.close()
    return taken


def swaps(n_paths: int, n_restarts: int, out: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = [
            str(
                write_tiny_llama(
                    folder / name, seed=seed, n_layers=N_LAYERS, hidden=384, vocab=500, dtype="float32", init_std=0.1
                )
            )
            for seed, name in enumerate("ab")
        ]
        headers = {model: read_model_header(model) for model in models}
        first = headers[models[0]]
        folding = folding_of(first)
        merger = Merger(WeightPool(headers), threads=1)
        (folder / "slots").mkdir()
        write_slots_folder(folder / "slots", first, MAX_SLOTS)
        engine = make_engine("vllm", folder / "slots", dtype="float32", max_model_len=64, options=SETTINGS)
        draw, times, depths, recipes = random.Random(1), [], [], []
        differences: dict[int, dict[str, float]] = {}
        live: dict[int, list[float]] = {}
        for index in range(n_paths):
            hops = random_path(models, draw)
            recipe = stack_recipe(hops, ends=[(models[0], 1.0)], folding=folding, out_dtype="float32")
            started = time.perf_counter()
            plan = padded(make_plan(recipe, headers), MAX_SLOTS, folding.silenced)
            engine.update(lambda target, plan=plan: merger.write(plan, target))
            times.append(time.perf_counter() - started)
            depths.append(len(hops))
            recipes.append(recipe)
            if index % 10 == 0:
                live[index] = [answer.log_probability for answer in engine.loglikelihood(REQUESTS)]
                merge_to_folder(recipe, folder / f"path-{index}")
                differences[index] = compared(live[index], folder / f"path-{index}")
        engine.close()
        worst = max(differences, key=lambda index: differences[index]["vllm_transformers"])
        fresh = answers("vllm", folder / f"path-{worst}")
        unstacked = compared(answers("vllm", Path(models[0])), Path(models[0]))
        restarts = [restart_s(recipe, folder / f"restart-{i}") for i, recipe in enumerate(recipes[:n_restarts])]
    warm = times[5:]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "paths": n_paths,
        "depths": [min(depths), max(depths)],
        "restarts_of_the_engine_between_paths": 0,
        "swap_ms": {"median": 1e3 * statistics.median(warm), "longest": 1e3 * max(warm)},
        "restart_ms": 1e3 * statistics.median(restarts),
        "restart_over_swap": statistics.median(restarts) / statistics.median(warm),
        "log_probability_differences": {
            "compared_stacks": len(differences),
            "median": {key: statistics.median(d[key] for d in differences.values()) for key in unstacked},
            "worst_stack": {"depth": depths[worst], **differences[worst]},
            "worst_stack_running_engine_and_engine_started_from_its_checkpoint": apart(live[worst], fresh),
            "model_that_is_not_stacked": unstacked,
        },
    }
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    swapping = commands.add_parser("swaps")
    swapping.add_argument("--paths", type=int, default=200)
    swapping.add_argument("--restarts", type=int, default=3)
    swapping.add_argument("--out", type=Path)
    searching = commands.add_parser("search")
    searching.add_argument("cases", nargs="*", default=list(CASES), help=", ".join(CASES))
    searching.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    searching.add_argument("--zoo", type=Path, default=Path("zoo"))
    searching.add_argument("--out", type=Path)
    commands.add_parser("table").add_argument("files", type=Path, nargs="+")
    wanted = parser.parse_args()
    if wanted.command == "swaps":
        swaps(wanted.paths, wanted.restarts, wanted.out)
    elif wanted.command == "search":
        search(wanted.cases, wanted.seeds, wanted.zoo, wanted.out)
    else:
        table(wanted.files)


if __name__ == "__main__":
    main()
