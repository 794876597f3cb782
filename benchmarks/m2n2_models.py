"""M2N2 on language models, from finished runs: `python benchmarks/m2n2_models.py RUN...` (runs of configs/niches.yaml).

For every run: the coverage of its archive and its best member over the course of the run; memory per member; and, for the deepest descendant in
the archive, how far its weights from coefficients are from explicit successive SLERPs of whole weight vectors in float64.

    evomerge search configs/niches.yaml --run-dir runs/m2n2
    evomerge search configs/niches.yaml --run-dir runs/random --set strategy.warm_up=1000
    evomerge search configs/niches.yaml --run-dir runs/ga --set strategy.alpha=0 --set strategy.attraction=false
"""

import argparse
import json
from datetime import date
from pathlib import Path

import numpy as np
import torch
from digits_children import arc

from evomerge.archive import coverage, solve_rate_entropy
from evomerge.build import make_problem, open_run
from evomerge.build.strategies import strategy_for
from evomerge.core import Candidate, CrossoverGenome, VectorGenome
from evomerge.plan import make_plan
from evomerge.search import read_journal
from evomerge.weights import Merger, WeightPool

MARKS = (50, 100, 200, 300)
Floats = np.ndarray


def replay(run) -> tuple[dict[int, tuple[float, float, float]], list[str]]:
    """(coverage, entropy, best mean item score) of the archive after various numbers of children, and the ids in the last archive."""
    strategy, told = strategy_for(make_problem(run.config)), 0
    table: dict[int, tuple[float, float, float]] = {}
    for event in read_journal(run.directory.journal):
        if event["event"] == "seeded":
            names = event["ids"]
            strategy.seed([run.state.entries[n].candidate() for n in names], [run.evaluation(n) for n in names])
        elif event["event"] == "asked":
            assert strategy.ask(1)[0].id == event["id"]
        elif event["event"] == "told":
            strategy.tell([run.evaluation(name) for name in event["ids"]])
            told += len(event["ids"])
            if told in MARKS:
                items = np.array([row for _, row in strategy.archive])
                table[told] = (coverage(items), solve_rate_entropy(items), float(items.mean(axis=1).max()))
    return table, [name for name, _ in strategy.archive]


def depths(run) -> dict[str, int]:
    """Number of generations between each candidate and the seeds."""
    found: dict[str, int] = {}
    for name, entry in run.state.entries.items():
        known = [found[parent] for parent in entry.parents]
        found[name] = 1 + max(known) if known else 0
    return found


def explicit(run, chromosomes: list[list], pool: WeightPool, name: str) -> list[Floats]:
    """The descendant `name` as one float64 vector per chromosome, by SLERPs of whole vectors, one ancestor after another."""
    weights: dict[str, list[Floats]] = {}

    def seed(values: tuple[float, ...]) -> list[Floats]:
        index = values.index(1.0)
        parts = [[step.inputs[index] for step in steps] for steps in chromosomes]
        return [torch.cat([pool.tensor(e.source, e.tensor).double().flatten() for e in part]).numpy() for part in parts]

    open_names = [name]
    while open_names:
        genome = run.state.entries[open_names[-1]].genome
        if isinstance(genome, VectorGenome):
            weights[open_names.pop()] = seed(genome.values)
            continue
        missing = [parent for parent in genome.parents if parent not in weights]
        if missing:
            open_names += missing
            continue
        a, b = (weights[parent] for parent in genome.parents)
        whole_a, whole_b = np.concatenate(a), np.concatenate(b)
        cosine = float(whole_a @ whole_b / np.sqrt((whole_a @ whole_a) * (whole_b @ whole_b)))
        child = []
        for part_a, part_b, split in zip(a, b, genome.splits, strict=True):
            left = np.arange(len(part_a)) < int(split * len(part_a))
            (a1, b1), (a2, b2) = arc(genome.mix, cosine), arc(1.0 - genome.mix, cosine)
            child.append(np.where(left, a1 * part_a + b1 * part_b, a2 * part_a + b2 * part_b))
        weights[open_names.pop()] = child
    return weights[name]


def rebuilt(run, archive: list[str]) -> dict[str, float]:
    """Depth, pieces, and relative difference from explicit SLERPs of the deepest member; kilobytes per member."""
    problem = make_problem(run.config)
    entries, depth = run.state.entries, depths(run)
    lineage = problem.crossings.lineage()
    combinations = {
        name: lineage.combination(entries[name].candidate(), lambda other: entries[other].genome) for name in archive
    }
    deepest = max(archive, key=lambda name: depth[name])
    candidate: Candidate = entries[deepest].candidate()
    recipe = lineage.recipe(candidate, lambda other: entries[other].genome)
    pool = WeightPool(problem.headers)
    recipe = type(recipe).from_json({**recipe.to_json(), "out_dtype": "float32"})
    merged = dict(Merger(pool).tensors(make_plan(recipe, problem.headers)))
    chromosomes = problem.crossings.chromosomes
    got = np.concatenate([merged[step.output].double().flatten().numpy() for steps in chromosomes for step in steps])
    wanted = np.concatenate(explicit(run, chromosomes, pool, deepest))
    journaled = [
        len(json.dumps(event))
        for event in read_journal(run.directory.journal)
        if event["event"] == "asked" and isinstance(entries[event["id"]].genome, CrossoverGenome)
    ]
    return {
        "deepest": depth[deepest],
        "its pieces": sum(len(ends) for ends in combinations[deepest].ends),
        "relative difference": float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)),
        "kB per member, mean": float(np.mean([item.n_bytes for item in combinations.values()])) / 1e3,
        "kB per member, largest": max(item.n_bytes for item in combinations.values()) / 1e3,
        "kB of a child in the journal": float(np.mean(journaled)) / 1e3,
        "MB of a checkpoint": make_plan(problem.recipe(candidate, entries), problem.headers).output_bytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = {path.name: open_run(path) for path in parser.parse_args().runs}
    print(
        f"{date.today()}; after so many children: items covered / entropy of solve rates / best mean score on the search items\n"
    )
    print("| run | " + " | ".join(map(str, MARKS)) + " |\n|---|" + "---|" * len(MARKS))
    archives = {}
    for name, run in runs.items():
        table, archives[name] = replay(run)
        cells = [" / ".join(f"{value:.3f}" for value in table[mark]) if mark in table else "" for mark in MARKS]
        print(f"| {name} | " + " | ".join(cells) + " |")
    numbers = {name: rebuilt(run, archives[name]) for name, run in runs.items()}
    columns = list(next(iter(numbers.values())))
    print("\n| run | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in numbers.items():
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |")
    for name, run in runs.items():
        report = run.summary()["splits"]["report"]
        print(f"\n{name}: best on select {run.state.best_id}; on the report items {report['best']}")


if __name__ == "__main__":
    main()
