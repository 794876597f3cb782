"""The search loop with a pool whose order of answers the test controls."""

import math
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.core import (
    Candidate,
    CrossoverGenome,
    Evaluation,
    EvaluationError,
    EvaluationRequest,
    Json,
    LostWorker,
    Objective,
    Split,
    Status,
)
from evomerge.evaluation.synthetic import SyntheticEvaluator
from evomerge.search import (
    Baseline,
    Budget,
    FrontFiles,
    Interrupted,
    RunDirectory,
    RunRecorder,
    RunState,
    SearchLoop,
    StopRequest,
    event,
    front_json,
    front_of,
    read_journal,
    run_finals,
    summarize,
)
from evomerge.strategy import make_strategy

OBJECTIVES = (Objective("f1"), Objective("f2"))


class ShufflingPool:
    """Answers in a shuffled order; remembers what it was asked."""

    def __init__(self, seed: int, failing: Callable[[EvaluationRequest], bool] = lambda request: False) -> None:
        self._order = random.Random(seed)
        self._evaluator = SyntheticEvaluator("zdt1", n_items=10, item_noise=0.05, seed=1)
        self._waiting: list[EvaluationRequest] = []
        self._failing = failing
        self.requests: list[EvaluationRequest] = []
        self.most_waiting = 0

    def submit(self, request: EvaluationRequest) -> None:
        self._waiting.append(request)
        self.requests.append(request)
        self.most_waiting = max(self.most_waiting, len(self._waiting))

    def withdraw(self) -> list[EvaluationRequest]:
        return []

    def next_done(self, timeout_s: float) -> Evaluation | None:
        if not self._waiting or self._order.random() < 0.2:
            return None
        request = self._waiting.pop(self._order.randrange(len(self._waiting)))
        if self._failing(request):
            return Evaluation(request.candidate_id, request.split, Status.FAILED, error="as the test wants")
        return self._evaluator.evaluate(request)


def run(
    folder: Path, pool: ShufflingPool, *, budget: Budget | None = None, deterministic: bool = True, in_flight: int = 4,
    strategy: str = "nsga2", seed: int = 4, stop: StopRequest | None = None, baselines: tuple[Baseline, ...] = (), finals: int = 0,
    make_recipe: Callable[[Candidate], Mapping[str, Json] | None] = lambda candidate: None, **options: object,
) -> RunState:  # fmt: skip
    folder.mkdir(exist_ok=True)
    recorder = RunRecorder(RunDirectory(folder))
    if not recorder.state.run:
        goals = [{"name": item.name, "direction": item.direction.value, "reference": None} for item in OBJECTIVES]
        recorder.record(event("run", version=1, objectives=goals))
    files = FrontFiles(RunDirectory(folder), recorder.state, lambda entry: None)
    loop = SearchLoop(
        strategy=make_strategy(strategy, dimension=3, objectives=OBJECTIVES, seed=seed, **options),
        pool=pool,
        recorder=recorder,
        make_recipe=make_recipe,
        baselines=baselines,
        budget=budget or Budget(evaluations=40),
        in_flight=in_flight,
        deterministic=deterministic,
        observers=[files],
        stop=stop,
    )
    try:
        state = loop.run()
        files.finish(state)
        if finals:
            run_finals(loop, recorder, finals)
            summary = summarize(state, recorder.evaluation)
            assert summary["best_id"] == state.best_id
        return state
    finally:
        recorder.close()


POINTS = (
    Baseline("source:a", None, (0.0, 0.5, 0.5)),
    Baseline("uniform", None, (0.5, 0.5, 0.5)),
    Baseline("source:b", None, (1.0, 0.0, 0.0)),
)


@pytest.mark.parametrize("strategy", ["nsga2", "cma_es", "random"])
def test_deterministic_runs_do_not_depend_on_the_order_of_answers(tmp_path: Path, strategy: str) -> None:
    states = [run(tmp_path / str(seed), ShufflingPool(seed), strategy=strategy, baselines=POINTS) for seed in (1, 2)]
    first, second = ([entry.values for entry in state.proposed] for state in states)
    assert first == second
    assert front_json(states[0], front_of(states[0])) == front_json(states[1], front_of(states[1]))
    assert (tmp_path / "1" / "front.json").read_bytes() == (tmp_path / "2" / "front.json").read_bytes()


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_loop_keeps_no_finished_work_in_memory(
    tmp_path: Path, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[SearchLoop] = []
    original = SearchLoop.run
    monkeypatch.setattr(SearchLoop, "run", lambda self: loops.append(self) or original(self))
    run(tmp_path / "run", ShufflingPool(1), deterministic=deterministic)
    kept = {name: value for name, value in vars(loops[0]).items() if isinstance(value, Collection)}
    assert {"_arrived", "_submitted"} <= kept.keys()
    assert [name for name, value in kept.items() if len(value) > 1] == []


class CrossingPool(ShufflingPool):
    """Scores genomes by number alone, since only real models can tell what a crossover contains."""

    def submit(self, request: EvaluationRequest) -> None:
        values = request.values or (np.frombuffer(request.candidate_id.encode(), np.uint8) % 11 / 11)[-3:]
        super().submit(replace(request, values=tuple(map(float, values))))


def test_crossovers_are_recorded_and_replayed(tmp_path: Path) -> None:
    corners = tuple(Baseline(f"source:{i}", None, tuple(float(i == k) for k in range(3))) for i in range(3))
    options = {"strategy": "m2n2", "baselines": corners, "population_size": 6, "chromosomes": 2, "mutation_sigma": 0.1}
    whole = run(tmp_path / "whole", CrossingPool(1), **options)
    run(tmp_path / "half", CrossingPool(2), budget=Budget(evaluations=17), **options)
    again = run(tmp_path / "half", CrossingPool(3), **options)
    assert [entry.candidate() for entry in again.proposed] == [entry.candidate() for entry in whole.proposed]
    crossed = [entry.genome for entry in whole.proposed if isinstance(entry.genome, CrossoverGenome)]
    assert len(crossed) == 37
    assert all(genome.mutation is not None and len(genome.splits) == 2 for genome in crossed)


def test_a_request_carries_its_candidates_recipe_and_a_baselines_own(tmp_path: Path) -> None:
    own = Baseline("recipe:mine", {"made": "before"}, (0.2, 0.2, 0.2))
    pool = ShufflingPool(1)
    state = run(
        tmp_path / "run", pool, baselines=(own, POINTS[0]), budget=Budget(evaluations=10), finals=3,
        make_recipe=lambda candidate: {"made": "from", "values": candidate.point},
    )  # fmt: skip
    assert len(pool.requests) == len(state.evaluations) > 12
    for request in pool.requests:
        made = {"made": "from", "values": state.entries[request.candidate_id].values}
        assert request.recipe == (own.recipe if request.candidate_id == own.id else made)


def test_in_flight_limit_is_reached_and_never_exceeded(tmp_path: Path) -> None:
    pool = ShufflingPool(1)
    run(tmp_path / "run", pool, in_flight=5, deterministic=False)
    assert pool.most_waiting == 5


def test_the_budget_includes_baselines_and_is_met_exactly(tmp_path: Path) -> None:
    state = run(tmp_path / "a", ShufflingPool(1), budget=Budget(evaluations=25), baselines=POINTS, deterministic=False)
    assert state.n_evaluations[Split.SEARCH] == 25
    assert dict(state.stopped) == {"evaluations": 25}
    state = run(tmp_path / "b", ShufflingPool(1), budget=Budget(items=210), baselines=POINTS)
    assert state.n_evaluations[Split.SEARCH] == 10, "expected 20 items each"
    state = run(tmp_path / "c", ShufflingPool(1), budget=Budget(hours=1e-9))
    assert dict(state.stopped) == {"hours": 1e-9}
    assert not state.entries


def test_the_hour_budget_is_in_hours_and_thirty_failures_in_a_row_stop_the_search() -> None:
    assert Budget(hours=2.0).reasons_to_stop(RunState(), 7199.0) == {}
    assert Budget(hours=2.0).reasons_to_stop(RunState(), 7200.0) == {"hours": 2.0}
    assert Budget().reasons_to_stop(RunState(failed_in_a_row=29), 0.0) == {}
    assert "failures" in Budget().reasons_to_stop(RunState(failed_in_a_row=30), 0.0)


def test_an_item_budget_holds_from_the_first_candidate(tmp_path: Path) -> None:
    state = run(tmp_path / "run", ShufflingPool(2), budget=Budget(items=70), in_flight=6)
    assert (state.n_evaluations[Split.SEARCH], state.items_told) == (3, 60.0)
    assert state.stopped == {"items": 70}


def test_baselines_come_first_and_are_told_to_the_strategy(tmp_path: Path) -> None:
    pool = ShufflingPool(1)
    state = run(tmp_path / "run", pool, baselines=POINTS, strategy="cma_es", sigma0=0.01)
    assert {request.candidate_id for request in pool.requests[:3]} == {"source:a", "uniform", "source:b"}
    best = min(
        POINTS,
        key=lambda item: (
            -state.evaluations[item.id, Split.SEARCH].scores["f1"]
            - state.evaluations[item.id, Split.SEARCH].scores["f2"]
        ),
    )
    assert np.allclose(state.proposed[0].values, best.values, atol=0.1), "cma_es does not start at the best known point"


def test_a_baseline_outside_the_space_is_evaluated_but_not_told(tmp_path: Path) -> None:
    outside = Baseline("recipe:mine", {"made": "before"}, None)
    state = run(tmp_path / "run", CrossingPool(1), baselines=(outside, *POINTS), budget=Budget(evaluations=8))
    assert state.evaluations.status("recipe:mine", Split.SEARCH) is Status.OK
    (seeded,) = [each for each in read_journal(tmp_path / "run" / "journal.jsonl") if each["event"] == "seeded"]
    assert seeded["ids"] == [point.id for point in POINTS]


def test_failures_are_recorded_and_the_search_continues(tmp_path: Path) -> None:
    def failing(request: EvaluationRequest) -> bool:
        return request.candidate_id.endswith(("3", "7"))

    state = run(tmp_path / "run", ShufflingPool(1, failing))
    assert state.n_evaluations[Split.SEARCH] == 40
    assert len(list(state.evaluated())) == 32
    assert not state.pending


@pytest.mark.parametrize("part", ["scores", "stderr", "cost"])
def test_a_non_finite_result_counts_as_a_failure(tmp_path: Path, part: str) -> None:
    """It used to end the search with an internal error, and again on resume."""

    class Overflowing(ShufflingPool):
        def next_done(self, timeout_s: float) -> Evaluation | None:
            answer = super().next_done(timeout_s)
            if answer is None or answer.candidate_id != "c000009":
                return answer
            return replace(answer, **{part: {**getattr(answer, part), "f1": math.inf}})

    state = run(tmp_path / "run", Overflowing(1))
    failed = state.evaluations["c000009", Split.SEARCH]
    assert (failed.status, state.n_evaluations[Split.SEARCH]) == (Status.FAILED, 40)
    assert failed.error is not None
    assert failed.error.endswith("of f1 is inf")
    assert math.isfinite(sum(failed.cost.values()))


def test_time_a_strategy_spends_deciding_whether_to_stop_counts_as_proposal_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is where `cma_es` fits its model."""
    original = Budget.reasons_to_stop
    monkeypatch.setattr(Budget, "reasons_to_stop", lambda *args: time.sleep(0.003) or original(*args))
    state = run(tmp_path / "run", ShufflingPool(1), strategy="random")
    assert state.ask_s > 40 * 0.003


def test_the_reason_is_reported_when_every_baseline_fails(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"every baseline failed.*as the test wants"):
        run(tmp_path / "run", ShufflingPool(1, lambda request: True), baselines=POINTS)


def test_failed_baselines_are_retried_on_resume(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="resume"):
        run(tmp_path / "run", ShufflingPool(1, lambda request: True), baselines=POINTS)
    resumed = run(tmp_path / "run", ShufflingPool(1), baselines=POINTS)
    whole = run(tmp_path / "whole", ShufflingPool(1), baselines=POINTS)
    assert [entry.values for entry in resumed.proposed] == [entry.values for entry in whole.proposed]
    assert resumed.n_evaluations[Split.SEARCH] == 40
    assert resumed.evaluations.count(Status.FAILED) == 0
    # a baseline that fails while others succeed keeps its result
    failing = ShufflingPool(1, lambda request: request.candidate_id == "uniform")
    run(tmp_path / "other", failing, baselines=POINTS, budget=Budget(evaluations=10))
    assert run(tmp_path / "other", ShufflingPool(1), baselines=POINTS).evaluations.count(Status.FAILED) == 1


def test_a_search_that_only_fails_stops(tmp_path: Path) -> None:
    state = run(tmp_path / "run", ShufflingPool(1, lambda request: True), budget=Budget(evaluations=1000))
    assert "failed in a row" in str(state.stopped["failures"])
    assert state.n_evaluations[Split.SEARCH] < 40


def test_recipe_inputs_are_durable_before_a_request_is_submitted(tmp_path: Path) -> None:
    journal = tmp_path / "run" / "journal.jsonl"

    class Checking(ShufflingPool):
        def submit(self, request: EvaluationRequest) -> None:
            assert f'"factors":[0.5],"id":"{request.candidate_id}"' in journal.read_text()
            super().submit(request)

    def make_recipe(candidate: Candidate) -> None:
        recorders[-1].note(event("crossed", id=candidate.id, factors=[0.5]))

    recorders: list[RunRecorder] = []
    original = RunRecorder.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecorder, "__init__", lambda self, *args: recorders.append(self) or original(self, *args))
        state = run(tmp_path / "run", Checking(1), make_recipe=make_recipe)
    assert state.n_evaluations[Split.SEARCH] == 40


@pytest.mark.parametrize("at_once", [False, True])
def test_interrupting_waits_for_running_evaluations_and_leaves_no_trace(tmp_path: Path, at_once: bool) -> None:
    """A strategy that learns from the first result on would propose something else if it were told results earlier than in an undisturbed run."""
    options = {"strategy": "cma_es", "baselines": POINTS}
    stop = StopRequest()
    pool = ShufflingPool(1)

    def interrupt(request: EvaluationRequest) -> bool:
        stop.drain = stop.drain or request.candidate_id == "c000013"
        stop.now = stop.drain and at_once
        return False

    pool._failing = interrupt
    with pytest.raises(Interrupted):
        run(tmp_path / "run", pool, stop=stop, **options)
    recorder = RunRecorder(RunDirectory(tmp_path / "run"))
    state = recorder.state
    assert at_once or all((entry.id, Split.SEARCH) in state.evaluations for entry in state.entries.values())
    recorder.close()
    resumed = run(tmp_path / "run", ShufflingPool(3), **options)
    undisturbed = run(tmp_path / "other", ShufflingPool(4), **options)
    assert [entry.values for entry in resumed.proposed] == [entry.values for entry in undisturbed.proposed]


def test_an_interrupt_says_once_what_it_waits_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class OneAtATime(ShufflingPool):
        def next_done(self, timeout_s: float) -> Evaluation | None:
            stop.drain = stop.drain or len(self.requests) > 8
            return super().next_done(timeout_s) if timeout_s else None

    stop = StopRequest()
    with pytest.raises(Interrupted):
        run(tmp_path / "run", OneAtATime(1), stop=stop)
    assert caplog.messages == ["stopping after the running evaluations (3); press Ctrl-C again to stop at once"]


def test_an_interrupt_waits_only_for_evaluations_that_workers_have_started(tmp_path: Path) -> None:
    """While engines start, which takes minutes for large models, none has."""
    stop = StopRequest()

    class Starting(ShufflingPool):
        def next_done(self, timeout_s: float) -> Evaluation | None:
            stop.drain = stop.drain or len(self.requests) > 8
            return None if len(self.requests) > 8 else super().next_done(timeout_s)

        def withdraw(self) -> list[EvaluationRequest]:
            withdrawn, self._waiting = self._waiting, []
            return withdrawn

    with pytest.raises(Interrupted):
        run(tmp_path / "run", Starting(1), stop=stop)
    resumed, whole = run(tmp_path / "run", ShufflingPool(2)), run(tmp_path / "other", ShufflingPool(3))
    assert [entry.values for entry in resumed.proposed] == [entry.values for entry in whole.proposed]


def test_every_prefix_of_the_journal_leads_to_the_same_end(tmp_path: Path) -> None:
    # so few members that most proposals depend on earlier results
    options = {"baselines": POINTS, "budget": Budget(evaluations=16), "finals": 3, "population_size": 4}
    run(tmp_path / "whole", ShufflingPool(1), **options)
    wanted = (tmp_path / "whole" / "front.json").read_bytes()
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for size in range(1, len(lines)):
        folder = tmp_path / f"cut{size}"
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(b"".join(lines[:size]) + lines[size][:9])
        for items in (tmp_path / "whole").glob("items.*"):
            (folder / items.name).write_bytes(items.read_bytes())
        pool = ShufflingPool(size)
        state = run(folder, pool, **options)
        assert (folder / "front.json").read_bytes() == wanted, f"different front after a cut at {size} records"
        assert state.finished
        asked_again = {(request.candidate_id, request.split.value) for request in pool.requests}
        done = {line for line in lines[:size] if b'"event":"evaluated"' in line}
        assert len(asked_again) + len(done) == len(state.evaluations), "a finished evaluation was repeated"


@pytest.mark.parametrize("strategy", ["nsga2", "cma_es"])
def test_proposals_that_cannot_be_reproduced_are_taken_from_the_journal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, strategy: str
) -> None:
    """Another seed stands for another processor, whose different rounding eventually leads to different proposals."""
    before = run(tmp_path / "run", ShufflingPool(1), strategy=strategy, baselines=POINTS)
    recorded = [(entry.id, entry.genome) for entry in before.proposed]
    pool = ShufflingPool(2)
    after = run(tmp_path / "run", pool, strategy=strategy, seed=5, baselines=POINTS, budget=Budget(evaluations=60))
    assert [(entry.id, entry.genome) for entry in after.proposed][: len(recorded)] == recorded
    assert {request.candidate_id for request in pool.requests}.isdisjoint(name for name, _ in recorded)
    assert after.n_proposed > len(recorded)
    (record,) = caplog.records
    assert f"of the {len(recorded)} recorded proposals" in record.message
    assert "cannot be reproduced here" in record.message
    caplog.clear()
    run(tmp_path / "run", ShufflingPool(3), strategy=strategy, seed=5, baselines=POINTS, budget=Budget(evaluations=61))
    assert f"of the {after.n_proposed} recorded" in caplog.text, "resuming a resumed run does not report it again"


def test_a_lost_worker_is_on_disk_before_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LosingPool(ShufflingPool):
        def next_done(self, timeout_s: float) -> Evaluation | LostWorker | None:
            answer = super().next_done(timeout_s)
            if answer is not None and answer.candidate_id == "c000010" and not recorded:
                self.submit(EvaluationRequest(answer.candidate_id, answer.split, None, (0.5,) * 3))
                return LostWorker(answer.candidate_id, answer.split, "killed")
            return answer

    recorded: list[bool] = []

    def warn(message: str, *values: object) -> None:
        recorded.append(b'"lost"' in (tmp_path / "run" / "journal.jsonl").read_bytes())

    monkeypatch.setattr("evomerge.search.loop.logger.warning", warn)
    run(tmp_path / "run", LosingPool(1))
    assert recorded == [True]


@pytest.mark.parametrize("lost", [True, False])
def test_work_lost_to_a_signal_is_not_held_against_candidates(tmp_path: Path, lost: bool) -> None:
    """Slurm's SIGTERM reaches workers too: they die, or their engines do, while the driver exits."""
    stop = StopRequest()

    class EndingPool(ShufflingPool):
        def next_done(self, timeout_s: float) -> Evaluation | LostWorker | None:
            answer = super().next_done(timeout_s)
            if not isinstance(answer, Evaluation) or answer.candidate_id < "c000010":
                return answer
            stop.drain = stop.now = True
            if lost:
                return LostWorker(answer.candidate_id, answer.split, "SIGTERM")
            return Evaluation(answer.candidate_id, answer.split, Status.FAILED, error="the engine has died")

    with pytest.raises(Interrupted):
        run(tmp_path / "run", EndingPool(1), stop=stop)
    state = run(tmp_path / "run", ShufflingPool(2))
    assert len(list(state.evaluated())) == state.n_evaluations[Split.SEARCH] == 40
    assert not any(b'"lost"' in line for line in (tmp_path / "run" / "journal.jsonl").read_bytes().splitlines())
