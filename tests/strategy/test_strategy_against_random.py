"""With the same budget, the learning strategies beat random search in the median over fixed seeds."""

from dataclasses import replace

import numpy as np
import pytest

from evomerge.archive import hypervolume
from evomerge.core import Direction, Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy

SEEDS = range(5)


def search(name, function, dimension, n_objectives, budget, seed, workers=4, **options):
    """Losses (budget, m) of an asynchronous search with `workers` pending candidates; NaN for those for which `function` gives None, which fail."""
    objectives = [Objective(f"f{i}", Direction.MINIMIZE) for i in range(n_objectives)]
    strategy = make_strategy(name, dimension=dimension, objectives=objectives, seed=seed, **options)
    pending, losses = [], []
    while len(losses) < budget:
        pending += strategy.ask(workers - len(pending))
        candidate = pending.pop(0)
        found = function(np.array(candidate.genome.values))
        losses.append([np.nan] * n_objectives if found is None else found)
        scores = {f"f{i}": float(value) for i, value in enumerate(losses[-1])}
        evaluation = Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)
        strategy.tell([replace(evaluation, status=Status.FAILED, scores={}) if found is None else evaluation])
    return np.array(losses)


def sphere(x):
    return [np.sum((x - 0.3) ** 2)]


def rosenbrock(x):
    y = 4.0 * x - 2.0
    return [np.sum(100.0 * (y[1:] - y[:-1] ** 2) ** 2 + (1.0 - y[:-1]) ** 2)]


def zdt1(x):
    g = 1.0 + 9.0 * x[1:].mean()
    return [x[0], g * (1.0 - np.sqrt(x[0] / g))]


def dtlz2(x):
    g = np.sum((x[2:] - 0.5) ** 2)
    a, b = x[0] * np.pi / 2, x[1] * np.pi / 2
    return [(1 + g) * np.cos(a) * np.cos(b), (1 + g) * np.cos(a) * np.sin(b), (1 + g) * np.sin(a)]


@pytest.mark.parametrize("options", [{}, {"variant": "sep"}, {"variant": "vkd"}, {"restarts": "bipop"}], ids=str)
@pytest.mark.parametrize("function", [sphere, rosenbrock])
def test_cma_es_beats_random_search(function, options):
    ours = [search("cma_es", function, 8, 1, 400, seed, **options).min() for seed in SEEDS]
    random = [search("random", function, 8, 1, 400, seed).min() for seed in SEEDS]
    assert np.median(ours) < 0.1 * np.median(random)


@pytest.mark.parametrize("name", ["nsga2", "sms_emoa"])
def test_two_objective_strategies_beat_random_search(name):
    ours = [hypervolume(search(name, zdt1, 8, 2, 400, seed), [1.1, 1.1]) for seed in SEEDS]
    random = [hypervolume(search("random", zdt1, 8, 2, 400, seed), [1.1, 1.1]) for seed in SEEDS]
    assert np.median(ours) > np.median(random) + 0.1


@pytest.mark.parametrize("name", ["nsga2", "nsga3", "sms_emoa"])
def test_three_objective_strategies_beat_random_search(name):
    ours = [hypervolume(search(name, dtlz2, 8, 3, 300, seed), [1.1] * 3) for seed in SEEDS]
    random = [hypervolume(search("random", dtlz2, 8, 3, 300, seed), [1.1] * 3) for seed in SEEDS]
    assert np.median(ours) > np.median(random) + 0.05
