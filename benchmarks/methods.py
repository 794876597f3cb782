"""Is it better to choose a merge method, or to let the search choose it? On the demo models, with equal numbers of candidates.

    python benchmarks/methods.py --seeds 4 --budgets 60,110,200 --limit 100

One row for each method searched alone by `cma_es`, and for all of them together (`method: [...]`) by every strategy of --together. For each
budget, prints the mean over the seeds of the best candidate's mean score on `report`, which the search does not see, and that of every seed.
Three experts; one weight for each whole expert, and one density if the method has densities. Baselines count as candidates.
"""

import argparse

import numpy as np
from demo_models import DemoModels

METHODS = ("task_arithmetic", "ties", "dare_ties", "breadcrumbs")
TOGETHER = ("catcma", "optuna", "ga", "cma_es", "random")


def measure(methods: list[str], strategies: list[str], seeds: range, budgets: list[int], limit: int) -> None:
    """Measures the rows of one space."""
    demo = DemoModels(limit, {"method": methods})
    for strategy in strategies:
        cells = []
        for budget in budgets:
            scores = [demo.search(strategy, budget, seed)[2] for seed in seeds]
            cells.append(f"{np.mean(scores):.3f} ({' '.join(f'{score:.3f}' for score in scores)})")
        print(f"| {', '.join(methods)} | `{strategy}` | {' | '.join(cells)} |", flush=True)
    demo.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--together", default=",".join(TOGETHER), help="strategies that choose the method too")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--budgets", default="60,110,200", help="candidates, comma-separated")
    parser.add_argument("--limit", type=int, default=100, help="items of each task and split")
    options = parser.parse_args()
    methods, budgets = options.methods.split(","), [int(budget) for budget in options.budgets.split(",")]
    print(f"| methods | strategy | {' | '.join(f'after {budget}' for budget in budgets)} |")
    print("|---" * (2 + len(budgets)) + "|")
    measure(methods, options.together.split(","), range(options.seeds), budgets, options.limit)
    for method in methods:
        measure([method], ["cma_es"], range(options.seeds), budgets, options.limit)


if __name__ == "__main__":
    main()
