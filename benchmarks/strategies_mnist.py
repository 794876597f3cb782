"""Strategies and samplers of other libraries at equal budgets, on a merge with real noise: three experts for MNIST digits (see items_mnist.py).

    python benchmarks/strategies_mnist.py mnist.npz [--candidates 200 400] [--search-items 30] [--seeds 12] [--only cma_es]

24 weights; candidates, including the nine baselines, are scored on 30 items of each of three tasks; two are pending. The best eight and the one that the strategy
recommends are ranked on 300 further items of each task. Prints the winner's accuracy on the test images, as the mean over seeds with its standard error: items, baselines and seeds are
the same for all strategies, so differences from the first row are paired. `map`, `nsga2` and `cycleqd` see the three tasks, all others their mean.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from datetime import date
from pathlib import Path

import numpy as np
import torch
from items_mnist import GROUPS, Mnist, search

STRATEGIES: dict[str, tuple[str, dict[str, object]]] = {
    "cma_es": ("cma_es", {}),
    "cma_es without surrogate": ("cma_es", {"surrogate": "none"}),
    "CMA-ES of pycma": ("cma_es", {"surrogate": "none", "group_correlation": 0, "start": "centre"}),
    "TPE of Optuna": ("optuna", {}),
    "CMA-ES of Optuna": ("optuna", {"sampler": "CmaEsSampler"}),
    "NGOpt of Nevergrad": ("nevergrad", {}),
    "ga": ("ga", {}),
    "map": ("map", {}),
    "nsga2": ("nsga2", {}),
    "cycleqd": ("cycleqd", {}),
    "sobol": ("sobol", {}),
    "random": ("random", {}),
}
"""row -> strategy and options; the others are told of the baselines too, and start at their default starting points"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", type=Path)
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[200, 400], help="of each search, baselines included"
    )
    parser.add_argument("--search-items", type=int, default=30, help="of each task")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mnist = Mnist(arguments.mnist)
    print(f"{arguments.search_items} items of a task, {arguments.seeds} seeds, {date.today()}\n")
    print("| strategy | candidates | accuracy | less than the first |\n|---|---|---|---|")
    for n_candidates in arguments.candidates:
        first = None
        for row in arguments.only:
            name, options = STRATEGIES[row]
            if name == "nevergrad":
                options = options | {"budget": n_candidates}
            found = np.array(
                [
                    search(
                        mnist,
                        arguments.search_items,
                        n_candidates * arguments.search_items * len(GROUPS),
                        seed,
                        name,
                        families=True,
                        mean_alone=name not in ("map", "nsga2", "cycleqd"),
                        **options,
                    )[0]
                    for seed in range(arguments.seeds)
                ]
            )
            first = found if first is None else first
            less = first - found
            error, paired = (values.std(ddof=1) / len(values) ** 0.5 for values in (found, less))
            print(
                f"| {row} | {n_candidates} | {found.mean():.4f} ± {error:.4f} | {less.mean():.4f} ± {paired:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
