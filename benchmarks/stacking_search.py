"""Results of searches over layer stacks on the demo models: the subcommands `search` and `table` of `stacking.py`.

Every search scores the same number of items, baselines included; the two searches of a two-stage search share it. A winner is the best on
`select` among a search's five best candidates (baselines excluded), and is scored on all `report` items. Intervals of differences are
paired by item, over the mean of the seeds' winners: they show how well the items distinguish these winners, but nothing about other seeds,
whose spread can be seen from the individual seeds.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evomerge.build import export_recipe, load_config, make_problem, merge_recipe, open_run, start_search
from evomerge.build.evaluators import evaluator_settings, make_evaluator
from evomerge.build.problem import Problem
from evomerge.core import Evaluation, EvaluationRequest, Json, Split
from evomerge.recipe import Recipe
from evomerge.search import utility

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TASKS = ("largest", "reverse", "translate")
ITEMS = 24_000
"""items of every search: 80 candidates with 300 items each"""
LIMIT = 100
"""`search` items per task"""
FINALISTS = 5
Z_95 = 1.96
Rows = list[list[float]]
"""(tasks, items) scores on `report`"""


@dataclass(frozen=True)
class Case:
    """A search to run.

    Attributes:
        space, strategy: their names in the table.
        config: its configuration file.
        settings: differences from the file, as on the command line.
        strategy_of: maps the problem to strategy options that depend on the space.
        first: the case whose result is the model `first` of this one; each then gets half of the items.
    """

    space: str
    strategy: str
    config: str
    settings: tuple[str, ...] = ()
    strategy_of: Callable[[Problem], Mapping[str, Json]] | None = None
    first: "Case | None" = None


def published_start(problem: Problem) -> Mapping[str, Json]:
    """CMA-ES on real indicators as in arXiv 2403.13187: at the threshold, with the layers of the ends model two steps above it, and scales 1."""
    ends = f"take[0,{problem.config.space.stacking.ends}."
    start = [0.5 + 2 * 0.17 * parameter.name.startswith(ends) for parameter in problem.space.parameters]
    return {"name": "cma_es", "surrogate": "none", "sigma0": 0.17, "start": start}


MERGE = Case(
    "merge alone, a weight for each expert", "cma_es", "demo.yaml", ("space.module_groups=[]", "strategy=cma_es")
)
CASES: Mapping[str, Case] = {
    "catcma": Case("stack, indicators", "catcma", "stacking.yaml"),
    "relaxed": Case("stack, indicators", "cma_es on real indicators", "stacking.yaml", (), published_start),
    "ga": Case("stack, indicators", "ga", "stacking.yaml", ("strategy=ga",)),
    "merge": MERGE,
    "both": Case("merge and stack in one search, swap", "catcma", "ps_dfs.yaml"),
    "stages": Case("two stages: merge, then swap", "cma_es, catcma", "two_stages.yaml", first=MERGE),
    "stages_indicator": Case(
        "two stages: merge, then indicators",
        "cma_es, catcma",
        "two_stages.yaml",
        (
            "space.stacking={encoding: indicator, models: [first, largest, reverse, translate], ends: first, max_depth: 8}",
        ),
        first=MERGE,
    ),
}


def overrides(case: Case, seed: int, items: int, zoo: Path, *, limit: int | None = LIMIT) -> list[str]:
    """The settings of a run."""
    tasks = [{"task": f"../tasks/{name}.yaml", **({"limit": limit} if limit else {})} for name in TASKS]
    names = ("largest", "reverse", "translate")
    return [
        f"models.base={json.dumps(str(zoo / 'base'))}",
        *(f"models.experts.{name}={json.dumps(str(zoo / name))}" for name in names),
        f"tasks={json.dumps(tasks)}",
        f"seed={seed}",
        f"budget={{items: {items}}}",
        "cluster={kind: local, workers: 1}",
        "engine.kind=transformers",
        "finals.finalists=0",
        *case.settings,
    ]


def run_case(case: Case, seed: int, zoo: Path, folder: Path) -> dict[str, Json]:
    """Runs a search and its finals; returns scores of the winner, and the number of items scored to find it."""
    started, spent, more, items = time.perf_counter(), 0.0, [], ITEMS
    if case.first is not None:
        items = ITEMS // 2
        config = load_config(CONFIGS / case.first.config, overrides(case.first, seed, items, zoo))
        spent += start_search(config, folder / "first").items_told
        best = finals(case.first, seed, zoo, folder / "first", [])[0]
        export_recipe(folder / "first", f"id:{best}", folder / "first.yaml")
        merge_recipe(folder / "first.yaml", folder / "first-model")
        more = [f"models.experts.first={json.dumps(str(folder / 'first-model'))}"]
    settings = [*overrides(case, seed, items, zoo), *more]
    config = load_config(CONFIGS / case.config, settings)
    if case.strategy_of is not None:
        options = case.strategy_of(make_problem(config))
        config = load_config(CONFIGS / case.config, [*settings, f"strategy={json.dumps(options)}"])
    spent += start_search(config, folder / "run").items_told
    name, select, report, baselines = finals(case, seed, zoo, folder / "run", more)
    problem = make_problem(config)
    return {
        "space": case.space,
        "strategy": case.strategy,
        "seed": seed,
        "dimension": problem.space.dimension,
        "items": spent,
        "winner": name,
        "select": select,
        "report": report,
        "baselines": baselines,
        "seconds": time.perf_counter() - started,
    }


def finals(
    case: Case, seed: int, zoo: Path, run_folder: Path, more: Sequence[str]
) -> tuple[str, float, Rows, dict[str, Json]]:
    """For a finished run: the winner, its mean on `select`, its item scores on `report`, and those of the baselines."""
    run = open_run(run_folder)
    problem = make_problem(run.config)
    full = load_config(CONFIGS / case.config, [*overrides(case, seed, ITEMS, zoo, limit=None), *more])
    evaluator = make_evaluator(evaluator_settings(full, n_slots=problem.max_slots))

    def scored(name: str, recipe: Recipe, split: Split) -> Evaluation:
        evaluation = evaluator.evaluate(EvaluationRequest(name, split, recipe.to_json()))
        if evaluation.error:
            raise RuntimeError(f"{name} on {split.value}: {evaluation.error}")
        return evaluation

    told = [item for item in run.state.evaluated() if not run.state.entries.is_baseline(item.candidate_id)]
    ranked = sorted(told, key=lambda item: -utility(run.state.objectives, item))[:FINALISTS]
    recipes = {
        item.candidate_id: problem.recipe_of_entry(run.state.entries[item.candidate_id], run.state.entries)
        for item in ranked
    }
    selects = {
        name: utility(run.state.objectives, scored(name, recipe, Split.SELECT)) for name, recipe in recipes.items()
    }
    winner = max(selects, key=lambda name: selects[name])
    report = rows(scored(winner, recipes[winner], Split.REPORT))
    baselines: dict[str, Json] = {}
    if case.first is None:
        for baseline in problem.baselines():
            recipe = Recipe.from_json(baseline.recipe)
            on_search = utility(run.state.objectives, run.evaluation(baseline.id))
            baselines[baseline.id] = {"search": on_search, "report": rows(scored(baseline.id, recipe, Split.REPORT))}
    evaluator.close()
    return winner, selects[winner], report, baselines


def rows(evaluation: Evaluation) -> Rows:
    return [np.asarray(evaluation.item_scores[name], float).round(6).tolist() for name in TASKS]


def search(names: Sequence[str], seeds: Sequence[int], zoo: Path, out: Path | None) -> None:
    """Runs the cases and writes the results after each search."""
    found = []
    for seed in seeds:
        for name in names:
            with tempfile.TemporaryDirectory(prefix="evomerge-stacking-") as folder:
                result = {"case": name, **run_case(CASES[name], seed, zoo.resolve(), Path(folder))}
            if found:
                result["baselines"] = {}
            found.append(result)
            print(f"{name} seed {seed}: {np.mean(result['report']):.3f} in {result['seconds']:.0f} s", flush=True)
            if out is not None:
                out.write_text(json.dumps(found) + "\n")
    print_table(found)


def table(files: Sequence[Path]) -> None:
    """Prints the results of all searches in `files` together."""
    print_table([result for file in files for result in json.loads(file.read_text())])


def print_table(found: Sequence[Mapping[str, Json]]) -> None:
    """One line per case: winners on `report`, and differences from the best source there and from the search over merges alone."""
    baselines = next(result["baselines"] for result in found if result["baselines"])
    best_source = max((n for n in baselines if n.startswith("source:")), key=lambda n: np.mean(baselines[n]["report"]))
    tuned = max((n for n in baselines if n.startswith("task_arithmetic:")), key=lambda n: baselines[n]["search"])
    of_case = {name: [r for r in found if r["case"] == name] for name in dict.fromkeys(r["case"] for r in found)}
    merges = {r["seed"]: np.array(r["report"]) for r in of_case.get("merge", ())}
    source = np.array(baselines[best_source]["report"])
    print(f"{os.cpu_count()}-core CPU, at most {max(r['items'] for r in found):,.0f} search items each\n")
    print("| space | strategy | d | `report`, mean | each seed | against " + best_source + " | against merge alone |")
    print("|---|---|---|---|---|---|---|")
    for name in (best_source, tuned):
        print(f"| {name} | | | {mean_and_error(np.array(baselines[name]['report']))} | | | |")
    for results in of_case.values():
        items = np.mean([r["report"] for r in results], axis=0)
        each = " ".join(f"{np.mean(r['report']):.3f}" for r in results)
        cells = [
            results[0]["space"],
            f"`{results[0]['strategy']}`",
            results[0]["dimension"],
            mean_and_error(items),
            each,
        ]
        cells.append(interval(items - source))
        same_seeds = [np.array(r["report"]) - merges[r["seed"]] for r in results if r["seed"] in merges]
        cells.append(interval(np.mean(same_seeds, axis=0)) if same_seeds and results[0]["case"] != "merge" else "")
        print("| " + " | ".join(map(str, cells)) + " |")


def mean_and_error(items: np.ndarray) -> str:
    return f"{items.mean():.3f} +- {Z_95 * error(items):.3f}"


def interval(differences: np.ndarray) -> str:
    middle, half = differences.mean(), Z_95 * error(differences)
    return f"{middle:+.3f} [{middle - half:+.3f}, {middle + half:+.3f}]"


def error(items: np.ndarray) -> float:
    """Standard error of the mean over tasks of (tasks, items)."""
    return float(np.sqrt(np.sum(items.var(axis=1, ddof=1) / items.shape[1])) / len(items))
