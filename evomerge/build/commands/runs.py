"""Starts and resumes searches: everything between a configuration and a finished run directory."""

import json
import logging
import math
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
    events,
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
    """Run a new search in `run_directory`, which is created, or must not hold a run with evaluations.

    Args:
        config: a configuration, or any argument of `load_config`.
        run_directory: the folder that everything is written to.
        config_text: the original YAML, stored as `config.yaml`; default: every setting of `config`.
        observers: called after every evaluation.

    Raises:
        ConfigError: the configuration is invalid, or the directory already holds a run.
        EvaluationError: every baseline failed, or many candidates in a row; `resume_search` continues the run.
        Interrupted: stopped by a signal; `resume_search` continues the run.
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
            # left by a run that was stopped or failed before it had a result
            directory.journal.unlink(missing_ok=True)
            _write_problem(directory, problem, _resolved(problem, settings_in(config_text, str(directory.config))))
            atomic_write_text(directory.config, config_text)
        return _run(problem, directory, observers, lock)


def resume_search(
    run_directory: FilePath, *, overrides: Overrides = (), observers: Sequence[Observer] = ()
) -> RunState:
    """Continue a run, however it ended; even a finished one, with a larger budget.

    Args:
        run_directory: the folder of the run.
        overrides: see `load_config`.
        observers: called after every evaluation.

    Raises:
        ConfigError: an override, or an edit of the run's config.yaml, changes something other than budget, cluster and finals; or models or
            tasks have changed since the run was started.
        EvaluationError: see `start_search`.
        JournalError: `run_directory` is not a run directory, is in use by another process, or is damaged.
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
    """Replace `auto` by the strategy that the run was started with, since another version of evomerge may choose another one."""
    started_with = first_event(directory.journal).get("strategy")
    if config.strategy.name != AUTO or started_with is None:
        return config
    return config.model_copy(update={"strategy": config.strategy.model_copy(update={"name": started_with})})


def _problem_as_before(config: SearchConfig, directory: RunDirectory) -> Problem:
    """`make_problem` for a resumed run; its errors explain what to do if models or tasks have been moved."""
    coordinates = [name for name, *_ in directory.read_resolved().space.parameters]
    try:
        return make_problem(config, begun=True, coordinates=coordinates)
    except ConfigError as error:
        if sources_exist(config):
            raise
        raise ConfigError(
            f"{error}\n{directory.folder} was started with its models and tasks at these paths; put them back to continue (symbolic links work too: "
            "ln -s NEW OLD)"
        ) from None


def config_on_resume(run_directory: FilePath, overrides: Sequence[str] = ()) -> SearchConfig:
    """The configuration that `resume_search` would use.

    Raises:
        ConfigError, JournalError: see `resume_search`.
    """
    directory = RunDirectory(Path(run_directory))
    return resumed_config(directory, directory.read_resolved(), overrides)[0]


def default_run_directory(config: SearchConfig, config_path: FilePath) -> Path:
    """`runs/<name>-<time>-<pid>` in the working directory; the pid tells searches apart that start in the same second."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return Path("runs") / f"{config.name or Path(config_path).stem}-{stamp}-{os.getpid()}"


def check_weights(problem: Problem) -> None:
    """Check every source for NaN and infinity before workers start, which then find the files in the page cache.

    Logs a warning if weights are merged of models that are unrelated to the others.

    Raises:
        CheckpointError: a tensor contains some; the message names the file and the tensor.
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
                recorder.record(run_event(problem, in_flight=pool.n_workers))
            recorder.record(events.session(os.getpid(), socket.gethostname(), pool.n_workers))
        files = FrontFiles(directory, state, lambda entry: problem.recipe_of_entry(entry, state.entries))
        if complete:
            _warn_complete(config, state, directory)
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
    """Run the search and its finals, continuing after the recorded events."""
    config, entries = problem.config, recorder.state.entries

    def make_recipe(candidate: Candidate) -> Mapping[str, Json] | None:
        if entries[candidate.id].factors is None:
            factors = problem.factors(candidate, entries)
            if factors is not None:
                recorder.note(events.crossed(candidate.id, factors))
        return problem.recipe_json(candidate, entries)

    def check(candidate: Candidate) -> None:
        try:
            problem.check(candidate, entries)
        except SpaceError as error:
            name = chosen_strategy(problem).name
            raise ConfigError(f"strategy {name} proposed {candidate.id}, which is invalid: {error}") from None

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
    """The limits of the budget that the recorded evaluations have reached."""
    return dict(_budget(config).reasons_to_stop(state, state.elapsed_s))


def _is_complete(config: SearchConfig, state: RunState) -> bool:
    """Whether the search has ended, by its budget or its strategy, and the finals are done, so that no workers are needed."""
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


def _warn_complete(config: SearchConfig, state: RunState, directory: RunDirectory) -> None:
    """Log a warning that the run is already complete, and how to search further."""
    reached = {"evaluations": state.n_evaluations[Split.SEARCH], "hours": math.ceil(state.elapsed_s / 3600)}
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
    """Raise EvaluationError if the search has stopped because everything failed, since the finals would fail too."""
    if "failures" in state.stopped:
        raise EvaluationError(
            f"{state.stopped['failures']}\nThe search has stopped; every finished evaluation is saved. Fix the cause and resume the run. To end the "
            f"search with the results so far, resume it with --set budget.evaluations={len(state.entries)}"
        )


def run_event(problem: Problem, *, in_flight: int) -> events.Event:
    """The first event of a run, in which `in_flight` candidates may be pending."""
    config = problem.config
    return events.run(
        problem.objectives,
        name=config.name,
        seed=config.seed,
        strategy=chosen_strategy(problem).name,
        space=problem.space.fingerprint,
        in_flight=in_flight,
        deterministic=config.deterministic,
    )


def _resolved(problem: Problem, given_settings: Mapping[str, Json]) -> Resolved:
    """The content of `resolved.json`: the full configuration, the settings as given, and what the results depend on."""
    content = {
        "config": problem.config.model_dump(mode="json"),
        "given": given_settings,
        "versions": package_versions(),
        "checkout": checkout(),
        **problem.marks,
        "baselines": {name: recipe.fingerprint() for name, recipe in problem.own.items()},
        "space": {
            "fingerprint": problem.space.fingerprint,
            "parameters": [parameter.to_json() for parameter in problem.space.parameters],
        },
    }
    return Resolved.model_validate(content)


def _refuse_results(directory: RunDirectory) -> None:
    """Raise ConfigError if a new run would overwrite the results of another run, or files that do not belong to a run."""
    written = (
        directory.config,
        directory.models,
        directory.front_json,
        directory.front_csv,
        directory.best,
        directory.summary,
    )
    other = [path.name for path in written if path.exists()]
    if other and not directory.exists:
        raise ConfigError(
            f"{directory.folder} is not a run directory but contains {', '.join(other)}, which a run would overwrite; choose another --run-dir"
        )
    directory.check_journal()
    if directory.exists and any(record["event"] == "evaluated" for record in journal_events(directory.journal)):
        raise ConfigError(
            f"{directory.folder} already holds a run: continue it with `{directory.resume_command}`, or choose another --run-dir for a new one"
        )


def _write_problem(directory: RunDirectory, problem: Problem, resolved: Resolved) -> None:
    """Write `resolved.json` and `models.json`.

    `resolved.json` marks the folder as a run directory and is written first. It keeps the order of keys, since the order of the experts is
    that of the space's coordinates.
    """
    atomic_write_json(directory.resolved, resolved.model_dump(mode="json"), sort_keys=False)
    if problem.headers:
        atomic_write_text(directory.models, json.dumps(headers_to_json(problem.headers)) + "\n")
