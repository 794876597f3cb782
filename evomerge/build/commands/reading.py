"""Reads runs, live or finished, and exports recipes from them. Never writes to a run directory or takes its lock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

from evomerge.build.problem import Problem, problem_of_run
from evomerge.build.sources import model_table
from evomerge.config import SearchConfig, parse_config
from evomerge.core import (
    CheckpointError,
    CrossoverGenome,
    Evaluation,
    FilePath,
    JournalError,
    Json,
    RecipeError,
    Split,
    cost_objective,
)
from evomerge.plan import ModelHeader, headers_from_json, read_models
from evomerge.plan.model_folder import read_json_file
from evomerge.recipe import METHOD, Recipe, write_recipe
from evomerge.search import (
    Entry,
    ItemStore,
    RunDirectory,
    RunState,
    Summary,
    front_json,
    front_of,
    journal_events,
    open_items,
    pick,
    summarize,
    with_items,
)
from evomerge.space import Parameter, SearchSpace


@dataclass(frozen=True, repr=False)
class Run:
    """A run as it is on disk.

    Attributes:
        directory: the paths of its files.
        config: its configuration.
        state: its state according to the journal.
    """

    directory: RunDirectory
    config: SearchConfig
    state: RunState
    _items: ItemStore

    def __repr__(self) -> str:
        return f"Run({str(self.directory.folder)!r}, {self.state.n_evaluations[Split.SEARCH]} evaluations)"

    def evaluation(self, identifier: str, split: Split | str = Split.SEARCH) -> Evaluation:
        """An evaluation with its item scores.

        Raises:
            JournalError: the candidate has not been evaluated on the split.
            EvaluationError: there is no such split.
        """
        split = Split.named(split)
        if (identifier, split) not in self.state.evaluations:
            raise JournalError(f"{self.directory.folder}: {identifier!r} has not been evaluated on the {split} split")
        return with_items(self.state, self._items, identifier, split)

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files of item scores that `evaluation` and `summary` open."""
        self._items.close()

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, as it was recorded."""
        return SearchSpace([Parameter(*row) for row in self.directory.read_resolved().space.parameters])

    def records(self) -> list[dict[str, Json]]:
        """Every evaluation as a flat row, split by split in the order of arrival: `pandas.DataFrame(run.records())` makes a table of them.

        A row has `id`, `split`, `status`, `baseline`, `error`, the value of every parameter under its name if the candidate is a point of the space
        (the name of the choice for a categorical parameter), every score under its name with `<name>_stderr`, and `cost.<key>`.
        """
        space, rows = self.space, list[dict[str, Json]]()
        for evaluation in self.state.evaluations.values():
            entry = self.state.entries[evaluation.candidate_id]
            row: dict[str, Json] = {
                "id": entry.id,
                "split": evaluation.split.value,
                "status": evaluation.status.value,
                "baseline": entry.baseline,
                "error": evaluation.error,
            }
            if entry.values is not None and len(entry.values) == space.dimension:
                row |= space.named(entry.values)
            row |= evaluation.scores
            row |= {f"{name}_stderr": error for name, error in evaluation.stderr.items()}
            row |= {cost_objective(name): value for name, value in evaluation.cost.items()}
            rows.append(row)
        return rows

    def chosen_methods(self, identifiers: Sequence[str]) -> dict[str, str]:
        """The merge method of each of these candidates, "" for one outside the space; {} if the search does not choose methods."""
        space = self.space
        if all(parameter.name != METHOD for parameter in space.parameters):
            return {}
        values = {identifier: self.state.entries[identifier].values for identifier in identifiers}
        return {name: "" if point is None else str(space.named(point)[METHOD]) for name, point in values.items()}

    def front(self) -> dict[str, Json]:
        """The front, in the format of `front.json`."""
        return front_json(self.state, front_of(self.state))

    def summary(self) -> Summary:
        """The summary, in the format of `summary.json`."""
        return summarize(self.state, self.evaluation)

    def recipe(self, entry: Entry | str) -> Recipe | None:
        """The recipe of a candidate, made from the recorded headers of the models; None for the synthetic evaluation.

        Args:
            entry: the candidate, or a choice for `pick`: best, knee or an id.

        Raises:
            JournalError: no such candidate.
            CheckpointError: the run, by an older evomerge, has not recorded enough, and the models are not where they were.
        """
        entry = pick(self.state, entry) if isinstance(entry, str) else entry
        recorded = self.directory.models
        if recorded.exists() and self._is_resolved(entry):
            problem = self._recorded_problem
        else:
            problem = self._problem_with(self._read_headers(entry))
        return problem.recipe_of_entry(entry, self.state.entries)

    @cached_property
    def _recorded_problem(self) -> Problem:
        recorded = self.directory.models
        return self._problem_with(headers_from_json(read_json_file(recorded), str(recorded)))

    def _problem_with(self, headers: Mapping[str, ModelHeader]) -> Problem:
        return problem_of_run(self.config, headers, [parameter.name for parameter in self.space.parameters])

    def _read_headers(self, entry: Entry) -> dict[str, ModelHeader]:
        try:
            return read_models(model_table(self.config))
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.directory.folder}: this run is from an older evomerge, which did not record enough to make the recipe of {entry.id} without the models; "
                f"put them back where they were: {error}"
            ) from None

    def _is_resolved(self, entry: Entry) -> bool:
        """Whether the factors of a candidate and of all its ancestors are recorded."""
        waiting, seen = [entry], {entry.id}
        while waiting:
            current = waiting.pop()
            if isinstance(current.genome, CrossoverGenome):
                if current.factors is None:
                    return False
                new = set(current.genome.parents) - seen
                seen |= new
                waiting += [self.state.entries[name] for name in new]
        return True


def open_run(folder: FilePath) -> Run:
    """Open the run in `folder`.

    Raises:
        JournalError: `folder` is not a run directory, or the run is damaged.
    """
    directory = RunDirectory(Path(folder))
    config = recorded_config(directory)
    state = RunState.of(journal_events(directory.journal))
    return Run(directory, config, state, open_items(directory, state))


def recorded_config(directory: RunDirectory) -> SearchConfig:
    """The configuration that a run was last started or resumed with.

    Raises:
        JournalError: there is no run, or its journal is missing.
    """
    config = parse_config(directory.read_resolved().config, folder=Path("/"), where=str(directory.resolved))
    directory.check_journal()
    return config


def outcome(state: RunState, config: SearchConfig) -> str | None:
    """How the run has ended; None if it is not complete.

    A run ends with the finals, or if there are none with the search, unless that stopped because everything failed.
    """
    if state.finished:
        return "finished"
    if state.stopped and "failures" not in state.stopped and not config.finals.finalists:
        return f"finished ({', '.join(state.stopped)})"
    return None


def chosen_recipe(folder: FilePath, choice: str) -> tuple[str, Recipe]:
    """A candidate's id and its recipe; for arguments and errors see `export_recipe`."""
    run = open_run(folder)
    entry = pick(run.state, choice)
    recipe = run.recipe(entry)
    if recipe is None:
        raise RecipeError(f"{folder} is a run of the synthetic evaluation: its candidates are points, not recipes")
    return entry.id, recipe


def export_recipe(
    folder: FilePath, choice: str, out: FilePath | None = None, *, overwrite: bool = False
) -> tuple[str, Recipe, Path]:
    """Write the recipe of a run's candidate as a mergekit-compatible file.

    Args:
        folder: the run directory.
        choice: `best`, `knee` or a candidate's id.
        out: the file; default `<candidate>.yaml` in the working directory.
        overwrite: replace `out` if it is an existing file.

    Returns:
        The candidate's id, its recipe, and the file.

    Raises:
        JournalError: no such candidate.
        RecipeError: the run is of the synthetic evaluation, which has no recipes; or `out` exists or cannot be written.
        CheckpointError: see `Run.recipe`.
    """
    name, recipe = chosen_recipe(folder, choice)
    path = Path(out) if out else Path(f"{name.replace(':', '-')}.yaml")
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; expected a file")
    if path.is_file() and not overwrite:
        raise RecipeError(f"{path}: already exists; choose another file, or overwrite it (--overwrite)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, path)
    except OSError as problem:
        raise RecipeError(f"{path}: cannot be written: {problem.strerror}") from None
    return name, recipe, path
