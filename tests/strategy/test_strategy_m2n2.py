"""Natural niches: specialists survive that a plain genetic algorithm loses."""

import numpy as np
import pytest

from evomerge.core import Candidate, ConfigError, CrossoverGenome, Evaluation, Objective, Split, Status, VectorGenome
from evomerge.strategy import make_strategy

CENTRES = np.random.default_rng(3).random((12, 6))


def evaluate(candidate):
    """Twelve items in two unequal groups; an item is solved near its own centre."""
    distance = np.linalg.norm(np.array(candidate.genome.values) - CENTRES, axis=1)
    items = (distance < 0.55).astype(np.float32)
    return Evaluation(
        candidate.id, Split.SEARCH, Status.OK, scores={"t": float(items.mean())}, item_scores={"t": items}
    )


def covered(seed, **options):
    strategy = make_strategy(
        "m2n2", dimension=6, objectives=[Objective("t")], seed=seed, on="recipes", population_size=8, **options
    )
    for _ in range(200):
        strategy.tell([evaluate(candidate) for candidate in strategy.ask(2)])
    return np.max([items for _, items in strategy.archive], axis=0).sum()


def test_competition_keeps_more_items_covered():
    niches = [covered(seed) for seed in range(5)]
    genetic = [covered(seed, alpha=0.0, attraction=False) for seed in range(5)]
    assert np.mean(niches) > np.mean(genetic) + 1.0


def test_children_inherit_choices_from_a_parent():
    """The mean of the first and the last choice would be one of the choices between them."""
    strategy = make_strategy(
        "m2n2",
        dimension=4,
        objectives=["t"],
        seed=1,
        on="recipes",
        population_size=3,
        mutation_sigma=0.0,
        choices=(5, 5, 5, 0),
    )
    ends = {"a": (0.1, 0.9, 0.1, 0.2), "b": (0.9, 0.1, 0.9, 0.4), "c": (0.9, 0.9, 0.1, 0.6)}
    strategy.seed(
        [Candidate(name, VectorGenome(values)) for name, values in ends.items()],
        [told(Candidate(name, VectorGenome(ends[name])), items) for name, items in zip(ends, np.eye(3), strict=True)],
    )
    children = strategy.ask(6)
    assert all(set(child.genome.values[:3]) <= {0.1, 0.9} for child in children)
    assert len({child.genome.values for child in children}) == 6


def test_candidates_with_a_different_number_of_items_are_not_archived():
    strategy = make_strategy("m2n2", dimension=6, objectives=[Objective("t")], seed=1, on="recipes", population_size=4)
    first, second = strategy.ask(2)
    strategy.tell([evaluate(first)])
    partial = Evaluation(
        second.id, Split.SEARCH, Status.OK, scores={"t": 1.0}, item_scores={"t": np.ones(3, np.float32)}
    )
    strategy.tell([partial])
    assert [candidate_id for candidate_id, _ in strategy.archive] == [first.id]
    assert strategy.recommend() == second


def crossing(n_models=3, **options):
    return make_strategy("m2n2", dimension=n_models, objectives=[Objective("t")], seed=5, population_size=6, **options)


def told(candidate, items, status=Status.OK):
    items = np.asarray(items, np.float32)
    scores = {"t": float(items.mean())} if status is Status.OK else {}
    return Evaluation(candidate.id, Split.SEARCH, status, scores=scores, item_scores={"t": items} if scores else {})


SEEDS = [Candidate(f"source:{i}", VectorGenome(tuple(float(i == k) for k in range(3)))) for i in range(3)]


def test_seed_models_come_first_then_random_merges_then_children():
    strategy = crossing()
    first = strategy.ask(3)
    assert [candidate.genome for candidate in first] == [seed.genome for seed in SEEDS]
    ids = {candidate.id for candidate in first}
    warm_up = strategy.ask(3)
    assert all(set(candidate.parents) <= ids for candidate in warm_up)
    strategy.tell([told(candidate, [i % 2, 1, 0, i == 3]) for i, candidate in enumerate([*first, *warm_up])])
    members = {candidate_id for candidate_id, _ in strategy.archive}
    children = strategy.ask(40)
    assert {parent for child in children for parent in child.parents} <= members
    assert not {parent for child in children for parent in child.parents} <= ids, "descendants must become parents too"
    assert all(child.genome.parents == child.parents and child.parents[0] != child.parents[1] for child in children)


def test_given_seeds_are_not_proposed_again():
    strategy = crossing(warm_up=2)
    strategy.seed(SEEDS[:2], [told(seed, [i, 1 - i]) for i, seed in enumerate(SEEDS[:2])])
    third, *rest = strategy.ask(4)
    assert third.genome == SEEDS[2].genome
    assert all(isinstance(candidate.genome, CrossoverGenome) for candidate in rest)


def test_failed_seed_model_is_left_out_of_the_warm_up():
    strategy = crossing(warm_up=20)
    first = strategy.ask(3)
    strategy.tell([told(first[0], [], Status.FAILED), told(first[1], [1, 0]), told(first[2], [0, 1])])
    assert {parent for candidate in strategy.ask(20) for parent in candidate.parents} == {first[1].id, first[2].id}


def test_crossover_options_are_applied():
    plain = crossing(split_point=False, chromosomes=3, warm_up=9).ask(9)[3:]
    assert all(candidate.genome.splits == (0.0, 0.0, 0.0) for candidate in plain)
    noisy = crossing(mutation_sigma=0.01, warm_up=9).ask(9)[3:]
    assert {candidate.genome.mutation.sigma for candidate in noisy} == {0.01}
    assert len({candidate.genome.mutation.seed for candidate in noisy}) == 6


def test_invalid_crossover_settings_are_refused():
    with pytest.raises(ConfigError, match="at least two"):
        crossing(n_models=1)
    with pytest.raises(ConfigError, match="chromosomes"):
        crossing(on="recipes", chromosomes=2)
