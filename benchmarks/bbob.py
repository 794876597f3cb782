"""The 24 BBOB functions (COCO, 10.1080/10556788.2020.1808977) at 25, 50 and 100 evaluations per dimension.

    python benchmarks/bbob.py --dimension 5 --instances 1 2 3 4 5

Prints the fraction of the 51 targets f_opt + 10^2 ... 10^-8 that are hit, as the mean over functions and instances with the
standard error over instances. `--numbers 1 4 7 --longest 25` runs a subset. Peers run in the same way: pycma and its surrogate-assisted `fmin_lq_surr2`, from a random
start in [-4, 4]^d with step size 2, restarted until the budget is spent. Single-threaded. `--workers 4` keeps four candidates
pending; peers always evaluate one candidate at a time.
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date

import cma
import cocoex
import numpy as np

from evomerge.core import Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy

TARGETS = 10.0 ** np.linspace(2, -8, 51)
BUDGETS = (25, 50, 100)
LOW, HIGH = -5.0, 5.0
OURS = {
    "cma_es": ("cma_es", {}),
    "cma_es, surrogate none": ("cma_es", {"surrogate": "none"}),
    "cma_es, surrogate diagonal": ("cma_es", {"surrogate": "diagonal"}),
    "cma_es, bipop": ("cma_es", {"restarts": "bipop"}),
    "sobol": ("sobol", {}),
    "random": ("random", {}),
    "bo": ("bo", {}),
    "optuna": ("optuna", {}),
    "nevergrad": ("nevergrad", {}),
}
Losses = list[float]
Function = Callable[[np.ndarray], float]


def ours(name: str, function: Function, dimension: int, budget: int, seed: int, workers: int) -> Losses:
    """Losses in the order of the results."""
    strategy_name, options = OURS[name]
    if strategy_name == "nevergrad":
        options = {"budget": budget, "n_workers": max(2, workers)}
    objective = Objective("loss", Direction.MINIMIZE)
    strategy = make_strategy(strategy_name, dimension=dimension, objectives=[objective], seed=seed, **options)
    pending, losses = [], []
    while len(losses) < budget and (pending or not strategy.stop_reasons()):
        pending += strategy.ask(workers - len(pending))
        candidate = pending.pop(0)
        losses.append(function(LOW + (HIGH - LOW) * np.array(candidate.genome.values)))
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores={"loss": losses[-1]})])
    return losses


def peer(name: str, function: Function, dimension: int, budget: int, seed: int, workers: int) -> Losses:
    """The losses of pycma in the same form; it is restarted from random points until the budget is spent."""
    generator, losses = np.random.default_rng(seed), []

    def counted(point: np.ndarray) -> float:
        losses.append(function(np.asarray(point)))
        return losses[-1]

    search = {"pycma": cma.fmin2, "pycma lq": cma.fmin_lq_surr2}[name]
    while len(losses) < budget:
        options = {"verbose": -9, "verb_log": 0, "seed": seed * 97 + len(losses) + 1, "maxfevals": budget - len(losses)}
        search(counted, generator.uniform(-4, 4, dimension), 2.0, options)
    return losses[:budget]


def fractions(losses: Losses, optimum: float, dimension: int, budgets: Sequence[int]) -> list[float]:
    """Fraction of the targets hit within each of `budgets` evaluations per dimension."""
    best = np.minimum.accumulate(losses) - optimum
    return [float(np.mean(best[min(budget * dimension, len(best)) - 1] <= TARGETS)) for budget in budgets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=5)
    parser.add_argument("--instances", type=int, nargs="*", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="*", default=["pycma", "pycma lq", "cma_es", "cma_es, surrogate none", "sobol"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--numbers", type=int, nargs="*", default=list(range(1, 25)), help="functions to run")
    parser.add_argument("--longest", type=int, choices=BUDGETS, default=BUDGETS[-1], help="evaluations per dimension")
    parser.add_argument("--functions", action="store_true", help="a row per function")
    arguments = parser.parse_args()
    dimension, instances, numbers = arguments.dimension, arguments.instances, arguments.numbers
    budgets = [budget for budget in BUDGETS if budget <= arguments.longest]
    which = "all functions" if len(numbers) == 24 else f"functions {numbers}"
    print(f"BBOB, d = {dimension}, {which}, instances {instances}, {arguments.workers} pending, {date.today()}\n")
    print("| optimiser | " + " | ".join(f"{budget} d" for budget in budgets) + " | ms an evaluation |")
    print("|---|" + "---|" * (len(budgets) + 1), flush=True)
    for name in arguments.only:
        hit = np.empty((len(numbers), len(instances), len(budgets)))
        spent = time.process_time()
        for row, number in enumerate(numbers):
            for column, instance in enumerate(instances):
                problem = cocoex.BareProblem("bbob", number, dimension, instance)
                run = ours if name in OURS else peer
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    seed = 100 * number + instance
                    losses = run(name, problem, dimension, budgets[-1] * dimension, seed, arguments.workers)
                hit[row, column] = fractions(losses, problem.best_value(), dimension, budgets)
        spent = 1e3 * (time.process_time() - spent) / (len(numbers) * len(instances) * budgets[-1] * dimension)
        cells = [f"{mean:.3f}" for mean in hit.mean(axis=(0, 1))]
        if len(instances) > 1:
            errors = hit.mean(axis=0).std(axis=0, ddof=1) / np.sqrt(len(instances))
            cells = [f"{cell} +- {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + f" | {spent:.2f} |", flush=True)
        if arguments.functions:
            for number, values in zip(numbers, hit.mean(axis=1), strict=True):
                print(f"| - f{number} | " + " | ".join(f"{value:.3f}" for value in values) + " | |")


if __name__ == "__main__":
    main()
