"""Stacks of many depths through one running vLLM engine: time of a swap, against starting an engine from a written checkpoint.

    python benchmarks/stacking.py [--paths 200] [--restarts 3] [--out FILE.json]

Random paths over two random Llama models of 8 layers (13M parameters, float32): 1 to 12 layers with repeats and scales of 0.3 to 2.
Each swap is planning, padding, merging into the live parameters and forgetting the cache. What a restart costs is measured on a few
of the same paths in the same run: write the checkpoint, start an engine, close it. Every tenth stack's answers are compared with those
of the path's own checkpoint in transformers.
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
from pathlib import Path

from evomerge.engine import engine_environment

os.environ.update(engine_environment())

from evomerge.core import Json
from evomerge.engine import Engine, LogLikelihoodRequest, make_engine
from evomerge.plan import folding_of, make_plan, padded, read_model_header
from evomerge.recipe import Hop, Recipe, stack_recipe
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool, merge_to_folder, write_slots_folder

MAX_SLOTS = 12
N_LAYERS = 8
REQUESTS = [LogLikelihoodRequest(tuple(range(5, 25)), (token, 40)) for token in (30, 31, 32)]
SETTINGS: dict[str, Json] = {"kv_cache_memory_bytes": 64 << 20}


def random_path(models: list[str], draw: random.Random) -> list[Hop]:
    scale = (math.log(0.3), math.log(2.0))
    return [
        Hop(draw.randrange(N_LAYERS), ((draw.choice(models), 1.0),), math.exp(draw.uniform(*scale)))
        for _ in range(draw.randint(1, MAX_SLOTS))
    ]


def worst_difference(engine: Engine, recipe: Recipe, folder: Path) -> float:
    """Largest difference of a log-probability between the running engine and the path's own checkpoint in transformers."""
    merge_to_folder(recipe, folder)
    alone = make_engine("transformers", folder, dtype="float32", max_model_len=64)
    pairs = zip(engine.loglikelihood(REQUESTS), alone.loglikelihood(REQUESTS), strict=True)
    worst = max(abs(ours.log_probability - theirs.log_probability) for ours, theirs in pairs)
    alone.close()
    return worst


def restart_s(recipe: Recipe, folder: Path) -> float:
    """Seconds to write a checkpoint and start an engine from it."""
    started = time.perf_counter()
    merge_to_folder(recipe, folder)
    engine = make_engine("vllm", folder, dtype="float32", max_model_len=64, options=SETTINGS)
    taken = time.perf_counter() - started
    engine.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", type=int, default=200)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
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
        draw, swaps, depths, differences, recipes = random.Random(1), [], [], [], []
        for index in range(wanted.paths):
            hops = random_path(models, draw)
            recipe = stack_recipe(hops, ends=[(models[0], 1.0)], folding=folding, out_dtype="float32")
            started = time.perf_counter()
            plan = padded(make_plan(recipe, headers), MAX_SLOTS, folding.silenced)
            engine.update(lambda target, plan=plan: merger.write(plan, target))
            swaps.append(time.perf_counter() - started)
            depths.append(len(hops))
            recipes.append(recipe)
            if index % 10 == 0:
                differences.append(worst_difference(engine, recipe, folder / f"path-{index}"))
        restarts = [restart_s(recipe, folder / f"restart-{i}") for i, recipe in enumerate(recipes[: wanted.restarts])]
        engine.close()
    warm = swaps[5:]
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "paths": wanted.paths,
        "depths": [min(depths), max(depths)],
        "restarts_of_the_engine_between_paths": 0,
        "swap_ms": {"median": 1e3 * statistics.median(warm), "longest": 1e3 * max(warm)},
        "restart_ms": 1e3 * statistics.median(restarts),
        "restart_over_swap": statistics.median(restarts) / statistics.median(warm),
        "worst_log_probability_difference": max(differences),
        "compared": len(differences),
    }
    print(json.dumps(result, indent=2))
    if wanted.out:
        wanted.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
