"""How far one driver scales: the real loop, strategy, journal, item store and front files, with workers that only wait.

    python benchmarks/scale.py [--out benchmarks/results/scale.json] [--quick]

Measures, on this machine: efficiency at 1 to 256 simulated workers against the ideal (sum of the delays / workers), durable results per
second against the number of fsyncs that the same disk manages, and the driver's CPU time and memory over 100,000 candidates. Workers are simulated in
real time in the driver's own thread, so only the driver is measured; Ray's share is in `benchmarks/chaos.py`.
"""

import argparse
import datetime
import gc
import heapq
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.core import Evaluation, EvaluationRequest, Objective, Status
from evomerge.search import Budget, FrontFiles, RunDirectory, RunRecorder, SearchLoop, event
from evomerge.strategy import make_strategy

OBJECTIVES = (Objective("f1"), Objective("f2"))
N_ITEMS = 100
DIMENSION = 36


class WaitingPool:
    """Workers that each wait for a random time (lognormal, coefficient of variation 0.3), in real time."""

    def __init__(self, mean_s: float, n_workers: int) -> None:
        self._mean_s, self.n_workers = mean_s, n_workers
        self._rng = np.random.default_rng(7)
        self._due: list[tuple[float, int, EvaluationRequest]] = []
        self._count = 0
        self.worked_s = 0.0
        self._items = self._rng.random((64, N_ITEMS)).astype(np.float32)

    def submit(self, request: EvaluationRequest) -> None:
        delay = self._mean_s * float(self._rng.lognormal(-0.045, 0.3)) if self._mean_s else 0.0
        self.worked_s += delay
        self._count += 1
        heapq.heappush(self._due, (time.perf_counter() + delay, self._count, request))

    def withdraw(self) -> list[EvaluationRequest]:
        return []

    def next_done(self, timeout_s: float) -> Evaluation | None:
        if not self._due:
            return None
        wait = self._due[0][0] - time.perf_counter()
        if wait > timeout_s:
            time.sleep(timeout_s)
            return None
        if wait > 0:
            time.sleep(wait)
        request = heapq.heappop(self._due)[2]
        first, second = (self._items[(self._count * step) % 64] for step in (1, 7))
        scores = {"f1": float(request.values[0]), "f2": float(1 - request.values[0] * request.values[1])}
        return Evaluation(
            request.candidate_id, request.split, Status.OK, scores, {"f1": 0.01, "f2": 0.01},
            {"f1": first, "f2": second}, {"items": 2.0 * N_ITEMS, "engine_s": 0.1, "total_s": 0.1},
        )  # fmt: skip


def search(folder: Path, pool: WaitingPool, n_candidates: int, strategy: str = "random", samples: Any = None) -> float:
    """One run; returns its wall time."""
    folder.mkdir(parents=True)
    directory = RunDirectory(folder)
    recorder = RunRecorder(directory)
    goals = [{"name": item.name, "direction": item.direction.value, "reference": None} for item in OBJECTIVES]
    recorder.record(event("run", version=1, objectives=goals))
    files = FrontFiles(directory, recorder.state, lambda entry: None)
    loop = SearchLoop(
        strategy=make_strategy(strategy, dimension=DIMENSION, objectives=OBJECTIVES, seed=1),
        pool=pool,
        recorder=recorder,
        make_recipe=lambda candidate: None,
        baselines=(),
        budget=Budget(evaluations=n_candidates),
        in_flight=pool.n_workers,
        deterministic=False,
        observers=[files, *([samples] if samples else [])],
        on_pause=files.flush,
    )
    started = time.perf_counter()
    loop.run()
    wall = time.perf_counter() - started
    recorder.close()
    return wall


def fsync_ceiling(folder: Path, seconds: float) -> dict[str, float]:
    """Appends the bytes of one result at a time (journal lines and item row), with an fsync after each, and after every 256."""
    result = {}
    for group in (1, 256):
        content, count = os.urandom(2600) * group, 0
        with (folder / f"ceiling{group}").open("ab", buffering=0) as stream:
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                stream.write(content)
                os.fsync(stream.fileno())
                count += group
            result[f"results_per_s_fsync_each_{group}"] = round(count / (time.perf_counter() - started), 1)
    return result


def memory_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def memory_run(folder: Path, n_candidates: int, strategy: str) -> dict[str, Any]:
    """Memory and CPU time in the course of a long run; the strategy's own bookkeeping is measured separately, without a run."""
    gc.collect()
    points: list[dict[str, float]] = []
    start_cpu, start_mb = time.process_time(), memory_mb()

    def sample(state: Any, evaluation: Evaluation) -> None:
        count = len(state.evaluations)
        if count >= (len(points) + 1) * n_candidates // 10:
            points.append(
                {"candidates": count, "mb": round(memory_mb() - start_mb, 1), "cpu_s": round(time.process_time() - start_cpu, 1)}
            )  # fmt: skip

    wall = search(folder, WaitingPool(0.0, 256), n_candidates, strategy, sample)
    item_bytes = (folder / "items.search.f32").stat().st_size
    journal_bytes = (folder / "journal.jsonl").stat().st_size
    last, middle = points[-1], points[4]
    started = time.perf_counter()
    recorder = RunRecorder(RunDirectory(folder))
    reopening = time.perf_counter() - started
    recorder.close()
    return {
        "strategy": strategy,
        "dimension": DIMENSION,
        "wall_s": round(wall, 1),
        "results_per_s": round(n_candidates / wall),
        "points": points,
        "driver_bytes_per_candidate": round(1e6 * (last["mb"] - middle["mb"]) / (last["candidates"] - middle["candidates"])),
        "cpu_ms_per_candidate_first_half": round(1000 * middle["cpu_s"] / middle["candidates"], 3),
        "cpu_ms_per_candidate_second_half": round(1000 * (last["cpu_s"] - middle["cpu_s"]) / (last["candidates"] - middle["candidates"]), 3),
        "item_matrix_bytes_per_candidate": item_bytes // n_candidates,
        "journal_bytes_per_candidate": journal_bytes // n_candidates,
        "reopening_s": round(reopening, 1),
    }  # fmt: skip


def strategy_memory(n_candidates: int, name: str) -> int:
    """Bytes per candidate kept by the strategy itself, after the first fifth, which also pays for imports."""
    strategy = make_strategy(name, dimension=DIMENSION, objectives=OBJECTIVES, seed=1)
    before = 0.0
    for number in range(n_candidates):
        if number == n_candidates // 5:
            gc.collect()
            before = memory_mb()
        candidate = strategy.ask(1)[0]
        scores = {"f1": candidate.genome.values[0], "f2": candidate.genome.values[1]}
        strategy.tell([Evaluation(candidate.id, "search", Status.OK, scores)])  # type: ignore[arg-type]
    return round(1e6 * (memory_mb() - before) / (n_candidates - n_candidates // 5))


def machine() -> dict[str, Any]:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_at_start": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    options = parser.parse_args()
    small = 10 if options.quick else 1
    result: dict[str, Any] = {"machine": machine(), "evaluation_s": 0.2, "efficiency": []}
    # first, while there is no freed memory of other runs that it could reuse
    result["strategy_bytes_per_candidate"] = strategy_memory(100_000 // small, "random")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result["ceiling"] = fsync_ceiling(folder, 3 / small)
        for n_workers in (1, 4, 16, 64, 256):
            pool = WaitingPool(0.2, n_workers)
            n_candidates = n_workers * max(5, 40 // small)
            cpu = time.process_time()
            wall = search(folder / f"workers{n_workers}", pool, n_candidates)
            row = {
                "workers": n_workers,
                "candidates": n_candidates,
                "wall_s": round(wall, 2),
                "efficiency": round(pool.worked_s / n_workers / wall, 3),
                "durable_results_per_s": round(n_candidates / wall, 1),
                "driver_cpu_share": round((time.process_time() - cpu) / wall, 3),
            }
            result["efficiency"].append(row)
            print(row, flush=True)
        pool = WaitingPool(0.0, 256)
        count = 20_000 // small
        wall = search(folder / "saturated", pool, count)
        result["saturated_256_workers_results_per_s"] = round(count / wall)
        print("saturated", count / wall, flush=True)
        result["long_run"] = memory_run(folder / "long", 100_000 // small, "random")
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
