"""Short searches over the demo models with any strategy, through one running engine: `strategies.py models` tabulates them."""

import os
from collections.abc import Mapping

from evomerge.engine import engine_environment

os.environ.update(engine_environment())

import numpy as np

from evomerge.archive import hypervolume
from evomerge.build import load_config, make_problem
from evomerge.build.evaluators import evaluator_settings, make_evaluator
from evomerge.build.strategies import strategy_for
from evomerge.config import SearchConfig
from evomerge.core import Candidate, Evaluation, EvaluationRequest, Split, VectorGenome, canonical_json
from evomerge.search.tables import Entry

N_WORKERS = 2
DEMO, NICHES = "configs/demo.yaml", "configs/niches.yaml"
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "m2n2, random crossovers": {"name": "m2n2", "warm_up": 1000},
    "m2n2, genetic algorithm": {"name": "m2n2", "alpha": 0, "attraction": False},
    "nevergrad": {"name": "nevergrad", "n_workers": N_WORKERS},
}
"""Rows of the table whose strategy options are not the defaults."""


class DemoModels:
    """The demo models behind one engine; equal recipes are scored once.

    Args:
        limit: items of each of the three tasks.
        space: searched instead of the demo's space.
    """

    def __init__(self, limit: int, space: Mapping[str, object] | None = None) -> None:
        self._limit = limit
        self._space = space
        self._evaluator = make_evaluator(evaluator_settings(self._config("random", 0, 1)))
        self._known: dict[str, Evaluation] = {}

    def search(self, row: str, budget: int, seed: int) -> tuple[float, float, float]:
        """Hypervolume (reference 0), best mean score on the search items, and the mean of that candidate on the report items."""
        problem = make_problem(self._config(row, seed, budget))
        strategy, entries, results = strategy_for(problem), {}, {}
        seeds = []
        for item in problem.baselines():
            genome = None if item.values is None else VectorGenome(item.values)
            entries[item.id] = Entry(item.id, genome, recipe=item.recipe, baseline=True)
            results[item.id] = self._score(item.id, item.recipe, Split.SEARCH)
            seeds += [item.id] if genome is not None else []
        strategy.seed([entries[name].candidate() for name in seeds], [results[name] for name in seeds])
        pending: list[Candidate] = []
        while len(results) < budget and not (strategy.stop_reasons() and not pending):
            asked = strategy.ask(N_WORKERS - len(pending))
            for candidate in asked:
                entries[candidate.id] = Entry(candidate.id, candidate.genome, candidate.parents)
            pending += asked
            candidate = pending.pop(0)
            recipe = problem.recipe_json(candidate, entries)
            results[candidate.id] = self._score(candidate.id, recipe, Split.SEARCH)
            strategy.tell([results[candidate.id]])
        scores = {name: self._scores(result) for name, result in results.items()}
        best = max(scores, key=lambda name: scores[name].mean())
        recipe = entries[best].recipe or problem.recipe_json(entries[best].candidate(), entries)
        volume = hypervolume(-np.array(list(scores.values())), [0.0, 0.0, 0.0])
        return volume, scores[best].mean(), self._scores(self._score(best, recipe, Split.REPORT)).mean()

    def close(self) -> None:
        self._evaluator.close()

    def _config(self, row: str, seed: int, budget: int) -> SearchConfig:
        options = dict(VARIANTS.get(row, {"name": row}))
        if row.startswith("nevergrad"):
            options["budget"] = budget
        config = load_config(NICHES if options["name"] == "m2n2" else DEMO)
        raw = config.model_dump(mode="json")
        raw |= {"strategy": options, "seed": seed, "budget": {"evaluations": budget}}
        if self._space is not None:
            raw["space"] = self._space
        raw["tasks"] = [{**task, "limit": self._limit} for task in raw["tasks"]]
        return load_config(raw)

    def _score(self, name: str, recipe: Mapping[str, object] | None, split: Split) -> Evaluation:
        key = f"{split.value} {canonical_json({**recipe, 'name': None})}"
        if key not in self._known:
            self._known[key] = self._evaluator.evaluate(EvaluationRequest(name, split, recipe))
        found = self._known[key]
        return Evaluation(name, split, found.status, found.scores, found.stderr, found.item_scores, error=found.error)

    @staticmethod
    def _scores(result: Evaluation) -> np.ndarray:
        return np.array(list(result.scores.values()) or [0.0, 0.0, 0.0])
