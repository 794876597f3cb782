import numpy as np
import pytest

from evomerge.core import ConfigError, EvaluationRequest, Split, Status
from evomerge.evaluation import SyntheticEvaluator, synthetic_task_names


def ask(values, candidate="c", split=Split.SEARCH, attempt=0):
    return EvaluationRequest(candidate, split, values=tuple(values), attempt=attempt)


@pytest.mark.parametrize(
    ("function", "best", "corner"), [("sphere", 0.7, 0.0), ("rastrigin", 0.7, 0.2093), ("rosenbrock", 0.75, 0.0)]
)
def test_optimum_scores_one_and_everything_else_less(function, best, corner):
    evaluator = SyntheticEvaluator(function)
    assert evaluator.evaluate(ask([best] * 5)).scores["f1"] == pytest.approx(1.0)
    assert evaluator.evaluate(ask([0.0] * 5)).scores["f1"] == pytest.approx(corner, abs=1e-4)
    stream = np.random.default_rng(0)
    scores = [evaluator.evaluate(ask(stream.random(5))).scores["f1"] for _ in range(50)]
    assert max(scores) < 1.0
    assert min(scores) > -1.0


def test_zdt1_front_has_its_published_shape():
    evaluator = SyntheticEvaluator("zdt1")
    assert evaluator.task_names == synthetic_task_names("zdt1") == ("f1", "f2")
    on_front = evaluator.evaluate(ask([0.25, 0, 0])).scores
    assert on_front == {"f1": pytest.approx(0.75), "f2": pytest.approx(1 - (1 - 0.5) / 10)}


@pytest.mark.parametrize(
    ("function", "shape"),
    [("zdt1", 1 - 0.2), ("zdt2", 1 - 0.04**2), ("zdt3", 1 - 0.2 - 0.04 * np.sin(1.6 * np.pi))],
)
def test_zdt_off_the_front_follows_the_definition(function, shape):
    """f = 0.16 and g = 1 + 9 / 3 = 4, so f / g = 0.04."""
    scores = SyntheticEvaluator(function).evaluate(ask([0.16, 0.5, 1 / 6])).scores
    assert scores == {"f1": pytest.approx(0.84), "f2": pytest.approx(1 - 4 * shape / 10)}


def test_dtlz2_front_is_a_sphere():
    evaluator = SyntheticEvaluator("dtlz2")
    assert evaluator.task_names == ("f1", "f2", "f3")
    for values in ([0.3, 0.8, 0.5, 0.5], [0.9, 0.1, 0.5], [0.4, 0.2], [0.6]):
        losses = [1.0 - score for score in evaluator.evaluate(ask(values)).scores.values()]
        assert np.linalg.norm(losses) == pytest.approx(1 / (1 + 0.25 * max(0, len(values) - 2)))
    worse = evaluator.evaluate(ask([0.3, 0.8, 0.0, 1.0])).scores
    assert all(worse[name] < score for name, score in evaluator.evaluate(ask([0.3, 0.8, 0.5, 0.5])).scores.items())


def test_item_scores_depend_only_on_seed_split_and_point():
    evaluator = SyntheticEvaluator("sphere", n_items=200, item_noise=0.3, seed=1)
    first = evaluator.evaluate(ask([0.1, 0.9], "a"))
    evaluator.evaluate(ask([0.3, 0.3], "b"))
    again = SyntheticEvaluator("sphere", n_items=200, item_noise=0.3, seed=1).evaluate(ask([0.1, 0.9], "z", attempt=3))
    assert np.array_equal(first.item_scores["f1"], again.item_scores["f1"])
    for other in (
        evaluator.evaluate(ask([0.1, 0.9], split=Split.REPORT)),
        SyntheticEvaluator("sphere", n_items=200, item_noise=0.3, seed=2).evaluate(ask([0.1, 0.9])),
        evaluator.evaluate(ask([0.1, 0.8])),
    ):
        assert not np.array_equal(first.item_scores["f1"], other.item_scores["f1"])
    assert first.scores["f1"] == pytest.approx(float(first.item_scores["f1"].mean()), abs=1e-6)
    assert first.stderr["f1"] == pytest.approx(0.3 / np.sqrt(200), rel=0.2)


def test_item_scores_of_different_candidates_are_correlated():
    """Hard items are hard for every candidate, as in real tasks, so paired comparisons are worthwhile."""
    evaluator = SyntheticEvaluator("sphere", n_items=2000, item_noise=1.0)
    one, two = (evaluator.evaluate(ask([x])).item_scores["f1"] for x in (0.6, 0.8))
    assert 0.4 < np.corrcoef(one, two)[0, 1] < 0.6


def test_failures_are_reproducible_and_may_succeed_on_retry():
    evaluator = SyntheticEvaluator("sphere", failure_rate=0.3, seed=4)
    outcomes = [evaluator.evaluate(ask([0.5], f"c{i}")).status for i in range(400)]
    assert outcomes == [evaluator.evaluate(ask([0.5], f"c{i}")).status for i in range(400)]
    assert 80 < outcomes.count(Status.FAILED) < 160
    failed = [i for i, status in enumerate(outcomes) if status is Status.FAILED]
    retried = [evaluator.evaluate(ask([0.5], f"c{i}", attempt=1)).status for i in failed]
    assert Status.OK in retried
    assert evaluator.evaluate(EvaluationRequest("c", Split.SEARCH)).status is Status.FAILED


def test_unknown_function_is_refused():
    with pytest.raises(ConfigError, match="unknown function 'spere'; did you mean 'sphere'"):
        SyntheticEvaluator("spere")
