"""Searching and resuming: everything between a configuration and a finished run directory."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from evomerge.build.commands.changes import refuse_changed, resumed_config, warn_of_other_versions
from evomerge.build.commands.describing import notes
from evomerge.build.commands.signals import signals
from evomerge.build.loading import AnyConfig, as_config
from evomerge.build.pools import RunPool, worker_pool
from evomerge.build.problem import Problem, make_problem
from evomerge.build.sources import sources_exist
from evomerge.build.strategies import chosen_strategy, one_thread, strategy_for
from evomerge.build.versions import checkout, package_versions
from evomerge.config import BudgetConfig, Overrides, SearchConfig, settings_in
from evomerge.core import (
    Candidate,
    ConfigError,
    EvaluationError,
    FilePath,
    Json,
    SpaceError,
    Split,
    Status,
    atomic_write_json,
    atomic_write_text,
)
from evomerge.plan import headers_to_json
from evomerge.search import (
    FORMAT_VERSION,
    Budget,
    FrontFiles,
    Interrupted,
    Observer,
    Resolved,
    RunDirectory,
    RunLock,
    RunRecorder,
    RunState,
    SearchLoop,
    StopRequest,
    choose_finalists,
    event,
    first_event,
    journal_events,
    run_finals,
    summarize,
    writing_into,
)
from evomerge.strategy import AUTO

logger = logging.getLogger(__name__)


def start_search(
    config: AnyConfig, run_directory: FilePath, *, config_text: str = "", observers: Sequence[Observer] = ()
) -> RunState:
    """Runs a new search in `run_directory` (created; must not hold a run in which anything has been evaluated).

    Args:
        config: from `load_config`, or what that takes.
        run_directory: where everything is written.
        config_text: the YAML as given, kept as `config.yaml`; default: every setting of `config`.
        observers: called after every evaluation.

    Raises:
        ConfigError: the configuration cannot work, or the directory already holds a run.
        EvaluationError: every baseline failed, or many candidates one after the other; `resume_search` goes on.
        Interrupted: stopped by a signal; `resume_search` goes on.
    """
    directory, config = RunDirectory(Path(run_directory)), as_config(config)
    _refuse_results(directory)
    problem = make_problem(config)
    for note in notes(problem):
        logger.warning(note)
    check_weights(problem)
    config_text = config_text or yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)
    try:
        directory.logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{run_directory}: cannot be created: {error.strerror}") from None
    with RunLock(directory.folder) as lock:
        _refuse_results(directory)
        with writing_into(directory):
            # of a run that was stopped, or could not go on, before it had a result
            directory.journal.unlink(missing_ok=True)
            _write_problem(directory, problem, _resolved(problem, settings_in(config_text, str(directory.config))))
            atomic_write_text(directory.config, config_text)
        return _run(problem, directory, observers, lock)


def resume_search(
    run_directory: FilePath, *, overrides: Overrides = (), observers: Sequence[Observer] = ()
) -> RunState:
    """Goes on with a run, however it ended; with a raised budget also with a finished one.

    Args:
        run_directory: of the run.
        overrides: as in `load_config`.
        observers: called after every evaluation.

    Raises:
        ConfigError: an override, or an edit of the run's config.yaml, of anything but budget, cluster and finals; or models or
            tasks that have changed since.
        EvaluationError: as `start_search`.
        JournalError: not a run directory, in use by another process, or damaged.
        Interrupted: stopped by a signal.
    """
    directory = RunDirectory(Path(run_directory))
    resolved = directory.read_resolved()
    directory.check_journal()
    with RunLock(directory.folder) as lock:
        config, edited = resumed_config(directory, resolved, overrides)
        problem = _problem_as_before(_with_strategy_of(directory, config), directory)
        now = _resolved(problem, edited)
        refuse_changed(resolved, now)
        warn_of_other_versions(resolved, now)
        with writing_into(directory):
            _write_problem(directory, problem, now)
        return _run(problem, directory, observers, lock)


def _with_strategy_of(directory: RunDirectory, config: SearchConfig) -> SearchConfig:
    """`config`, in which `auto` is the strategy that it was when the run was begun: another version may choose another."""
    begun_with = first_event(directory.journal).get("strategy")
    if config.strategy.name != AUTO or begun_with is None:
        return config
    return config.model_copy(update={"strategy": config.strategy.model_copy(update={"name": begun_with})})


def _problem_as_before(config: SearchConfig, directory: RunDirectory) -> Problem:
    """`make_problem`, whose errors say what to do where the models or tasks have been moved."""
    coordinates = [name for name, *_ in directory.read_resolved().space.parameters]
    try:
        return make_problem(config, begun=True, coordinates=coordinates)
    except ConfigError as error:
        if sources_exist(config):
            raise
        raise ConfigError(
            f"{error}\n{directory.folder} was started with its models and tasks at these places; put them back to continue (links work too: "
            "ln -s NEW OLD)"
        ) from None


def config_on_resume(run_directory: FilePath, overrides: Sequence[str] = ()) -> SearchConfig:
    """The configuration that `resume_search` would go on with.

    Raises:
        ConfigError, JournalError: as `resume_search`.
    """
    directory = RunDirectory(Path(run_directory))
    return resumed_config(directory, directory.read_resolved(), overrides)[0]


def default_run_directory(config: SearchConfig, config_path: FilePath) -> Path:
    """`runs/<name>-<time>-<pid>` under the working directory: searches that start in the same second each have their own."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path("runs") / f"{config.name or Path(config_path).stem}-{stamp}-{os.getpid()}"


def check_weights(problem: Problem) -> None:
    """Looks for NaN and infinities in every source before anything is started; workers then find the files in the page cache.

    Warns of models that are no relatives of the others, where their weights are merged.

    Raises:
        CheckpointError: a tensor has some; file and tensor are named.
    """
    if problem.headers:
        from evomerge.weights import WeightPool, strangers

        pool = WeightPool(problem.headers)
        stacking = problem.config.space.stacking
        if stacking is None or stacking.parameters:
            warning = strangers(problem.headers, pool.tensor)
            if warning is not None:
                logger.warning(warning)


def _run(problem: Problem, directory: RunDirectory, observers: Sequence[Observer], lock: RunLock) -> RunState:
    config = problem.config
    stop = StopRequest()
    with ExitStack() as stack:
        stack.enter_context(signals(stop, abandon=config.cluster.on_interrupt == "abandon"))
        recorder = RunRecorder(directory, lock.check)
        stack.callback(recorder.close)
        state = recorder.state
        complete = _is_complete(config, state)
        if not complete:
            pool = stack.enter_context(worker_pool(problem, directory))
            if not state.run:
                recorder.record(event("run", **_run_record(problem, pool.n_workers)))
            recorder.record(event("session", pid=os.getpid(), host=socket.gethostname(), workers=pool.n_workers))
        files = FrontFiles(directory, state, lambda entry: problem.recipe_of_entry(entry, state.entries))
        if complete:
            _say_why_complete(config, state, directory)
        else:
            _search(problem, recorder, pool, files, observers, stop)
        files.finish(state)
        with writing_into(directory):
            atomic_write_json(directory.summary, summarize(state, recorder.evaluation))
        return state


def _search(
    problem: Problem,
    recorder: RunRecorder,
    pool: RunPool,
    files: FrontFiles,
    observers: Sequence[Observer],
    stop: StopRequest,
) -> None:
    """The search and its finals, from where the recorded events end."""
    config, entries = problem.config, recorder.state.entries

    def make_recipe(candidate: Candidate) -> Mapping[str, Json] | None:
        if entries[candidate.id].factors is None:
            factors = problem.factors(candidate, entries)
            if factors is not None:
                recorder.note(event("crossed", id=candidate.id, factors=factors))
        return problem.recipe_json(candidate, entries)

    def check(candidate: Candidate) -> None:
        try:
            problem.check(candidate, entries)
        except SpaceError as error:
            name = chosen_strategy(problem).name
            raise ConfigError(f"strategy {name} proposed {candidate.id}, which is no candidate: {error}") from None

    loop = SearchLoop(
        strategy=strategy_for(problem),
        pool=pool,
        recorder=recorder,
        make_recipe=make_recipe,
        baselines=problem.baselines(),
        budget=_budget(config),
        in_flight=recorder.state.run["in_flight"] if config.deterministic else (lambda: pool.n_workers),
        deterministic=config.deterministic,
        observers=[files, *observers],
        on_pause=files.flush,
        check=check,
        stop=stop,
    )
    try:
        with one_thread():
            _refuse_failures(loop.run())
            if config.finals.finalists:
                run_finals(loop, recorder, config.finals.finalists)
    except (Interrupted, EvaluationError):
        files.flush(recorder.state)
        raise


def _budget(config: SearchConfig) -> Budget:
    return Budget(config.budget.evaluations, config.budget.items, config.budget.hours)


def _used_up(config: SearchConfig, state: RunState) -> dict[str, Any]:
    """The limits of the budget that recorded evaluations have reached."""
    return dict(_budget(config).reasons_to_stop(state, state.elapsed_s))


def _is_complete(config: SearchConfig, state: RunState) -> bool:
    """Whether the search has ended, by its budget or by its strategy, and the finals are done, so that no worker is needed."""
    reasons = _used_up(config, state)
    by_strategy = state.stopped.keys() - BudgetConfig.model_fields.keys()
    if state.pending or not state.stopped or not (reasons or by_strategy) or "failures" in {*reasons, *state.stopped}:
        return False
    count = config.finals.finalists
    return not count or (
        state.finished
        and tuple(choose_finalists(state, count)) == state.finalists
        and state.evaluations.status(state.best_id or "", Split.REPORT) is not Status.FAILED
    )


def _say_why_complete(config: SearchConfig, state: RunState, directory: RunDirectory) -> None:
    """Warns that a run is complete, and says how it could go on."""
    reached = {"evaluations": state.n_evaluations[Split.SEARCH]}
    used_up = _used_up(config, state)
    if not used_up:
        logger.warning("nothing left to do: the strategy has stopped by itself (%s)", ", ".join(state.stopped))
        return
    limits = ", ".join(f"budget.{name}: {limit}" for name, limit in used_up.items())
    more = [f"--set budget.{name}={2 * max(limit, reached.get(name, 0))}" for name, limit in used_up.items()]
    logger.warning(
        "nothing left to do: %s is used up. To search further: %s %s", limits, directory.resume_command, " ".join(more)
    )


def _refuse_failures(state: RunState) -> None:
    """Raises EvaluationError where the search has stopped because everything fails: so would the finals, and they are held once."""
    if "failures" in state.stopped:
        raise EvaluationError(
            f"{state.stopped['failures']}\nThe search has stopped and nothing finished is lost: fix the cause and resume the run. To end it with "
            f"what it has, resume it with --set budget.evaluations={len(state.entries)}"
        )


def _run_record(problem: Problem, n_workers: int) -> dict[str, Json]:
    config = problem.config
    return {
        "version": FORMAT_VERSION,
        "name": config.name,
        "seed": config.seed,
        "strategy": chosen_strategy(problem).name,
        "objectives": [objective.to_json() for objective in problem.objectives],
        "space": problem.space.fingerprint,
        "in_flight": n_workers,
        "deterministic": config.deterministic,
    }


def _resolved(problem: Problem, given_settings: Mapping[str, Json]) -> Resolved:
    """`resolved.json`: the full configuration, as it was given, and what its results depend on."""
    content = {
        "config": problem.config.model_dump(mode="json"),
        "given": given_settings,
        "versions": package_versions(),
        "checkout": checkout(),
        **problem.marks,
        "baselines": {name: recipe.fingerprint() for name, recipe in problem.own.items()},
        "space": {
            "fingerprint": problem.space.fingerprint,
            "parameters": [
                [item.name, item.low, item.high, *([list(item.choices)] if item.choices else [])]
                for item in problem.space.parameters
            ],
        },
    }
    return Resolved.model_validate(content)


def _refuse_results(directory: RunDirectory) -> None:
    """Raises ConfigError where a new run would overwrite a run's results, or files that are none of a run."""
    own = (
        directory.config,
        directory.models,
        directory.front_json,
        directory.front_csv,
        directory.best,
        directory.summary,
    )
    strange = [path.name for path in own if path.exists()]
    if strange and not directory.exists:
        raise ConfigError(
            f"{directory.folder} is no run directory and holds {', '.join(strange)}, which a run would overwrite; choose another --run-dir"
        )
    directory.check_journal()
    if directory.exists and any(record["event"] == "evaluated" for record in journal_events(directory.journal)):
        raise ConfigError(
            f"{directory.folder} already holds a run: `{directory.resume_command}` continues it; "
            "for a new one choose another --run-dir"
        )


def _write_problem(directory: RunDirectory, problem: Problem, resolved: Resolved) -> None:
    """`resolved.json` and `models.json`. The first, by which a run directory is known, comes first, and keeps the order of keys: that of the
    experts is the order of the space's coordinates.
    """
    atomic_write_json(directory.resolved, resolved.model_dump(mode="json"), sort_keys=False)
    if problem.headers:
        atomic_write_text(directory.models, json.dumps(headers_to_json(problem.headers)) + "\n")
