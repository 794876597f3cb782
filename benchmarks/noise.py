"""Strategies on a smooth score of many weights that is only known up to the noise of a few hundred items.

    python benchmarks/noise.py [--dimensions 36 60] [--budgets 200 400] [--seeds 8] [--noise 0.03]

The loss is 1 - exp(-12 q) with q a weighted mean of squared distances to a random point of [0.3, 0.7]^d; weights span two orders of
magnitude, along the coordinates or along random directions (`rotated`). Four candidates are pending. Printed is the true loss of what the
strategy recommends, the mean over seeds with its standard error; a random point has about 0.7.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from datetime import date

import numpy as np

from evomerge.core import Candidate, Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy

WORKERS = 4
STRATEGIES = {
    "cma_es": ("cma_es", {}),
    "cma_es, surrogate none": ("cma_es", {"surrogate": "none"}),
    "cma_es, variant sep": ("cma_es", {"variant": "sep"}),
}


def make_loss(dimension: int, seed: int, *, rotated: bool, sharpness: float = 12.0) -> Callable[[np.ndarray], float]:
    generator = np.random.default_rng(1000 + seed)
    optimum = 0.3 + 0.4 * generator.random(dimension)
    weights = 10.0 ** generator.uniform(0.0, 2.0, dimension)
    weights /= weights.sum()
    turn = np.linalg.qr(generator.normal(size=(dimension, dimension)))[0] if rotated else np.eye(dimension)
    return lambda point: float(1.0 - np.exp(-sharpness * np.sum(weights * (turn @ (point - optimum)) ** 2)))


def recommended_loss(name: str, dimension: int, budget: int, seed: int, noise: float, *, rotated: bool) -> float:
    strategy_name, options = STRATEGIES[name]
    goal = [Objective("loss", Direction.MINIMIZE)]
    strategy = make_strategy(strategy_name, dimension=dimension, objectives=goal, seed=seed, **options)
    loss, generator = make_loss(dimension, seed, rotated=rotated), np.random.default_rng(seed)
    pending: list[Candidate] = []
    for _ in range(budget):
        pending += strategy.ask(WORKERS - len(pending))
        candidate = pending.pop(0)
        score = loss(np.array(candidate.genome.values)) + noise * generator.normal()
        strategy.tell(
            [Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"loss": score}, stderr={"loss": noise})]
        )
    return loss(np.array(strategy.recommend().point))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=int, nargs="*", default=[36, 60])
    parser.add_argument("--budgets", type=int, nargs="*", default=[200, 400])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.03)
    options = parser.parse_args()
    print(f"noise {options.noise}, {options.seeds} seeds, {date.today()}\n")
    print(f"| dimensions | loss | evaluations | {' | '.join(STRATEGIES)} |")
    print("|---" * (3 + len(STRATEGIES)) + "|")
    for dimension in options.dimensions:
        for rotated in (False, True):
            for budget in options.budgets:
                cells = []
                for name in STRATEGIES:
                    found = [
                        recommended_loss(name, dimension, budget, seed, options.noise, rotated=rotated)
                        for seed in range(options.seeds)
                    ]
                    cells.append(f"{np.mean(found):.3f} +- {np.std(found, ddof=1) / len(found) ** 0.5:.3f}")
                print(
                    f"| {dimension} | {'rotated' if rotated else 'along the axes'} | {budget} | {' | '.join(cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
