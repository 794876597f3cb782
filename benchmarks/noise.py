"""Strategies on a smooth score of many weights that is known only up to the noise of a few hundred items.

    python benchmarks/noise.py [--groups] [--dimensions 36 60] [--budgets 200 400] [--seeds 8] [--noise 0.03]

The loss is 1 - exp(-12 q) with q a weighted mean of squared distances to a random point of [0.3, 0.7]^d; weights span two orders of
magnitude, along the coordinates or along random directions (`rotated`). Four candidates are pending. Prints the true loss of what the
strategy recommends, as the mean over seeds with its standard error; a random point has about 0.7.

With --groups the coordinates are three parameters (six from 36 dimensions on) in several groups each, and weights span one order of magnitude. The optimum
is a level for each parameter in [0.2, 0.8] with differences of 0.1 from it (`related`), or uniform in [0.1, 0.9] (`unrelated`). `sums`: 0.7 of q comes
from the weighted mean over the groups. `one group`: the same budget spent on the levels alone.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from datetime import date
from functools import partial

import numpy as np

from evomerge.core import Candidate, Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import Strategy, make_strategy

WORKERS = 4
GOAL = [Objective("loss", Direction.MINIMIZE)]
STRATEGIES = {
    "cma_es": ("cma_es", {}),
    "cma_es, surrogate none": ("cma_es", {"surrogate": "none"}),
    "cma_es, variant sep": ("cma_es", {"variant": "sep"}),
}

WITH_GROUPS = {
    "cma_es": {},
    "cma_es, group_correlation 0": {"group_correlation": 0.0},
    "cma_es, one group": None,
}
GROUPED = ("related", "related, sums", "unrelated", "unrelated, rotated")


def make_loss(dimension: int, seed: int, *, rotated: bool, sharpness: float = 12.0) -> Callable[[np.ndarray], float]:
    generator = np.random.default_rng(1000 + seed)
    optimum = 0.3 + 0.4 * generator.random(dimension)
    weights = 10.0 ** generator.uniform(0.0, 2.0, dimension)
    weights /= weights.sum()
    turn = np.linalg.qr(generator.normal(size=(dimension, dimension)))[0] if rotated else np.eye(dimension)
    return lambda point: float(1.0 - np.exp(-sharpness * np.sum(weights * (turn @ (point - optimum)) ** 2)))


def make_families(dimension: int) -> np.ndarray:
    n_families = 3 if dimension < 36 else 6
    return np.repeat(np.arange(n_families), dimension // n_families)


def make_grouped_loss(kind: str, families: np.ndarray, seed: int) -> Callable[[np.ndarray], float]:
    generator, dimension = np.random.default_rng(1000 + seed), len(families)
    levels = generator.uniform(0.2, 0.8, families[-1] + 1)[families]
    optimum = np.clip(levels + 0.1 * generator.normal(size=dimension), 0.0, 1.0)
    if kind.startswith("unrelated"):
        optimum = generator.uniform(0.1, 0.9, dimension)
    weights = 10.0 ** generator.uniform(0.0, 1.0, dimension)
    weights /= weights.sum()
    curvature = np.diag(weights)
    if kind.endswith("rotated"):
        turn = np.linalg.qr(generator.normal(size=(dimension, dimension)))[0]
        curvature = turn.T @ curvature @ turn
    if kind.endswith("sums"):
        means = np.where(families == np.arange(families[-1] + 1)[:, None], weights, 0.0)
        shares = means.sum(axis=1, keepdims=True)
        curvature = 0.3 * curvature + 0.7 * (means / shares).T @ (shares * (means / shares))
    return lambda point: float(1.0 - np.exp(-12.0 * (point - optimum) @ curvature @ (point - optimum)))


def search(strategy: Strategy, loss: Callable[[np.ndarray], float], budget: int, seed: int, noise: float) -> float:
    generator = np.random.default_rng(seed)
    pending: list[Candidate] = []
    for _ in range(budget):
        pending += strategy.ask(WORKERS - len(pending))
        candidate = pending.pop(0)
        score = loss(np.array(candidate.genome.values)) + noise * generator.normal()
        strategy.tell(
            [Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"loss": score}, stderr={"loss": noise})]
        )
    return loss(np.array(strategy.recommend().point))


def recommended_loss(name: str, dimension: int, budget: int, seed: int, noise: float, *, rotated: bool) -> float:
    strategy_name, options = STRATEGIES[name]
    strategy = make_strategy(strategy_name, dimension=dimension, objectives=GOAL, seed=seed, **options)
    return search(strategy, make_loss(dimension, seed, rotated=rotated), budget, seed, noise)


def grouped_loss(name: str, dimension: int, budget: int, seed: int, noise: float, *, kind: str) -> float:
    options, families = WITH_GROUPS[name], make_families(dimension)
    loss = make_grouped_loss(kind, families, seed)
    if options is None:
        strategy = make_strategy("cma_es", dimension=families[-1] + 1, objectives=GOAL, seed=seed)
        return search(strategy, lambda levels: loss(levels[families]), budget, seed, noise)
    strategy = make_strategy(
        "cma_es", dimension=dimension, families=families.tolist(), objectives=GOAL, seed=seed, **options
    )
    return search(strategy, loss, budget, seed, noise)


def table(rows: dict[str, Callable[..., float]], names: list[str], options: argparse.Namespace) -> None:
    print(f"noise {options.noise}, {options.seeds} seeds, {date.today()}\n")
    print(f"| dimensions | loss | evaluations | {' | '.join(names)} |")
    print("|---" * (3 + len(names)) + "|")
    for dimension in options.dimensions:
        for label, measure in rows.items():
            for budget in options.budgets:
                cells = []
                for name in names:
                    found = [measure(name, dimension, budget, seed, options.noise) for seed in range(options.seeds)]
                    cells.append(f"{np.mean(found):.3f} +- {np.std(found, ddof=1) / len(found) ** 0.5:.3f}")
                print(f"| {dimension} | {label} | {budget} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", action="store_true")
    parser.add_argument("--dimensions", type=int, nargs="*", default=[36, 60])
    parser.add_argument("--budgets", type=int, nargs="*", default=[200, 400])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--noise", type=float, default=0.03)
    options = parser.parse_args()
    if options.groups:
        table({kind: partial(grouped_loss, kind=kind) for kind in GROUPED}, list(WITH_GROUPS), options)
    else:
        labels = {"along the axes": False, "rotated": True}
        rows = {label: partial(recommended_loss, rotated=rotated) for label, rotated in labels.items()}
        table(rows, list(STRATEGIES), options)


if __name__ == "__main__":
    main()
