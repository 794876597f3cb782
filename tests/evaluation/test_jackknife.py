"""Item scores whose mean is a statistic of all items."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.core import random_stream
from evomerge.evaluation.jackknife import MOST_GROUPS, MOST_GROUPS_OF_TEXTS, item_scores


def mean(values):
    return sum(values) / len(values)


def ratio(pairs):
    return sum(above for above, _ in pairs) / sum(below for _, below in pairs)


def stderr(scores):
    return scores.std(ddof=1) / math.sqrt(len(scores))


def drawn_pairs(count, stream):
    below = stream.uniform(5, 500, count)
    return list(zip((below * stream.normal(1.2, 0.2, count)).tolist(), below.tolist(), strict=True))


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=MOST_GROUPS))
def test_item_scores_of_a_mean_are_the_values(values):
    np.testing.assert_allclose(item_scores(values, mean), values, atol=1e-9)


def test_standard_error_is_that_of_the_jackknife():
    values = drawn_pairs(50, random_stream(0, "jackknife"))
    without = np.array([ratio(values[:i] + values[i + 1 :]) for i in range(50)])
    scores = item_scores(values, ratio)
    assert scores.mean() == pytest.approx(ratio(values), rel=1e-14)
    assert stderr(scores) == pytest.approx(math.sqrt(49 / 50 * ((without - without.mean()) ** 2).sum()), rel=1e-12)


@pytest.mark.parametrize("count", [MOST_GROUPS + 1, 1000])
def test_standard_error_with_groups_matches_the_sampling_spread(count):
    """The spread over a hundred fresh samples, which is itself known to within about a seventh."""
    samples = [drawn_pairs(count, random_stream(seed, "groups")) for seed in range(100)]
    spread = np.std([ratio(sample) for sample in samples], ddof=1)
    scores = [item_scores(sample, ratio) for sample in samples[:20]]
    assert [one.mean() for one in scores] == pytest.approx([ratio(sample) for sample in samples[:20]], rel=1e-12)
    assert np.mean([stderr(one) for one in scores]) == pytest.approx(spread, rel=0.25)


def test_mean_difference_of_scores_is_the_difference_of_the_statistics():
    stream = random_stream(1, "jackknife")
    ours = drawn_pairs(300, stream)
    theirs = [(above + stream.normal(0.5, 0.1), below) for above, below in ours]
    difference = item_scores(theirs, ratio) - item_scores(ours, ratio)
    assert difference.mean() == pytest.approx(ratio(theirs) - ratio(ours), rel=1e-9)
    assert stderr(difference) < stderr(item_scores(ours, ratio)) / 10


def test_texts_are_left_out_in_groups():
    counted = []

    def different(pairs):
        counted.append(len(pairs))
        return mean([one != two for one, two in pairs])

    pairs = [("ja", "ja" if sure > 0.3 else "nein") for sure in random_stream(2, "jackknife").uniform(size=101)]
    scores = item_scores(pairs, different)
    assert scores.mean() == pytest.approx(different(pairs))
    assert len(counted) == 2 + MOST_GROUPS_OF_TEXTS
    assert len(set(scores.tolist())) <= MOST_GROUPS_OF_TEXTS
    assert stderr(scores) == pytest.approx(stderr(np.array([one != two for one, two in pairs])), rel=0.4)


def test_score_of_a_single_item_is_the_statistic():
    assert item_scores([(6.0, 3.0)], ratio).tolist() == [2.0]


def test_item_without_which_the_statistic_is_undefined_has_no_effect():
    assert item_scores([(0.0, 0.0), (6.0, 3.0)], ratio).tolist() == [2.0, 2.0]
    endless = item_scores([1.0, 5.0], lambda values: sum(values) / len(values) if 5.0 in values else float("inf"))
    assert endless.tolist() == [2.0, 4.0]
    nan = float("nan")
    scores = item_scores([nan, 3.0, 4.0, nan], lambda values: float(np.nanmean(values)))
    assert scores.mean() == pytest.approx(3.5)
    assert [one < two for one, two in pairwise(sorted(scores))] == [True, False, True]


def test_item_without_which_perplexity_explodes_has_a_finite_score():
    """One text of many words among texts of one word each, as lm-eval counts the words of Japanese texts."""
    values = [(-1500.0, 1000), (-60.0, 1), (-70.0, 1), (-55.0, 1)]
    scores = item_scores(values, lambda kept: math.exp(-sum(log for log, _ in kept) / sum(words for _, words in kept)))
    assert scores.mean() == pytest.approx(math.exp(1685 / 1003), rel=1e-6)
    assert np.isfinite(scores.std())


def test_nan_statistic_is_refused():
    with pytest.raises(ValueError, match="the statistic of all items is nan"):
        item_scores([float("nan")] * 3, lambda values: float(np.mean(values)))
