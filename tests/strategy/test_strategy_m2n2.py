"""Natural niches: specialists survive where a plain genetic algorithm loses them."""

import numpy as np

from evomerge.core import Evaluation, Objective, Split, Status
from evomerge.strategy import make_strategy

CENTRES = np.random.default_rng(3).random((12, 6))


def evaluate(candidate):
    """Twelve items in two unequal groups: each is solved near its own centre."""
    distance = np.linalg.norm(np.array(candidate.genome.values) - CENTRES, axis=1)
    items = (distance < 0.55).astype(np.float32)
    return Evaluation(
        candidate.id, Split.SEARCH, Status.OK, scores={"t": float(items.mean())}, item_scores={"t": items}
    )


def covered(seed, **options):
    strategy = make_strategy("m2n2", dimension=6, objectives=[Objective("t")], seed=seed, population_size=8, **options)
    for _ in range(200):
        strategy.tell([evaluate(candidate) for candidate in strategy.ask(2)])
    return np.max([items for _, items in strategy.archive], axis=0).sum()


def test_competition_keeps_more_items_covered():
    niches = [covered(seed) for seed in range(5)]
    genetic = [covered(seed, alpha=0.0, attraction=False) for seed in range(5)]
    assert np.mean(niches) > np.mean(genetic) + 1.0


def test_candidates_with_another_number_of_items_stay_out():
    strategy = make_strategy("m2n2", dimension=6, objectives=[Objective("t")], seed=1, population_size=4)
    first, second = strategy.ask(2)
    strategy.tell([evaluate(first)])
    partial = Evaluation(
        second.id, Split.SEARCH, Status.OK, scores={"t": 1.0}, item_scores={"t": np.ones(3, np.float32)}
    )
    strategy.tell([partial])
    assert [candidate_id for candidate_id, _ in strategy.archive] == [first.id]
    assert strategy.recommend() == second
