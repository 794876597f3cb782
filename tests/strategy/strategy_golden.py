"""Golden trajectories: the first 20 proposals of every strategy. `python tests/strategy/strategy_golden.py` rewrites the file."""

import json
from pathlib import Path

from evomerge.core import Genome, VectorGenome, atomic_write_json
from evomerge.testing.strategy_suite import Driver, StrategyCase, strategy_cases

GOLDEN = Path(__file__).with_name("strategy_golden.json")
DIGITS = 6  # proposals differ in the last bits between BLAS builds


def first_proposals(case: StrategyCase) -> list[list[float]]:
    """The first 20 proposals, rounded to `DIGITS` digits: (20, d), or for a crossover its parents, mix, splits and mutation."""
    driver = Driver(case, case.make())
    while len(driver.trace) < 20:
        driver.run(1)
    return [[round(value, DIGITS) for value in numbers(candidate.genome)] for candidate in driver.trace[:20]]


def numbers(genome: Genome) -> list[float]:
    """A genome as numbers."""
    if isinstance(genome, VectorGenome):
        return list(genome.values)
    mutation = [] if genome.mutation is None else [genome.mutation.seed / 2**63, genome.mutation.sigma]
    return [*(int(parent[1:]) for parent in genome.parents), genome.mix, *genome.splits, *mutation]


def read_golden() -> dict[str, list[list[float]]]:
    return json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    atomic_write_json(GOLDEN, {str(case): first_proposals(case) for case in strategy_cases()})
