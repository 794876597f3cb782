"""Strategies learn where candidates fail, even if their models expect the best ones there, and survive scores that say nothing."""

import numpy as np
import pytest

from evomerge.archive import hypervolume
from evomerge.core import Direction, Evaluation, Objective, Split, Status
from evomerge.search.budget import MAX_FAILURES_IN_A_ROW
from evomerge.strategy import make_strategy
from evomerge.strategy.cma_surrogate_run import _TAU, SurrogateRun


def search(name, function, dimension, n_objectives, budget, seed, workers=4, **options):
    """The losses (m,) of an asynchronous search in the order of the results; None for a failure."""
    objectives = [Objective(f"f{i}", Direction.MINIMIZE) for i in range(n_objectives)]
    strategy = make_strategy(name, dimension=dimension, objectives=objectives, seed=seed, **options)
    pending, results = [], []
    while len(results) < budget:
        pending += strategy.ask(workers - len(pending))
        candidate = pending.pop(0)
        losses = function(np.array(candidate.genome.values))
        results.append(losses)
        if losses is None:
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.FAILED, error="out of memory")])
        else:
            scores = {f"f{i}": float(value) for i, value in enumerate(losses)}
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    return results


def best_where_it_fails(x):
    return None if x.sum() > 0.65 * len(x) else [np.sum((x - 0.8) ** 2), (x[0] - 0.9) ** 2 + np.sum((x[1:] - 0.6) ** 2)]


def longest_run(results):
    longest = run = 0
    for losses in results:
        run = run + 1 if losses is None else 0
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("name", ["map", "cma_es", "optuna", "nsga2", "cycleqd", "catcma", "ga"])
def test_the_search_goes_on_beside_a_region_of_failures(name):
    """A run ends after `MAX_FAILURES_IN_A_ROW`."""

    def volume(name, seed):
        results = search(name, best_where_it_fails, 4, 2, 100, seed)
        assert longest_run(results) < MAX_FAILURES_IN_A_ROW / 2
        return hypervolume(np.array([losses for losses in results if losses is not None]), [0.5, 0.5])

    seeds = range(3)
    assert np.median([volume(name, seed) for seed in seeds]) > np.median([volume("sobol", seed) for seed in seeds])


def test_a_design_among_failures_ends():
    """Although few of its points succeed; otherwise `map` would never use what it knows."""
    results = search("map", lambda x: None if x.max() > 0.6 else [x.sum(), -x[0]], 6, 2, 120, 0)
    n_late = sum(losses is not None for losses in results[-40:])
    assert sum(losses is not None for losses in results[:40]) < 5 < 12 < n_late


@pytest.mark.parametrize("choices", [[0], [3, 0], [3, 0, 0]])
def test_catcma_survives_equal_scores(choices):
    """Its distribution grows without limit then, so it starts again with another one."""
    for seed in range(5):
        results = search("catcma", lambda x: [0.5], len(choices), 1, 300, seed, choices=choices)
        assert len(results) == 300


def test_catcma_starts_again_after_convergence():
    """At another place, from which it may find another optimum."""

    def two_peaks(x):
        return [min(np.sum((x - 0.2) ** 2) + 0.1, np.sum((x - 0.8) ** 2))]

    best = [np.min(search("catcma", two_peaks, 2, 1, 2500, seed, choices=[0, 0])) for seed in range(4)]
    assert max(best) < 1e-3


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_cma_es_replaces_evaluations_by_its_model_only_while_that_is_right(workers, monkeypatch):
    close, n_closed = SurrogateRun._close, [0, 0]

    def checked(run):
        whole = len(run._losses) == run._population_size
        assert whole or run._model.agreement(run._n_modelled) >= _TAU
        n_closed[whole] += 1
        close(run)

    monkeypatch.setattr(SurrogateRun, "_close", checked)
    noise = np.random.default_rng(0)
    search("cma_es", lambda x: [np.sum((x - 0.37) ** 2) + 0.05 * noise.standard_normal()], 8, 1, 300, 0, workers)
    assert min(n_closed) > 0
