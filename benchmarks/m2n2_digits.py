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
from functools import cache
from pathlib import Path

import numba
import numpy as np
from sklearn.datasets import load_digits

from evomerge.archive import Niches, coverage
from evomerge.weights.noise import normal_noise

Floats = np.ndarray
N_TRAIN = 1437
SIZES = (64 * 256, 256, 256 * 10, 10)
N_WEIGHTS = sum(SIZES)
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


@cache
def digits(dtype: type = np.float32) -> tuple[Floats, Floats, Floats, Floats]:
    """Training images (1437, 64) in [0, 16] and labels, test images (360, 64) and labels."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(dtype)
    return images[:N_TRAIN], labels[:N_TRAIN], images[N_TRAIN:], labels[N_TRAIN:]


def layers(weights: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Views (64, 256), (256,), (256, 10), (10,) of a flat vector, in the published order."""
    first, bias, second, last = np.split(weights, np.cumsum(SIZES)[:-1])
    return first.reshape(64, 256), bias, second.reshape(256, 10), last


def solved(weights: Floats, images: Floats, labels: Floats) -> Floats:
    """Which items a model gets right, (n_items,) bool, as one would write it down."""
    first, bias, second, last = layers(weights)
    hidden = np.maximum(images @ first + bias, 0.0)
    return (hidden @ second + last).argmax(axis=1) == labels


class Items:
    """Labelled images in the form that `solved` takes: half of all pixels are 0, so only the others are kept, four at a time."""

    def __init__(self, images: Floats, labels: Floats) -> None:
        columns: list[int] = []
        values: list[float] = []
        starts = [0]
        for image in images:
            lit = np.flatnonzero(image)
            padding = -len(lit) % 4
            columns += [*lit.tolist(), *[0] * padding]
            values += [*image[lit].tolist(), *[0.0] * padding]
            starts.append(len(columns))
        self._arrays = (np.array(starts), np.array(columns), np.array(values, np.float32), labels)

    def solved(self, weights: Floats) -> Floats:
        """Which items a float32 model gets right, (n_items,) bool; holds no interpreter lock."""
        right = np.empty(len(self._arrays[-1]), np.bool_)
        _solve(weights, *self._arrays, right)
        return right


_ANY_ORDER = {"contract", "nsz", "reassoc"}
"""of sums, so that they can be vectorised"""


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True, inline="never")
def _add_pixels(hidden, row0, row1, row2, row3, value0, value1, value2, value3):
    for k in range(256):
        hidden[k] += value0 * row0[k] + value1 * row1[k] + value2 * row2[k] + value3 * row3[k]


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True, inline="never")
def _five_classes(hidden, second, logits):
    sum0 = sum1 = sum2 = sum3 = sum4 = np.float32(0.0)
    for k in range(256):
        value = max(hidden[k], np.float32(0.0))
        sum0 += value * second[0, k]
        sum1 += value * second[1, k]
        sum2 += value * second[2, k]
        sum3 += value * second[3, k]
        sum4 += value * second[4, k]
    logits[0], logits[1], logits[2], logits[3], logits[4] = sum0, sum1, sum2, sum3, sum4


@numba.njit(cache=True, fastmath=_ANY_ORDER, nogil=True)
def _solve(weights, starts, columns, values, labels, right):
    first, bias = weights[:16384].reshape(64, 256), weights[16384:16640]
    second, last = np.ascontiguousarray(weights[16640:19200].reshape(256, 10).T), weights[19200:]
    hidden, logits = np.empty(256, np.float32), np.empty(10, np.float32)
    for item in range(len(labels)):
        hidden[:] = bias
        for j in range(starts[item], starts[item + 1], 4):
            rows = columns[j : j + 4]
            _add_pixels(
                hidden,
                first[rows[0]],
                first[rows[1]],
                first[rows[2]],
                first[rows[3]],
                values[j],
                values[j + 1],
                values[j + 2],
                values[j + 3],
            )
        _five_classes(hidden, second[:5], logits[:5])
        _five_classes(hidden, second[5:], logits[5:])
        right[item] = np.argmax(logits + last) == labels[item]


@cache
def items() -> tuple[Items, Items]:
    """Training and test items."""
    images, labels, test_images, test_labels = digits()
    return Items(images, labels), Items(test_images, test_labels)


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


def adam(weights: Floats, images: Floats, labels: Floats, rate: float = 0.003, steps: int = 10) -> Floats:
    """Full-batch Adam (0.9, 0.999, 1e-8) on cross-entropy."""
    weights = weights.astype(np.float64)
    mean, square = np.zeros(N_WEIGHTS), np.zeros(N_WEIGHTS)
    for step in range(1, steps + 1):
        slope = gradient(weights, images, labels)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope**2
        weights -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weights.astype(np.float32)


def gradient(weights: Floats, images: Floats, labels: Floats) -> Floats:
    """Of the mean cross-entropy."""
    first, bias, second, last = layers(weights)
    hidden = np.maximum(images @ first + bias, 0.0)
    logits = hidden @ second + last
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    shares[np.arange(len(labels)), labels] -= 1.0
    shares /= len(labels)
    back = (shares @ second.T) * (hidden > 0.0)
    parts = (images.T @ back, back.sum(axis=0), hidden.T @ shares, shares.sum(axis=0))
    return np.concatenate([part.ravel() for part in parts])


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
    parser.add_argument("--batch", type=int, default=2, help="children made from one archive state")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
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
