"""M2N2 on scikit-learn's digits as published (arXiv 2508.16204): `python benchmarks/m2n2_digits.py scratch|pretrained|batch|speed`.

A 64-256-10 perceptron of 19,210 weights, full batch of the first 1437 items, unshuffled; the rest is the test set. Selection,
attraction and replacement are `evomerge.archive.Niches`, which the strategy uses too; weights are explicit here, since
everything fits in memory. Children are made and evaluated `--batch` at a time from one state of the archive, and told one by one.

scratch     from two random models, 50,000 children, mutation 0.01, 20 members
pretrained  from two specialists (10 full-batch Adam steps on digits 0-4 and 5-9), 10,000 children, no mutation
batch       the batch size's effect on `scratch`
speed       candidates per second: in batches, and one by one
"""

import argparse
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # children run in threads of their own; BLAS threads only get in their way

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from digits_perceptron import N_WEIGHTS, Floats, adam, digits, items, solved

from evomerge.archive import Niches, coverage
from evomerge.weights.noise import normal_noise

SIGMA = 0.01


@dataclass(frozen=True)
class Variant:
    """What is switched off."""

    alpha: float = 1.0
    attraction: bool = True
    crossover: bool = True
    split_point: bool = True


VARIANTS = {
    "M2N2": Variant(),
    "no attraction": Variant(attraction=False),
    "no split point": Variant(split_point=False),
    "no crossover": Variant(crossover=False),
    "GA": Variant(alpha=0.0, attraction=False),
}
"""the paper's GA competes for nothing (alpha 0) and draws both parents by fitness"""


def arc(mix: float, cosine: float) -> tuple[float, float]:
    """SLERP's factors of both vectors, LERP's for nearly parallel ones."""
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    sine = np.sin(angle)
    return (1.0 - mix, mix) if sine <= 1e-6 else (np.sin((1.0 - mix) * angle) / sine, np.sin(mix * angle) / sine)


def cross(a: Floats, b: Floats, mix: float, split: int) -> Floats:
    """Mix left of `split` and the opposite mix right of it, with one angle for the whole vectors (as released)."""
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    child = np.empty_like(a)
    for part, share in ((slice(None, split), mix), (slice(split, None), 1.0 - mix)):
        of_a, of_b = arc(share, cosine)
        np.multiply(a[part], a.dtype.type(of_a), out=child[part])
        child[part] += b[part] * a.dtype.type(of_b)
    return child


class Digits:
    """One run. Same seed and batch size, same result, whatever the number of threads."""

    def __init__(
        self, variant: Variant, seed: int, *, pretrained: bool, size: int = 20, batch: int, threads: int
    ) -> None:
        self.variant, self.batch = variant, batch
        self.sigma = 0.0 if pretrained else SIGMA
        self.niches = Niches(size, variant.alpha)
        self.weights = np.zeros((size, N_WEIGHTS), np.float32)
        self.draw = np.random.default_rng([seed, 0])
        self.threads = ThreadPoolExecutor(threads) if threads > 1 else None
        for model in specialists(seed) if pretrained else random_models(seed):
            self.tell(model, items()[0].solved(model))

    def tell(self, child: Floats, right: Floats) -> None:
        slot = self.niches.add(right)
        if slot is not None:
            self.weights[slot] = child

    def child(self, job: tuple[int, int, float, int, int]) -> tuple[Floats, Floats]:
        """The weights of one child and which items it solves."""
        first, second, mix, split, noise_seed = job
        child = self.weights[first].copy()
        if self.variant.crossover:
            child = cross(child, self.weights[second], mix, split)
        if self.sigma:
            child += normal_noise(noise_seed, "digits", 0, N_WEIGHTS).numpy() * np.float32(self.sigma)
        return child, items()[0].solved(child)

    def step(self) -> None:
        """A batch of children: proposed from one archive state, told in order."""
        jobs = []
        for _ in range(self.batch):
            first, second = self.niches.parents(self.draw, attracted=self.variant.attraction, distinct=False)
            mix = self.draw.random()
            split = int(self.draw.integers(N_WEIGHTS)) if self.variant.split_point else 0
            jobs.append((first, second, mix, split, int(self.draw.integers(2**63))))
        results = list(self.threads.map(self.child, jobs)) if self.threads else list(map(self.child, jobs))
        for child, right in results:
            self.tell(child, right)

    def result(self) -> dict[str, float]:
        """Per cent: test and training accuracy of the member with the best training accuracy, and coverage of training items."""
        train = self.niches.items.mean(axis=1)
        best = int(np.argmax(train))
        test = items()[1].solved(self.weights[best]).mean()
        covered = coverage(self.niches.items)
        return {"test": 100 * float(test), "train": 100 * float(train[best]), "coverage": 100 * covered}


def random_models(seed: int) -> list[Floats]:
    """Two models with normal weights of standard deviation 0.01."""
    stream = np.random.default_rng([seed, 2])
    return [SIGMA * stream.standard_normal(N_WEIGHTS, dtype=np.float32) for _ in range(2)]


def specialists(seed: int) -> list[Floats]:
    """`random_models` after 10 full-batch Adam steps (rate 0.003) on the digits 0-4 and 5-9; a pair for every seed."""
    images, labels, _, _ = digits()
    low = labels < 5
    return [
        adam(model, images[mask], labels[mask]) for model, mask in zip(random_models(seed), (low, ~low), strict=True)
    ]


def search(variant: str, seed: int, n_children: int, marks: tuple[int, ...], **options) -> dict[int, dict[str, float]]:
    """Results after each number of children in `marks`."""
    run = Digits(VARIANTS[variant], seed, **options)
    results: dict[int, dict[str, float]] = {}
    for done in range(run.batch, n_children + run.batch, run.batch):
        run.step()
        for mark in marks:
            if mark <= done < mark + run.batch:
                results[mark] = run.result()
    return results


def compare(
    title: str, rows: dict[str, Callable[[int], dict[int, dict[str, float]]]], seeds: range, marks: tuple[int, ...]
) -> list[dict]:
    """Prints one row per entry: mean +- standard error over the seeds; returns every single result."""
    print(f"{title}, {len(seeds)} seeds, {date.today()}: per cent, mean +- standard error\n")
    names = [f"test at {mark:,}" for mark in marks] + ["train", "coverage", "s/run"]
    print("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names), flush=True)
    records = []
    for name, row in rows.items():
        started = time.perf_counter()
        found = [row(seed) for seed in seeds]
        seconds = (time.perf_counter() - started) / len(seeds)
        records += [
            {"what": title, "row": name, "seed": seed, "after": mark, **values}
            for seed, result in zip(seeds, found, strict=True)
            for mark, values in result.items()
        ]
        cells = [interval([result[mark]["test"] for result in found]) for mark in marks]
        cells += [interval([result[marks[-1]][key] for result in found]) for key in ("train", "coverage")]
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)
    print()
    return records


def interval(values: list[float]) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.1f} +- {error:.1f}"


def one_by_one(dtype: type) -> Callable[[], None]:
    """A step of the loop in plain NumPy: a parent pair, one child in `dtype`, one evaluation, one update."""
    run = Digits(VARIANTS["M2N2"], 0, pretrained=False, batch=1, threads=1)
    images, labels = digits(dtype)[:2]
    weights = run.weights.astype(dtype)
    stream = np.random.default_rng(3)

    def step() -> None:
        first, second = run.niches.parents(run.draw)
        child = cross(weights[first], weights[second], run.draw.random(), int(run.draw.integers(N_WEIGHTS)))
        child = child + SIGMA * stream.standard_normal(N_WEIGHTS).astype(dtype)
        slot = run.niches.add(solved(child, images, labels))
        if slot is not None:
            weights[slot] = child

    return step


def speed(batch: int, threads: int, seconds: float = 10.0) -> None:
    """Candidates per second of the whole loop (proposing, crossing, mutating, evaluating, telling)."""
    batched = Digits(VARIANTS["M2N2"], 0, pretrained=False, batch=batch, threads=threads)
    alone = Digits(VARIANTS["M2N2"], 0, pretrained=False, batch=1, threads=1)
    loops = {
        f"batches of {batch}, {threads} threads, float32, compiled": (batched.step, batch),
        "one by one, float32, compiled": (alone.step, 1),
        "one by one, float32, NumPy": (one_by_one(np.float32), 1),
        "one by one, float64, NumPy": (one_by_one(np.float64), 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(4):  # in turn, so that a busy machine slows all alike
        for name, (step, count) in loops.items():
            started, done = time.perf_counter(), 0
            while time.perf_counter() - started < seconds / 4:
                step()
                done += count
            rates[name].append(done / (time.perf_counter() - started))
    fastest = np.median(next(iter(rates.values())))
    print(f"candidates per second, {date.today()}\n\n| | candidates/s | batches are faster by |\n|---|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {np.median(values):.0f} | {fastest / np.median(values):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scratch", "pretrained", "batch", "speed"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--children", type=int)
    parser.add_argument("--batch", type=int, default=1, help="children made from one archive state (published: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="more than --batch have nothing to do")
    parser.add_argument("--only", nargs="*", help="variants to run, or batch sizes")
    parser.add_argument("--json", type=Path, help="append every single result to this file")
    given = parser.parse_args()
    if given.what == "speed":
        speed(given.batch, given.threads)
        return
    pretrained = given.what == "pretrained"
    n_children = given.children or (10_000 if pretrained else 50_000)
    marks = (*(mark for mark in (1000, 10_000, 25_000, 50_000) if mark < n_children), n_children)

    def row(variant: str, batch: int) -> Callable[[int], dict[int, dict[str, float]]]:
        options = {"pretrained": pretrained, "batch": batch, "threads": given.threads}
        return lambda seed: search(variant, seed, n_children, marks, **options)

    if given.what == "batch":
        sizes = [int(size) for size in given.only or (1, 2, 8, 32)]
        rows = {f"M2N2, batch {size}": row("M2N2", size) for size in sizes}
    else:
        names = given.only or [
            name for name in VARIANTS if pretrained or name not in ("no attraction", "no split point")
        ]
        names = [name for name in names if not (pretrained and name == "no crossover")]  # without mutation: clones
        rows = {name: row(name, given.batch) for name in names}
    records = compare(f"{given.what}, {n_children:,} children", rows, range(given.seeds), marks)
    if given.json is not None:
        with given.json.open("a") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
