"""Strategies at equal budget on functions with a known optimum: `python benchmarks/strategies.py pareto|many|groups|objectives|small|single|map|elites`; and on the demo models: `models`.

Prints one table per family; every row is the mean over the seeds with its standard deviation. Single-threaded; four
candidates are always pending, as with four workers.

pareto   normalised hypervolume (reference 1.1, 1 is the true front) after 200 evaluations
many     hypervolume after 100 and 200 evaluations in 20 and 40 dimensions: normalised as above, and for two noisy skills (see noise.py; reference 0.5,
         standard error 0.03) with different optima, along the axes or along random directions
groups   hypervolume (reference 1, not normalised) after 60, 100 and 200 evaluations for two noisy losses whose coordinates are parameters in several
         groups (see noise.py)
objectives  hypervolume after 100 and 200 evaluations for three noisy losses of groups (reference 1), and for four and six noisy skills in 8 dimensions (reference
         0.8) and DTLZ2 with four and six objectives, halved (reference 0.6); not normalised
small    hypervolume (reference 0.8, not normalised) after 30 to 120 evaluations for two or three noisy skills, along the axes and along random directions
single   log10 of the best gap to the optimum after 25 d, 50 d and 100 d evaluations
map      hypervolume for three experts on the digits task (digits_experts.py) after m + 15 evaluations
elites   quality diversity on the same digits task after 100 and 315 evaluations: the mean over three archives (15 x 15 cells of the other two error rates,
         between all wrong and none) of the QD score and of the filled cells; hypervolume
models   hypervolume and best score of every registered strategy on the demo models after `--budget` evaluations with `--limit` items per task
"""

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from collections.abc import Callable
from datetime import date
from math import pi

import numpy as np
from noise import GROUPED, make_families, make_grouped_loss, make_loss

from evomerge.archive import EliteGrid, hypervolume
from evomerge.core import Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy, strategy_names
from evomerge.strategy.map_surrogate import default_design

N_WORKERS = 4
Floats = np.ndarray


def run(
    name: str,
    function: Callable[[Floats], Floats],
    dimension: int,
    budget: int,
    seed: int,
    noise: float = 0.0,
    **options,
) -> Floats:
    """Losses (budget, m) in the order of the results, without the noise that the strategy sees."""
    n_objectives = len(function(np.full(dimension, 0.5)))
    objectives = [Objective(f"f{i}", Direction.MINIMIZE) for i in range(n_objectives)]
    if name == "m2n2":
        options = {"on": "recipes", **options}  # no models are involved here
    strategy = make_strategy(name, dimension=dimension, objectives=objectives, seed=seed, **options)
    generator = np.random.default_rng(seed)
    pending, losses = [], []
    while len(losses) < budget:
        pending += strategy.ask(N_WORKERS - len(pending))
        candidate = pending.pop(0)
        losses.append(function(np.array(candidate.genome.values)))
        seen = (
            losses[-1] if noise == 0.0 else np.clip(losses[-1] + noise * generator.normal(size=n_objectives), 0.0, 1.0)
        )
        scores = {f"f{i}": float(value) for i, value in enumerate(seen)}
        errors = dict.fromkeys(scores, noise)
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores, stderr=errors)])
    return np.array(losses)


def zdt1(x: Floats) -> Floats:
    g = 1.0 + 9.0 * x[1:].mean()
    return np.array([x[0], g * (1.0 - np.sqrt(x[0] / g))])


def zdt3(x: Floats) -> Floats:
    g = 1.0 + 9.0 * x[1:].mean()
    return np.array([x[0], g * (1.0 - np.sqrt(x[0] / g) - x[0] / g * np.sin(10.0 * pi * x[0]))])


def dtlz2(n_objectives: int) -> Callable[[Floats], Floats]:
    def function(x: Floats) -> Floats:
        radius = 1.0 + np.sum((x[n_objectives - 1 :] - 0.5) ** 2)
        angles = x[: n_objectives - 1] * pi / 2.0
        losses = [np.prod(np.cos(angles))]
        losses += [np.prod(np.cos(angles[:-i])) * np.sin(angles[-i]) for i in range(1, n_objectives)]
        return radius * np.array(losses)

    return function


def skills(dimension: int, n_objectives: int, seed: int, *, rotated: bool) -> Callable[[Floats], Floats]:
    losses = [
        make_loss(dimension, n_objectives * seed + i, rotated=rotated, sharpness=6.0) for i in range(n_objectives)
    ]
    return lambda x: np.array([loss(x) for loss in losses])


def best_volume(function: Callable[[Floats], Floats], dimension: int, n_objectives: int) -> float:
    """Hypervolume of a dense sample of the true front (all distance variables at their optimum)."""
    centre = 0.5 if function not in (zdt1, zdt3) else 0.0
    grid = np.linspace(0.0, 1.0, 20001 if n_objectives == 2 else 101)
    axes = np.stack(np.meshgrid(*[grid] * (n_objectives - 1)), axis=-1).reshape(-1, n_objectives - 1)
    points = np.hstack([axes, np.full((len(axes), dimension - n_objectives + 1), centre)])
    return hypervolume(np.array([function(x) for x in points]), [1.1] * n_objectives)


def pareto(seeds: range, only: list[str] | None) -> None:
    problems = {
        "ZDT1-8D": (zdt1, 8, 2),
        "ZDT3-8D": (zdt3, 8, 2),
        "DTLZ2-6D": (dtlz2(2), 6, 2),
        "DTLZ2-8D-3": (dtlz2(3), 8, 3),
    }
    names = only or ["random", "sobol", "nsga2", "nsga3", "sms_emoa", "m2n2", "optuna", "map", "bo"]
    print(f"normalised hypervolume after 200 evaluations, {len(seeds)} seeds, {date.today()}\n")
    print("| strategy | " + " | ".join(problems) + " |\n|---|" + "---|" * len(problems))
    best = {key: best_volume(*problem) for key, problem in problems.items()}
    for name in names:
        cells = []
        for key, (function, dimension, n_objectives) in problems.items():
            volumes = [
                hypervolume(run(name, function, dimension, 200, seed), [1.1] * n_objectives) / best[key]
                for seed in seeds
            ]
            cells.append(f"{np.mean(volumes):.3f} +- {np.std(volumes):.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def many(seeds: range, only: list[str] | None) -> None:
    def volumes(name: str, problem: str, dimension: int, seed: int) -> list[float]:
        strategy, options = variants.get(name, (name, {}))
        noise, reference, best = 0.0, 1.1, 1.0
        if problem in functions:
            function = functions[problem]
            best = best_volume(function, dimension, len(function(np.full(dimension, 0.5))))
        else:
            function, noise, reference = skills(dimension, 2, seed, rotated=problem == "skills, rotated"), 0.03, 0.5
        losses = run(strategy, function, dimension, 200, seed, noise, **options)
        return [hypervolume(losses[:n], [reference] * losses.shape[1]) / best for n in (100, 200)]

    functions = {"ZDT1": zdt1, "ZDT3": zdt3, "DTLZ2, 2": dtlz2(2)}
    problems = [*functions, "skills", "skills, rotated"]
    variants = {"map, quadratic": ("map", {"model": "quadratic"})}
    print(f"hypervolume after 100 / 200 evaluations, {len(seeds)} seeds, {date.today()}\n")
    print("| dimensions | strategy | " + " | ".join(problems) + " |\n|---|---|" + "---|" * len(problems))
    for dimension in (20, 40):
        for name in only or ["random", "nsga2", "sms_emoa", "optuna", "map", *variants]:
            cells = []
            for problem in problems:
                mean = np.mean([volumes(name, problem, dimension, seed) for seed in seeds], axis=0)
                cells.append(f"{mean[0]:.3f} / {mean[1]:.3f}")
            print(f"| {dimension} | {name} | " + " | ".join(cells) + " |", flush=True)


def groups(seeds: range, only: list[str] | None) -> None:
    def volumes(name: str, kind: str, dimension: int, seed: int) -> list[float]:
        strategy, options = variants.get(name, (name, {}))
        families = make_families(dimension)
        parts = [make_grouped_loss(kind, families, 2 * seed + i) for i in range(2)]
        losses = run(
            strategy,
            lambda x: np.array([part(x) for part in parts]),
            dimension,
            200,
            seed,
            0.03,
            families=families.tolist(),
            **options,
        )
        return [hypervolume(losses[:n], [1.0, 1.0]) for n in (60, 100, 200)]

    related = ("nsga2", "sms_emoa")
    variants = {f"{name}, group_correlation 0": (name, {"group_correlation": 0.0}) for name in related}
    print(f"hypervolume after 60 / 100 / 200 evaluations, {len(seeds)} seeds, {date.today()}\n")
    print("| dimensions | strategy | " + " | ".join(GROUPED) + " |\n|---|---|" + "---|" * len(GROUPED))
    for dimension in (24, 60):
        for name in only or [*related, *variants, "optuna"]:
            cells = []
            for kind in GROUPED:
                mean = np.mean([volumes(name, kind, dimension, seed) for seed in seeds], axis=0)
                cells.append(" / ".join(f"{value:.3f}" for value in mean))
            print(f"| {dimension} | {name} | " + " | ".join(cells) + " |", flush=True)


def objectives(seeds: range, only: list[str] | None) -> None:
    def grouped(kind: str, dimension: int, seed: int) -> tuple[Callable[[Floats], Floats], list[int]]:
        families = make_families(dimension)
        parts = [make_grouped_loss(kind, families, 3 * seed + i) for i in range(3)]
        return lambda x: np.array([part(x) for part in parts]), families.tolist()

    def volumes(name: str, problem: str, seed: int) -> list[float]:
        kind, size = problem.split()
        n = int(size)
        if kind in GROUPED:
            function, families = grouped(kind, n, seed)
            losses, reference = run(name, function, n, 200, seed, 0.03, families=families), 1.0
        elif kind == "skills":
            losses, reference = run(name, skills(8, n, seed, rotated=False), 8, 200, seed, 0.03), 0.8
        else:
            losses, reference = run(name, lambda x: dtlz2(n)(x) / 2.0, n + 4, 200, seed), 0.6
        return [hypervolume(losses[:count], [reference] * losses.shape[1]) for count in (100, 200)]

    problems = [
        "related 24",
        "unrelated 24",
        "related 60",
        "unrelated 60",
        "skills 4",
        "skills 6",
        "DTLZ2 4",
        "DTLZ2 6",
    ]
    print(f"hypervolume after 100 / 200 evaluations, {len(seeds)} seeds, {date.today()}\n")
    print("| strategy | " + " | ".join(problems) + " |\n|---|" + "---|" * len(problems))
    for name in only or ["random", "nsga2", "nsga3", "sms_emoa", "cycleqd", "map"]:
        cells = []
        for problem in problems:
            found = [volumes(name, problem, seed) for seed in seeds]
            mean, error = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(seeds))
            cells.append(" / ".join(f"{m:.3f} +- {e:.3f}" for m, e in zip(mean, error, strict=True)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def small(seeds: range, only: list[str] | None) -> None:
    budgets = (30, 40, 60, 80, 120)

    def volumes(name: str, dimension: int, n_objectives: int, *, rotated: bool) -> Floats:
        rows = []
        for seed in seeds:
            function = skills(dimension, n_objectives, seed, rotated=rotated)
            losses = run(name, function, dimension, budgets[-1], seed, 0.03)
            rows.append([hypervolume(losses[:count], [0.8] * n_objectives) for count in budgets])
        return np.mean(rows, axis=0)

    print(f"hypervolume, {len(seeds)} seeds, {date.today()}\n")
    print(f"| objectives | dimensions | `map` waits for | strategy | {' | '.join(map(str, budgets))} |")
    print("|---|---|---|---|" + "---|" * len(budgets))
    for n_objectives, dimension in ((2, 4), (2, 8), (3, 8), (2, 16), (3, 20)):
        for name in only or ["map", "cycleqd"]:
            along, turned = (volumes(name, dimension, n_objectives, rotated=rotated) for rotated in (False, True))
            cells = " | ".join(f"{one:.3f}, {other:.3f}" for one, other in zip(along, turned, strict=True))
            print(f"| {n_objectives} | {dimension} | {default_design(dimension)} | {name} | {cells} |", flush=True)


def single(seeds: range, only: list[str] | None) -> None:
    def rotated_ellipsoid(x: Floats) -> Floats:
        rotation = np.linalg.qr(np.random.default_rng(len(x)).normal(size=(len(x), len(x))))[0]
        return np.array([np.sum(10.0 ** np.linspace(0, 3, len(x)) * (rotation @ (x - 0.4)) ** 2)])

    def rosenbrock(x: Floats) -> Floats:
        y = 4.0 * x - 2.0
        return np.array([np.sum(100.0 * (y[1:] - y[:-1] ** 2) ** 2 + (1.0 - y[:-1]) ** 2)])

    def rastrigin(x: Floats) -> Floats:
        y = 10.0 * (x - 0.45)
        return np.array([np.sum(y**2 - 10.0 * np.cos(2.0 * pi * y) + 10.0)])

    names = only or ["random", "cma_es", "nevergrad", "optuna", "map", "bo"]
    functions = {"ellipsoid": rotated_ellipsoid, "rosenbrock": rosenbrock, "rastrigin": rastrigin}
    print(f"log10 of the gap after 25d / 50d / 100d evaluations, d = 5, median of {len(seeds)} seeds, {date.today()}\n")
    print("| strategy | " + " | ".join(functions) + " |\n|---|" + "---|" * len(functions))
    for name in names:
        cells = []
        for function in functions.values():
            gaps = np.array([np.minimum.accumulate(run(name, function, 5, 500, seed)[:, 0]) for seed in seeds])
            cells.append(" / ".join(f"{np.median(np.log10(gaps[:, n - 1] + 1e-12)):.1f}" for n in (125, 250, 500)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def amortised(seeds: range, only: list[str] | None) -> None:
    from digits_experts import digits_experts

    function = digits_experts()
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 9)] * 3), axis=-1).reshape(-1, 3)
    whole = hypervolume(np.array([function(x) for x in grid]), [1.0] * 3)
    print(
        f"hypervolume (reference: all wrong) after m + 15 evaluations, {len(seeds)} seeds, {date.today()}; grid: {whole:.3f}\n"
    )
    print("| strategy | m = 15 | m = 20 | m = 30 | m = 60 |\n|---|---|---|---|---|")
    variants = {"map, design of m": ("map", {"n_initial": None}), "map, bayesian": ("map", {"bayesian": True})}
    for name in only or ["random", "sobol", "nsga2", "map", *variants, "bo"]:
        strategy, options = variants.get(name, (name, {}))
        cells = []
        for m in (15, 20, 30, 60):
            chosen = {"n_initial": m} if "n_initial" in options else options
            volumes = [hypervolume(run(strategy, function, 3, m + 15, seed, **chosen), [1.0] * 3) for seed in seeds]
            cells.append(f"{np.mean(volumes):.3f} +- {np.std(volumes):.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def elites(seeds: range, only: list[str] | None) -> None:
    from digits_experts import digits_experts

    def filled(losses: Floats) -> tuple[float, float]:
        grids = [EliteGrid([-1.0, -1.0], [0.0, 0.0], 15) for _ in range(3)]
        for row in -losses:
            for index, grid in enumerate(grids):
                grid.add(row[index], np.delete(row, index))
        return np.mean([grid.score(-1.0) for grid in grids]), np.mean([len(grid) for grid in grids])

    function = digits_experts()
    print(f"after 100 / 315 evaluations, {len(seeds)} seeds, {date.today()}\n")
    print("| strategy | QD score | cells | hypervolume |\n|---|---|---|---|")
    for name in only or ["random", "sobol", "nsga2", "sms_emoa", "m2n2", "map", "map_elites", "cycleqd"]:
        rows = []
        for seed in seeds:
            losses = run(name, function, 3, 315, seed)
            parts = [losses[:n] for n in (100, 315)]
            rows.append([*map(filled, parts), *[[hypervolume(part, [1.0] * 3)] for part in parts]])
        (early, late, early_volume, late_volume) = [np.mean(part, axis=0) for part in zip(*rows, strict=True)]
        spread = np.std([row[1][0] for row in rows])
        print(
            f"| {name} | {early[0]:.1f} / {late[0]:.1f} +- {spread:.1f} | {early[1]:.0f} / {late[1]:.0f} | "
            f"{early_volume[0]:.3f} / {late_volume[0]:.3f} |",
            flush=True,
        )


def models(seeds: range, only: list[str] | None, budget: int = 40, limit: int = 60) -> None:
    from demo_models import VARIANTS, DemoModels

    demo = DemoModels(limit)
    print(f"{budget} evaluations of {limit} items a task, baselines included, {len(seeds)} seeds, {date.today()}")
    print("mean +- standard error over the seeds; s: of one search\n")
    print("| strategy | hypervolume | best mean score | its report score | s |\n|---|---|---|---|---|")
    for name in only or dict.fromkeys([*strategy_names(), *VARIANTS]):
        started = time.perf_counter()
        found = np.array([demo.search(name, budget, seed) for seed in seeds])
        errors = found.std(axis=0, ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else [np.nan] * 3
        cells = " | ".join(f"{mean:.3f} +- {error:.3f}" for mean, error in zip(found.mean(axis=0), errors, strict=True))
        print(f"| {name} | {cells} | {(time.perf_counter() - started) / len(seeds):.0f} |", flush=True)
    demo.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = {
        "pareto": pareto,
        "many": many,
        "groups": groups,
        "objectives": objectives,
        "small": small,
        "single": single,
        "map": amortised,
        "elites": elites,
        "models": models,
    }
    parser.add_argument("family", choices=families)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="strategies to run")
    parser.add_argument("--budget", type=int, default=40)
    parser.add_argument("--limit", type=int, default=60)
    arguments = parser.parse_args()
    further = {"budget": arguments.budget, "limit": arguments.limit} if arguments.family == "models" else {}
    families[arguments.family](range(arguments.seeds), arguments.only, **further)
