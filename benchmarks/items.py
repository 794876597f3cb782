"""Few or many items per candidate: searches with equal item budgets and different `evaluation.search_items`.

    python benchmarks/items.py configs/demo.yaml --items 24000 --search-items 20 50 100 200 --seeds 4

Every search is one `evomerge search` with its finals: baselines and candidates are scored on the given number of items of each task until the
item budget is used up, and the finalists on all of `select`. For each number, prints the winner's mean score on all items of `report`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path


def search(config: str, search_items: int, budget: int, seed: int, folder: Path) -> dict:
    """The summary of one search."""
    settings = {
        "evaluation.search_items": search_items,
        "budget.items": budget,
        "budget.evaluations": "null",
        "seed": seed,
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [str(Path(sys.executable).with_name("evomerge")), "search", config, "--run-dir", str(folder), *changes]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--items", type=int, required=True, help="budget of each search")
    parser.add_argument("--search-items", type=int, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{arguments.config}, {arguments.items:,} items for each search, {arguments.seeds} seeds, {date.today()}")
    print("mean +- standard error over the seeds\n")
    print("| search items of a task | evaluations | mean score on search | on report |\n|---|---|---|---|")
    for search_items in arguments.search_items:
        rows = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as folder:
                found = search(arguments.config, search_items, arguments.items, seed, Path(folder, "run"))
            best = {name: found["splits"][name]["best"] for name in ("search", "report")}
            rows.append((found["evaluations"], *(statistics.mean(scores.values()) for scores in best.values())))
        cells = [
            f"{statistics.mean(column):.3f} +- {statistics.stdev(column) / len(rows) ** 0.5:.3f}"
            for column in list(zip(*rows, strict=True))[1:]
        ]
        print(f"| {search_items} | {statistics.mean(row[0] for row in rows):.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
