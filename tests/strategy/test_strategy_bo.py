"""`bo` learns fast, uses known noise and avoids failures, and its trust region moves as in TuRBO."""

import numpy as np
import pytest
import torch
from test_strategy_against_random import search, sphere, zdt1

from evomerge.archive import hypervolume
from evomerge.core import ConfigError, Evaluation, Split, Status
from evomerge.strategy import make_strategy
from evomerge.strategy.trust_region import TrustRegion, centre_of

pytest.importorskip("botorch", reason="botorch is not installed (the extra bo)")

FAST = {"n_initial": 8, "n_samples": 4, "n_restarts": 1, "n_raw": 16, "max_iterations": 10, "refit_growth": 1.5}


def run(strategy, n, score, stderr=0.0, failed=lambda point: False):
    """Tells `n` results one at a time; returns the points in order."""
    points = []
    for _ in range(n):
        (candidate,) = strategy.ask(1)
        points.append(np.array(candidate.genome.values))
        status = Status.FAILED if failed(points[-1]) else Status.OK
        scores = {"a": score(points[-1])} if status is Status.OK else {}
        strategy.tell(
            [Evaluation(candidate.id, Split.SEARCH, status, scores=scores, stderr=dict.fromkeys(scores, stderr))]
        )
    return np.array(points)


def bump(point):
    return -float(np.sum((point - 0.3) ** 2))


def test_one_objective_beats_random_at_a_tenth_of_the_budget():
    assert search("bo", sphere, 4, 1, 25, 0, **FAST).min() < search("random", sphere, 4, 1, 250, 0).min()


def test_two_objectives_beat_nsga2_at_a_third_of_the_budget():
    ours = hypervolume(search("bo", zdt1, 4, 2, 24, 0, **FAST), [1.1, 1.1])
    assert ours > hypervolume(search("nsga2", zdt1, 4, 2, 72, 0), [1.1, 1.1])


def test_nothing_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda **arguments: compiled.append(arguments))
    search("bo", zdt1, 2, 2, 10, 0, **FAST)
    assert not compiled


def test_scale_of_a_tiny_or_huge_objective_does_not_matter():
    """As with perplexity when most of the models are ruined."""
    asked = []
    for units in ([1e-5, 1e5], [1e-9, 1e30]):
        strategy = make_strategy("bo", dimension=2, objectives=["a", "b"], seed=1, **FAST)
        asked.append([])
        for _ in range(11):
            (candidate,) = strategy.ask(1)
            asked[-1].append(candidate.point)
            point = np.array(candidate.point)
            scores = {"a": -units[0] * (1.0 + bump(point)), "b": -units[1] * (1.0 + bump(1.0 - point))}
            strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    np.testing.assert_allclose(asked[0], asked[1], atol=1e-3)


def test_losses_of_usual_size_are_not_rescaled():
    """Dividing them by their standard deviation made the optimisation of three objectives much worse."""
    strategy = make_strategy("bo", dimension=2, objectives=["a", "b"], seed=1, **FAST)
    scales, acquisition = [], strategy._acquisition
    strategy._acquisition = lambda model, points, losses, scale, seed: (
        scales.append(scale.tolist()),
        acquisition(model, points, losses, scale, seed),
    )[1]
    for _ in range(10):
        (candidate,) = strategy.ask(1)
        point = np.array(candidate.point)
        scores = {"a": bump(point), "b": 1e6 * bump(1.0 - point)}
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    assert scales
    assert all(usual == 1.0 and huge > 1e4 for usual, huge in scales)


def test_objective_may_vary_by_rounding_only():
    strategy = make_strategy("bo", dimension=2, objectives=["a", "b"], seed=1, **FAST)
    for number in range(14):
        (candidate,) = strategy.ask(1)
        scores = {"a": bump(np.array(candidate.point)), "b": 1e6 * (1.0 + 2.0**-52 * (number % 2))}
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores)])
    assert np.linalg.norm(np.array(strategy.recommend().point) - 0.3) < 0.3


def test_pending_points_are_not_proposed_again():
    strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, **FAST)
    run(strategy, 10, bump)
    points = np.array([candidate.genome.values for candidate in strategy.ask(3)])
    assert min(np.linalg.norm(points[i] - points[j]) for i in range(3) for j in range(i)) > 1e-3


def test_known_noise_widens_the_posterior():
    deviations = []
    for stderr in (1e-4, 0.2):
        strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, **FAST)
        run(strategy, 10, bump, stderr)
        model = strategy._model(*strategy._visible())
        deviations.append(model.posterior(torch.full((1, 2), 0.3, dtype=torch.float64)).variance.sqrt().item())
    assert deviations[1] > 3.0 * deviations[0]


def test_standard_error_of_zero_counts_as_the_smallest_known():
    strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, **FAST)
    run(strategy, 4, bump, 0.1)
    run(strategy, 4, bump, 0.0)
    model = strategy._model(*strategy._visible())
    noise = model.likelihood.noise.flatten().tolist()
    assert noise == pytest.approx([noise[0]] * 8)


def test_objective_without_standard_errors_is_treated_as_exact():
    strategy = make_strategy("bo", dimension=2, objectives=["a", "b"], seed=1, **FAST)
    for value in range(9):
        (candidate,) = strategy.ask(1)
        scores = {"a": float(value), "b": float(value % 3)}
        strategy.tell([Evaluation(candidate.id, Split.SEARCH, Status.OK, scores=scores, stderr={"a": 0.5})])
    noise = strategy._model(*strategy._visible()).likelihood.noise[:, 0]
    assert noise[1] < 1e-3 < noise[0]


def test_failing_regions_are_avoided():
    strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, **FAST)
    points = run(strategy, 26, lambda point: float(point[0]), failed=lambda point: point[0] > 0.7)
    later = points[12:, 0]
    assert np.sum(later > 0.7) < len(later) / 2
    assert max(later[later <= 0.7]) > 0.6


def test_number_of_threads_and_global_generator_do_not_matter():
    traces = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        state = torch.get_rng_state()
        traces.append(run(make_strategy("bo", dimension=3, objectives=["a"], seed=3, **FAST), 14, bump))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*traces)


def test_old_results_are_dropped_beyond_max_points():
    strategy = make_strategy("bo", dimension=2, objectives=["a"], seed=1, max_points=20, n_initial=40)
    run(strategy, 30, bump)
    points, losses, _ = strategy._visible()
    assert points.shape == (20, 2)
    assert losses.min() == pytest.approx(min(told.losses[0] for told in strategy._finished))


def test_best_results_may_lie_outside_the_trust_region():
    strategy = make_strategy(
        "bo", dimension=40, objectives=["a"], seed=1, trust_region="on", **FAST | {"n_restarts": 8}
    )
    run(strategy, 10, bump)
    strategy._region.box = lambda centre, length_scales: np.tile([[0.8], [1.0]], 40)
    assert min(strategy._refine()) >= 0.8


def test_constant_losses_work_and_too_many_objectives_are_refused():
    run(make_strategy("bo", dimension=2, objectives=["a"], seed=1, **FAST), 12, lambda point: 0.5)
    with pytest.raises(ConfigError, match="at most 4 objectives, got 5; use map"):
        make_strategy("bo", dimension=2, objectives=list("abcde"), seed=1)


def test_trust_region_grows_shrinks_and_ends():
    region = TrustRegion(6)
    for _ in range(3):
        region.learn(True)
    assert region.length == 1.6
    for _ in range(6):
        region.learn(False)
    assert region.length == 0.8
    low, high = region.box(np.full(6, 0.5), np.array([1.0, 1.0, 1.0, 1.0, 1.0, 8.0]))
    assert ((low >= 0.0) & (high <= 1.0)).all()
    assert high[5] - low[5] > high[0] - low[0]
    for _ in range(60):
        region.learn(False)
    assert region.exhausted


def test_centre_is_the_best_point_or_the_largest_contributor_to_the_front():
    points = np.eye(3)
    np.testing.assert_array_equal(centre_of(points, np.array([[2.0], [1.0], [3.0]])), points[1])
    front = np.array([[0.0, 1.0], [0.1, 0.1], [1.0, 0.0]])
    np.testing.assert_array_equal(centre_of(points, front), points[1])


def test_ruined_models_do_not_spoil_the_gaussian_process():
    """If scores collapse in a fifth of the cube, a process on standardised scores would see nothing else."""

    def score(point):
        return -5.0 + bump(point) - 1e6 * (point.sum() > 1.9)

    strategy = make_strategy("bo", dimension=3, objectives=["a"], seed=0, **FAST)
    points = run(strategy, 35, score)
    assert max(map(bump, points)) > -0.004
