"""M2N2 on scikit-learn's digits as published (arXiv 2508.16204): `python benchmarks/m2n2_digits.py scratch|pretrained|batch|speed`.

A 64-256-10 perceptron of 19,210 weights, full batch of the first 1437 items, unshuffled; the rest is the test set. Selection,
attraction and replacement are those of `evomerge.archive.Niches`, which the strategy also uses; weights are explicit here, since
everything fits in memory. Children are made and evaluated `--batch` at a time from one state of the archive, and told one by one.

scratch     from two random models, 50,000 children, mutation 0.01, 20 members
pretrained  from two specialists (10 full-batch Adam steps on digits 0-4 and 5-9), 10,000 children, no mutation
batch       effect of the batch size on `scratch`
speed       candidates per second: in batches, and one by one in plain NumPy

A pair is the two models that a search starts from. `--seeds` searches are run from every pair; errors are over pairs.
"""

import argparse
import os

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # children run in threads; BLAS threads would get in the way
os.environ["OMP_WAIT_POLICY"] = "passive"  # so that waiting threads do not keep a core busy

import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numba
import numpy as np
from digits_children import Matings, Nursery, arc
from digits_perceptron import N_WEIGHTS, SIGMA, Floats, digits, random_models, solved, specialists

from evomerge.archive import Niches, coverage

NOISE_TABLE = 1 << 22


@dataclass(frozen=True)
class Variant:
    """Which parts are switched off."""

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


class Digits:
    """One search. The same pair, seed and batch size give the same result, whatever the number of threads."""

    def __init__(self, variant: Variant, pair: int | str, seed: int, *, pretrained: bool, batch: int) -> None:
        self.variant, self.batch = variant, batch
        self.niches = Niches(20, variant.alpha)
        self.weights = np.zeros((self.niches.size, N_WEIGHTS), np.float32)
        named = [] if pair == "published" else [pair]
        self.draw, noise = (np.random.default_rng([seed, stream, *named]) for stream in (0, 1))
        n_noise = 0 if pretrained else NOISE_TABLE + N_WEIGHTS
        self.nursery = Nursery(SIGMA * noise.standard_normal(n_noise, np.float32))
        for model in specialists(pair) if pretrained else random_models(pair):
            self.tell(model, self.nursery.solved(model))

    def tell(self, child: Floats, right: Floats) -> None:
        slot = self.niches.add(right)
        if slot is not None:
            self.weights[slot] = child

    def matings(self) -> Matings:
        """The next batch of children, from one archive state."""
        variant, n = self.variant, self.batch
        mates = [
            self.niches.parents(self.draw, attracted=variant.attraction, distinct=False)
            if variant.crossover
            else 2 * self.niches.parents(self.draw)[:1]
            for _ in range(n)
        ]
        splits = self.draw.integers(N_WEIGHTS, size=n) if variant.split_point else np.zeros(n, np.int64)
        return Matings(np.array(mates), self.draw.random(n), splits, self.draw.integers(NOISE_TABLE, size=n))

    def step(self) -> None:
        """Makes a batch of children: proposed from one archive state, told in order."""
        stakes = self.niches.stakes()
        for child, right, n_seen in zip(*self.nursery.children(self.weights, self.niches, self.matings()), strict=True):
            if n_seen < len(right):
                now = self.niches.stakes()
                if now is stakes or now.lost(~right):
                    continue
                right = self.nursery.solved(child)  # a sibling has entered since then and changed what it takes to win
            self.tell(child, right)

    def result(self) -> dict[str, float]:
        """In per cent: test and training accuracy of the member with the best training accuracy, and coverage of training items."""
        train = self.niches.items.mean(axis=1)
        best = int(np.argmax(train))
        test = solved(self.weights[best], *digits()[2:]).mean()
        return {
            "test": 100 * float(test),
            "train": 100 * float(train[best]),
            "coverage": 100 * coverage(self.niches.items),
            "distinct": len(np.unique(self.niches.items, axis=0)),
        }


def search(variant: str, pair: int | str, seed: int, n_children: int, marks: Iterable[int], **options) -> list[dict]:
    """Results after each number of children in `marks`."""
    run = Digits(VARIANTS[variant], pair, seed, **options)
    results = []
    for done in range(run.batch, n_children + run.batch, run.batch):
        run.step()
        results += [{"after": mark, **run.result()} for mark in marks if mark <= done < mark + run.batch]
    return results


def collect(
    title: str, rows: dict[str, Callable], runs: list[tuple[int | str, int]], journal: Path | None
) -> list[dict]:
    """The records of all runs (pair, seed) of all rows; runs already in `journal` are not repeated."""
    lines = journal.read_text().splitlines() if journal is not None and journal.exists() else []
    known = [record for record in map(json.loads, lines) if record["what"] == title and record["row"] in rows]
    done = {(record["row"], record["pair"], record["seed"]) for record in known}
    for (pair, seed), name in itertools.product(runs, rows):
        if (name, pair, seed) in done:
            continue
        started = time.process_time()
        found = rows[name](pair, seed)
        new = {"what": title, "row": name, "pair": pair, "seed": seed, "cpu_s": time.process_time() - started}
        known += [{**new, **result} for result in found]
        if journal is not None:
            with journal.open("a") as stream:
                stream.writelines(json.dumps(record) + "\n" for record in known[-len(found) :])
    return [record for record in known if (record["pair"], record["seed"]) in runs]


def table(title: str, records: list[dict]) -> None:
    """Prints one line per row: mean +- standard error over pairs (over seeds if there is only one pair)."""
    pairs, seeds = ({record[key] for record in records} for key in ("pair", "seed"))
    print(f"{title}, {len(pairs)} pairs, {len(seeds)} seeds, {date.today()}: per cent, mean +- standard error\n")
    marks = sorted({record["after"] for record in records})
    names = [f"test at {mark:,}" for mark in marks] + ["train", "coverage", "distinct members", "CPU s/run"]
    print("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for name in dict.fromkeys(record["row"] for record in records):
        columns = [("test", mark) for mark in marks] + [
            (key, marks[-1]) for key in ("train", "coverage", "distinct", "cpu_s")
        ]
        cells = [interval(by_pair(records, name, *column)) for column in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def by_pair(records: list[dict], row: str, key: str, after: int) -> dict[int | str, float]:
    """A row's mean per pair, or per seed if there is only one pair."""
    chosen = [record for record in records if record["row"] == row and record["after"] == after]
    group = "pair" if len({record["pair"] for record in chosen}) > 1 else "seed"
    values: dict[int | str, list[float]] = {}
    for record in chosen:
        values.setdefault(record[group], []).append(record[key])
    return {name: float(np.mean(found)) for name, found in values.items()}


def interval(values: dict[int | str, float]) -> str:
    numbers = list(values.values())
    error = np.std(numbers, ddof=1) / np.sqrt(len(numbers)) if len(numbers) > 1 else np.nan
    return f"{np.mean(numbers):.1f} +- {error:.1f}"


def steps(records: list[dict]) -> None:
    """Prints the difference between neighbours in the published order, and for how many pairs it is not negative."""
    last = max(record["after"] for record in records)
    rows = list(dict.fromkeys(record["row"] for record in records))
    print("| step | difference | pairs in which it holds |\n|---|---|---|")
    for better, worse in itertools.pairwise(rows):
        a, b = by_pair(records, better, "test", last), by_pair(records, worse, "test", last)
        differences = {name: a[name] - b[name] for name in a if name in b}
        holds = sum(value >= 0.0 for value in differences.values())
        print(f"| {better} - {worse} | {interval(differences)} | {holds} of {len(differences)} |")
    print()


def cross(a: Floats, b: Floats, mix: float, split: int) -> Floats:
    """The mix to the left of `split` and the opposite mix to the right, with one angle for the whole vectors (as released)."""
    cosine = float(a @ b / np.sqrt((a @ a) * (b @ b)))
    child = np.empty_like(a)
    for part, share in ((slice(None, split), mix), (slice(split, None), 1.0 - mix)):
        of_a, of_b = arc(share, cosine)
        child[part] = a.dtype.type(of_a) * a[part] + a.dtype.type(of_b) * b[part]
    return child


def one_by_one(dtype: type, *, pretrained: bool) -> Callable[[], None]:
    """A step of the loop in plain NumPy: a pair of parents, a child in `dtype`, its evaluation, an update."""
    run = Digits(VARIANTS["M2N2"], 0, 0, pretrained=pretrained, batch=1)
    images, labels = digits(dtype)[:2]
    weights = run.weights.astype(dtype)
    stream = np.random.default_rng(3)

    def step() -> None:
        first, second = run.niches.parents(run.draw)
        child = cross(weights[first], weights[second], run.draw.random(), int(run.draw.integers(N_WEIGHTS)))
        if not pretrained:
            child += SIGMA * stream.standard_normal(N_WEIGHTS, dtype)
        slot = run.niches.add(solved(child, images, labels))
        if slot is not None:
            weights[slot] = child

    return step


def speed(batch: int, n_children: int, *, pretrained: bool, n_turns: int = 8) -> None:
    """Candidates per second over a whole search (proposing, crossing, mutating, evaluating, telling), elapsed and of one CPU.

    One by one in NumPy costs the same at any point of a search, so fewer candidates are enough there.
    """
    options = {"variant": VARIANTS["M2N2"], "pair": 1, "seed": 0, "pretrained": pretrained}
    threads = numba.get_num_threads()
    loops = {
        f"batches of {batch}, {threads} threads": (Digits(**options, batch=batch).step, batch, n_children),
        "batches of 1": (Digits(**options, batch=1).step, 1, n_children),
        "one by one, float32, NumPy": (one_by_one(np.float32, pretrained=pretrained), 1, 2000),
        "one by one, float64, NumPy": (one_by_one(np.float64, pretrained=pretrained), 1, 2000),
    }
    Digits(**options, batch=batch).step()  # compiles
    seconds = np.zeros((len(loops), 2))
    for _ in range(n_turns):  # in turn, so that a busy machine slows all of them equally
        for row, (step, size, count) in enumerate(loops.values()):
            numba.set_num_threads(min(size, threads))
            started = np.array([time.perf_counter(), time.process_time()])
            for _ in range(count // n_turns // size):
                step()
            seconds[row] += np.array([time.perf_counter(), time.process_time()]) - started
    numba.set_num_threads(threads)
    rates = np.array([count for _, _, count in loops.values()])[:, None] / seconds
    title = f"{'from two specialists' if pretrained else 'from scratch'}, {n_children:,} children"
    print(f"candidates per second, {title}, {date.today()}\n")
    print("| | per second | times the last row | per CPU second | times the last row |\n|---|---|---|---|---|")
    for name, (elapsed, cpu) in zip(loops, rates, strict=True):
        print(f"| {name} | {elapsed:.0f} | {elapsed / rates[-1, 0]:.1f} | {cpu:.0f} | {cpu / rates[-1, 1]:.1f} |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("scratch", "pretrained", "batch", "speed"))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="the one pair of the released code instead")
    parser.add_argument("--seeds", type=int, default=1, help="searches from each pair")
    parser.add_argument("--children", type=int)
    parser.add_argument("--batch", type=int, default=1, help="children made from one archive state (published: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="more than --batch have nothing to do")
    parser.add_argument("--only", nargs="*", help="variants to run, or batch sizes")
    parser.add_argument(
        "--json", type=Path, help="append every result to this file; what it has already is not run again"
    )
    given = parser.parse_args()
    numba.set_num_threads(min(given.threads, given.batch))
    if given.what == "speed":
        speed(given.batch, given.children or 50_000, pretrained=False)
        speed(given.batch, given.children or 10_000, pretrained=True)
        return
    pretrained = given.what == "pretrained"
    n_children = given.children or (10_000 if pretrained else 50_000)
    marks = (*(mark for mark in (1000, 10_000, 25_000) if mark < n_children), n_children)

    def row(variant: str, batch: int) -> Callable[[int | str, int], list[dict]]:
        return lambda pair, seed: search(variant, pair, seed, n_children, marks, pretrained=pretrained, batch=batch)

    if given.what == "batch":
        rows = {f"M2N2, batch {size}": row("M2N2", int(size)) for size in given.only or (1, 2, 8, 32)}
    else:
        unused = ["no crossover"] if pretrained else ["no attraction", "no split point"]  # would be clones
        names = given.only or [name for name in VARIANTS if name not in unused]
        rows = {name: row(name, given.batch) for name in names}
    pairs = ["published"] if given.published else list(range(given.pairs))
    runs = [(pair, seed) for seed in range(given.seeds) for pair in pairs]
    title = f"{given.what}, {n_children:,} children" + ("" if given.what == "batch" else f", batches of {given.batch}")
    records = collect(title, rows, runs, given.json)
    table(title, records)
    if given.what != "batch":
        steps(records)


if __name__ == "__main__":
    main()
