"""Golden trajectories: the first 20 proposals of every strategy. `python tests/strategy/strategy_golden.py --write` rewrites the file.

They were recorded with Python 3.11 and the versions in `requirements/cpu.txt`: other versions of numpy, scipy, torch and the strategies' libraries may round differently,
and a single different bit is enough to change the course of a search (an eigenvector turns, another point of a front is the best).
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

from evomerge.core import Genome, VectorGenome, atomic_write_json
from evomerge.testing.strategy_suite import Driver, StrategyCase, lacking_library, strategy_cases

GOLDEN = Path(__file__).with_name("strategy_golden.json")
PINNED = Path(__file__).parents[2] / "requirements" / "cpu.txt"
LIBRARIES = ("numpy", "scipy", "cma", "cmaes", "moocore", "pymoo", "torch", "botorch", "gpytorch", "optuna", "nevergrad")  # fmt: skip
DIGITS = 6

SAME_ROUNDING = {
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "AVX512F,AVX512CD,AVX512_SKX,AVX512_CLX,AVX512_CNL,AVX512_ICL,AVX512_SPR",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
}
"""Instructions that every x86 processor of the last ten years has: libraries choose by processor, and round otherwise on another one."""


def first_proposals(case: StrategyCase) -> list[list[float]]:
    """The first 20 proposals, rounded to `DIGITS` digits: (20, d); for a crossover its parents, mix, splits and mutation."""
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


def other_versions() -> str:
    """Installed libraries whose versions differ from those the trajectories were recorded with; empty if there are none."""
    pinned = dict(line.split("==") for line in PINNED.read_text().splitlines() if "==" in line)
    installed = {dist.name: dist.version for name in LIBRARIES for dist in Distribution.discover(name=name)}
    others = {name: found for name, found in installed.items() if found.split("+")[0] != pinned[name].split("+")[0]}
    named = [f"{name} {found} instead of {pinned[name]}" for name, found in others.items()]
    if sys.version_info >= (3, 12):
        named.append(
            f"Python {platform.python_version()} instead of 3.11 (its sum() of floats rounds otherwise, which cma uses)"
        )
    return ", ".join(named)


def rounded_alike() -> dict[str, list[list[float]]]:
    """`first_proposals` of every case by name, computed in a process with the same rounding on every machine."""
    finished = subprocess.run(
        [sys.executable, __file__], env=os.environ | SAME_ROUNDING, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        atomic_write_json(GOLDEN, rounded_alike())
    else:
        cases = [case for case in strategy_cases() if lacking_library(case.name) is None]
        json.dump({str(case): first_proposals(case) for case in cases}, sys.stdout)
