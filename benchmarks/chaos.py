"""Kills a search repeatedly, in every possible way, and compares the result with that of an undisturbed search.

    python benchmarks/chaos.py [--driver 240 --ray 60 --fuzz 10000] [--out benchmarks/results/chaos.json] [--seed 0]

driver   SIGKILL of the driver: at random moments, and exactly before, in the middle of, and after writes to the journal and item files
ray      on a local cluster of several nodes: SIGKILL of workers and of raylets while the run is in progress, of the driver, and of the head (GCS),
         after which the driver must end by itself and the run is resumed on another cluster
fuzz     random truncations, bit flips and duplications of a journal: recovered up to the damage, or refused; never silently wrong

Everything is drawn from the seed. A driver process is a fork of this one, so that a kill does not cost a new start of Python.
"""

import argparse
import datetime
import json
import logging
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from evomerge.build import parse_config, resume_search, start_search
from evomerge.cluster.nodes import add_node, start_cluster
from evomerge.core import EvomergeError, JournalError
from evomerge.search import RunState, read_journal

SETTINGS: dict[str, Any] = {
    "seed": 11,
    "strategy": {"name": "nsga2", "population_size": 8},
    "evaluation": {
        "kind": "synthetic", "function": "zdt1", "dimension": 6, "item_noise": 0.02, "n_items": 20,
        "delay_s": 0.005, "failure_rate": 0.05,
    },
    "cluster": {"kind": "local", "workers": 4},
    "budget": {"evaluations": 120},
    "finals": {"finalists": 4},
    "deterministic": True,
}  # fmt: skip


def settings(**changes: Any) -> dict[str, Any]:
    return {**SETTINGS, **changes}


def begin(folder: Path, wanted: dict[str, Any]) -> None:
    config = parse_config(json.loads(json.dumps(wanted)), folder=Path("/"))
    start_search(config, folder, config_text=yaml.safe_dump(wanted))


def go_on(folder: Path, wanted: dict[str, Any]) -> None:
    if (folder / "resolved.json").exists():
        address = wanted["cluster"].get("address")
        resume_search(folder, overrides=[f"cluster.address={address}"] if address else [])
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before the run existed
        begin(folder, wanted)


# --- driver ----------------------------------------------------------------------------------------------------------


def die_at_write(number: int, where: str) -> None:
    """SIGKILL of this process at its `number`-th fsync: before the write it belongs to, in the middle of it, or after it."""
    from evomerge.search import item_store, journal

    count = 0
    real_write, real_fsync = journal.write_all, os.fsync

    def write_all(stream: Any, content: bytes) -> None:
        nonlocal count
        count += 1
        if count == number and where != "after":
            real_write(stream, content[: 0 if where == "before" else len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        real_write(stream, content)

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    journal.write_all = item_store.write_all = write_all
    os.fsync = fsync


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a child process; returns its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as problem:  # noqa: BLE001  (the child must not continue in the parent's code)
        print(f"child: {type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def ended(pid: int, timeout_s: float) -> int | None:
    """The exit status of a child, or None while it runs."""
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def kill_driver(folder: Path, wanted: dict[str, Any], n_kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs one search to its end through `n_kills` kills, or as many as fit in; returns how many there were."""
    kinds: Counter[str] = Counter()
    resume_s: list[float] = []
    while sum(kinds.values()) < n_kills:
        size = size_of(folder)
        kind = rng.choice(["instant", "before", "middle", "after"])
        started = time.monotonic()
        if kind == "instant":
            pid = fork(lambda: go_on(folder, wanted))
            status = None
            while status is None and size_of(folder) <= size:
                status = ended(pid, 0.001)
            if status is None:
                resume_s.append(time.monotonic() - started)
                status = ended(pid, rng.uniform(0, 0.08))
            if status is None:
                os.kill(pid, signal.SIGKILL)
                status = ended(pid, 10)
        else:
            number = rng.randrange(1, 12)
            pid = fork(lambda number=number, kind=kind: (die_at_write(number, kind), go_on(folder, wanted)))  # type: ignore[misc]
            status = ended(pid, 120)
        if status is None or not os.WIFSIGNALED(status):
            if status != 0:
                raise SystemExit(f"a driver ended with status {status}")
            return {"kinds": dict(kinds), "resume_s": resume_s, "finished": True}
        kinds[kind] += 1
    status = ended(fork(lambda: go_on(folder, wanted)), 300)
    if status != 0:
        raise SystemExit(f"the last driver ended with status {status}")
    return {"kinds": dict(kinds), "resume_s": resume_s, "finished": True}


def size_of(folder: Path) -> int:
    path = folder / "journal.jsonl"
    return path.stat().st_size if path.exists() else 0


# --- what must hold afterwards ---------------------------------------------------------------------------------------


def compare(run: Path, undisturbed: Path) -> dict[str, Any]:
    """Evaluations lost and paid for twice, and whether everything the strategy saw is the same."""
    ours, theirs = (read_journal(folder / "journal.jsonl") for folder in (run, undisturbed))

    def keys(records: list[dict[str, Any]]) -> Counter[tuple[str, str]]:
        return Counter((r["id"], r["split"]) for r in records if r["event"] == "evaluated")

    def trajectory(records: list[dict[str, Any]]) -> list[Any]:
        kept = [r for r in records if r["event"] in ("asked", "told", "seeded", "finalists", "best")]
        return [{key: value for key, value in r.items() if key not in ("seq", "ask_s")} for r in kept]

    def scores(records: list[dict[str, Any]]) -> dict[Any, Any]:
        return {(r["id"], r["split"]): (r["status"], r["scores"]) for r in records if r["event"] == "evaluated"}

    return {
        "lost": sum((keys(theirs) - keys(ours)).values()),
        "paid_twice": sum(count - 1 for count in keys(ours).values()),
        "same_trajectory": flat(trajectory(ours)) == flat(trajectory(theirs)) and scores(ours) == scores(theirs),
        "same_front_file": (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes(),
    }


def flat(trajectory: list[Any]) -> list[str]:
    return [json.dumps(record, sort_keys=True) for record in trajectory]


def driver_chaos(folder: Path, n_kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs searches, each killed about 30 times, until there have been `n_kills` kills."""
    undisturbed = folder / "undisturbed"
    wanted = settings()
    if ended(fork(lambda: begin(undisturbed, wanted)), 300) != 0:
        raise SystemExit("the undisturbed run failed")
    kinds: Counter[str] = Counter()
    resume_s: list[float] = []
    verdicts: list[dict[str, Any]] = []
    while sum(kinds.values()) < n_kills:
        run = folder / f"run{len(verdicts)}"
        result = kill_driver(run, wanted, min(30, n_kills - sum(kinds.values())), rng)
        kinds.update(result["kinds"])
        resume_s += result["resume_s"]
        verdicts.append(compare(run, undisturbed))
        print(f"driver: {sum(kinds.values())} kills, {verdicts[-1]}", flush=True)
        shutil.rmtree(run)
    return {
        "kills": sum(kinds.values()),
        "kinds": dict(kinds),
        **together(verdicts),
        "seconds_to_resume": spread(resume_s),
    }


def together(verdicts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "runs": len(verdicts),
        "evaluations_lost": sum(item["lost"] for item in verdicts),
        "evaluations_paid_twice": sum(item["paid_twice"] for item in verdicts),
        "runs_with_the_same_trajectory": sum(item["same_trajectory"] for item in verdicts),
        "runs_with_the_same_front_file": sum(item["same_front_file"] for item in verdicts),
    }


def spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    return {"median": round(statistics.median(values), 3), "max": round(max(values), 3)}


# --- fuzz ------------------------------------------------------------------------------------------------------------


def fuzz(folder: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Damages a real journal at random and opens it."""
    run = folder / "fuzz"
    if ended(fork(lambda: begin(run, settings(budget={"evaluations": 40}))), 300) != 0:
        raise SystemExit("the run to be fuzzed failed")
    path = run / "journal.jsonl"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    original = read_journal(path)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        kind = rng.choice(["truncation", "bit flip", "duplication"])
        damaged = bytearray(content)
        if kind == "truncation":
            damaged = damaged[: rng.randrange(len(content))]
        elif kind == "bit flip":
            for _ in range(rng.choice([1, 1, 1, 2, 8])):
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif rng.random() < 0.5:
            at, line = rng.randrange(len(lines) + 1), rng.choice(lines)
            damaged = bytearray(b"".join([*lines[:at], line, *lines[at:]]))
        else:
            start = rng.randrange(len(content))
            end = min(len(content), start + rng.randrange(1, 2000))
            damaged[start:start] = content[start:end]
        if bytes(damaged) == content:
            outcomes["unchanged"] += 1
            continue
        path.write_bytes(damaged)
        try:
            events = read_journal(path)
            RunState.of(events)
        except JournalError:
            outcomes[f"{kind}: refused"] += 1
            continue
        prefix = events == original[: len(events)]
        # only a torn end may be left out: one line, or the last two if a bit flip removed the line break between them
        outcomes[f"{kind}: recovered up to the damage" if prefix else "SILENTLY WRONG"] += 1
        if prefix and len(events) < damaged.count(b"\n") + (not damaged.endswith(b"\n")) - 1:
            outcomes["SILENTLY SHORT"] += 1
    path.write_bytes(content)
    return {"mutations": count, "outcomes": dict(sorted(outcomes.items()))}


# --- ray -------------------------------------------------------------------------------------------------------------


def ray_chaos(folder: Path, n_kills: int, rng: random.Random) -> dict[str, Any]:
    """Kills workers, raylets, drivers and heads of a search on a local cluster of three nodes, each kind at least once."""
    logging.disable(logging.ERROR)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = str(HEAD_PATIENCE_S)  # noqa: SIM112  (Ray's own spelling)
    undisturbed, run = folder / "ray-undisturbed", folder / "ray-run"
    n_evaluations = 40 * n_kills  # enough that the run outlasts the kills, even if a node takes seconds to start
    common = {
        "evaluation": {**SETTINGS["evaluation"], "failure_rate": 0.0, "delay_s": 0.25},
        "budget": {"evaluations": n_evaluations},
    }
    local = settings(**common, cluster={"kind": "local", "workers": 3})
    local["evaluation"] = {**local["evaluation"], "delay_s": 0.0}
    if ended(fork(lambda: begin(undisturbed, local)), 600) != 0:
        raise SystemExit("the undisturbed run failed")
    cluster = start_cluster()
    nodes = [add_node(cluster) for _ in range(2)]
    section = {"kind": "ray", "workers": 3, "max_attempts": 50, "startup_timeout_s": 120}
    wanted = settings(**common, cluster={**section, "address": cluster.address})
    kinds: Counter[str] = Counter()
    first = rng.sample(KINDS, len(KINDS))
    recovery_s: list[float] = []
    pid = spawn(run, wanted)
    status: int | None = None
    try:
        while sum(kinds.values()) < n_kills:
            size = size_of(run)
            started = time.monotonic()
            while size_of(run) <= size and status is None:
                status = ended(pid, 0.02)
                if time.monotonic() - started > 180:
                    raise SystemExit("the run stands still")
            if kinds:
                recovery_s.append(time.monotonic() - started)
            if status is not None:
                break
            time.sleep(rng.uniform(0.05, 1.5))
            kind = first.pop() if first else rng.choices(KINDS, weights=[4, 2, 1, 1])[0]
            if kind == "worker":
                rng.choice(running_workers()).kill()
            elif kind == "raylet":
                index = rng.randrange(len(nodes))
                cluster.remove_node(nodes[index], allow_graceful=False)
                nodes[index] = add_node(cluster)
            elif kind == "head":
                next(p for p in psutil.Process().children(recursive=True) if "gcs_server" in p.name()).kill()
                if ended(pid, 20 * HEAD_PATIENCE_S) is None:
                    raise SystemExit("the driver goes on without a head")
                cluster.shutdown()
                cluster = start_cluster()
                nodes = [add_node(cluster) for _ in range(2)]
                wanted = settings(**common, cluster={**section, "address": cluster.address})
                pid = spawn(run, wanted)
            else:
                os.kill(pid, signal.SIGKILL)
                ended(pid, 10)
                pid = spawn(run, wanted)
            kinds[kind] += 1
            print(f"ray: {dict(kinds)}, {size_of(run)} bytes of journal", flush=True)
        status = ended(pid, 600) if status is None else status
    finally:
        cluster.shutdown()
    if status != 0:
        raise SystemExit(f"the last driver ended with status {status}")
    lost = sum(record["event"] == "lost" for record in read_journal(run / "journal.jsonl"))
    return {
        "kills": sum(kinds.values()), "kinds": dict(kinds), **together([compare(run, undisturbed)]),
        "requests_given_to_another_worker": lost, "seconds_until_the_next_result": spread(recovery_s),
    }  # fmt: skip


KINDS = ("worker", "raylet", "driver", "head")

HEAD_PATIENCE_S = 5
"""Seconds for which the parts of Ray look for a head that has gone; Ray's default is 60."""


def spawn(folder: Path, wanted: dict[str, Any]) -> int:
    """Like `fork`, but in a new Python process: Ray does not survive a fork."""
    return subprocess.Popen([sys.executable, __file__, "--go-on", str(folder), json.dumps(wanted)]).pid


def running_workers() -> list[Any]:
    """The actors of this cluster that hold evaluators, at least one: they rename themselves, and reappear some time after a kill."""
    for _ in range(600):
        workers = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
        if workers:
            return workers
        time.sleep(0.1)
    raise SystemExit("no worker came back within a minute")


def is_worker(process: Any) -> bool:
    try:
        return " ".join(process.cmdline()).startswith("ray::Worker")
    except psutil.Error:  # it has ended in the meantime
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--driver", type=int, default=240)
    parser.add_argument("--ray", type=int, default=60)
    parser.add_argument("--fuzz", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--go-on", nargs=2, metavar=("RUN", "SETTINGS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.go_on:
        go_on(Path(options.go_on[0]), json.loads(options.go_on[1]))
        return
    rng = random.Random(options.seed)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "seed": options.seed,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin(folder / "warm-up", settings(budget={"evaluations": 20}))  # the forks inherit its imports
        try:
            if options.driver:
                result["driver"] = driver_chaos(folder, options.driver, rng)
            if options.fuzz:
                result["fuzz"] = fuzz(folder, options.fuzz, rng)
            if options.ray:
                result["ray"] = ray_chaos(folder, options.ray, rng)
        except EvomergeError as problem:
            raise SystemExit(f"error: {problem}") from None
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
