"""Strategies learn where candidates fail, even if their models expect the best ones there, and survive scores that say nothing."""

import numpy as np
import pytest
from test_strategy_against_random import search

from evomerge.archive import hypervolume
from evomerge.search.budget import MAX_FAILURES_IN_A_ROW
from evomerge.strategy.cma_surrogate_run import _TAU, SurrogateRun


def best_where_it_fails(x):
    return None if x.sum() > 0.65 * len(x) else [np.sum((x - 0.8) ** 2), (x[0] - 0.9) ** 2 + np.sum((x[1:] - 0.6) ** 2)]


def longest_run(failed):
    longest = run = 0
    for one in failed:
        run = run + 1 if one else 0
        longest = max(longest, run)
    return longest


@pytest.mark.parametrize("name", ["map", "cma_es", "optuna", "nsga2", "cycleqd", "catcma", "ga"])
def test_the_search_goes_on_beside_a_region_of_failures(name):
    """A run ends after `MAX_FAILURES_IN_A_ROW`."""

    def volume(name, seed):
        losses = search(name, best_where_it_fails, 4, 2, 100, seed)
        failed = np.isnan(losses[:, 0])
        assert longest_run(failed) < MAX_FAILURES_IN_A_ROW / 2
        return hypervolume(losses[~failed], [0.5, 0.5])

    seeds = range(3)
    assert np.median([volume(name, seed) for seed in seeds]) > np.median([volume("sobol", seed) for seed in seeds])


def test_a_design_among_failures_ends():
    """Although few of its points succeed; otherwise `map` would never use what it knows."""
    losses = search("map", lambda x: None if x.max() > 0.6 else [x.sum(), -x[0]], 6, 2, 120, 0)
    good = ~np.isnan(losses[:, 0])
    assert good[:40].sum() < 5 < 12 < good[-40:].sum()


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
