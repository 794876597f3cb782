"""The events of a run, as they are written to its journal. docs/journal.md says when each happens, and `RunState` what each changes."""

from collections.abc import Iterable, Mapping, Sequence

from evomerge.core import (
    Candidate,
    Evaluation,
    Genome,
    Json,
    LostWorker,
    Objective,
    Split,
    VectorGenome,
    genome_to_json,
)
from evomerge.search.journal import FORMAT_VERSION, event

Event = dict[str, Json]


def run(
    objectives: Iterable[Objective],
    *,
    name: str | None,
    seed: int,
    strategy: str,
    space: str,
    in_flight: int,
    deterministic: bool,
) -> Event:
    """A run begins. `space` is the fingerprint of the search space, `in_flight` the number of candidates that may be pending."""
    return event(
        "run",
        version=FORMAT_VERSION,
        name=name,
        seed=seed,
        strategy=strategy,
        objectives=[objective.to_json() for objective in objectives],
        space=space,
        in_flight=in_flight,
        deterministic=deterministic,
    )


def session(pid: int, host: str, workers: int) -> Event:
    """A process starts or resumes the run."""
    return event("session", pid=pid, host=host, workers=workers)


def baseline(identifier: str, recipe: Mapping[str, Json] | None, values: Sequence[float] | None) -> Event:
    """A baseline will be evaluated. `values` are its unit coordinates (d,); None outside the space."""
    return event("baseline", id=identifier, recipe=recipe, values=None if values is None else list(values))


def seeded(identifiers: Sequence[str]) -> Event:
    """The strategy has received the baselines inside the space."""
    return event("seeded", ids=list(identifiers))


def asked(candidate: Candidate, ask_s: float) -> Event:
    """The strategy has proposed a candidate, which took it `ask_s` seconds."""
    return event(
        "asked",
        id=candidate.id,
        **_genome_fields(candidate.genome),
        parents=list(candidate.parents),
        ask_s=round(ask_s, 6),
    )


def crossed(identifier: str, factors: Json) -> Event:
    """The factors with which the parents of a crossover are combined are known."""
    return event("crossed", id=identifier, factors=factors)


def items(split: Split, layout: Sequence[tuple[str, int]], sample_sizes: Mapping[str, Sequence[int]]) -> Event:
    """The first evaluation of a split shows its tasks and their numbers of items (`layout`), and those of the tasks of groups (`sample_sizes`)."""
    sizes: dict[str, Json] = {name: list(counts) for name, counts in sample_sizes.items()}
    return event(
        "items",
        split=split.value,
        layout=[list(column) for column in layout],
        **({"sample_sizes": sizes} if sizes else {}),
    )


def evaluated(evaluation: Evaluation, place: tuple[int, str] | None, elapsed_s: float) -> Event:
    """A result has arrived. `place` is the row of its item scores and their checksum, if it has any; `elapsed_s` the wall time of the run so far."""
    row, checksum = place or (None, None)
    return event(
        "evaluated",
        id=evaluation.candidate_id,
        split=evaluation.split.value,
        status=evaluation.status.value,
        scores=dict(evaluation.scores),
        stderr=dict(evaluation.stderr),
        cost=dict(evaluation.cost),
        error=evaluation.error,
        row=row,
        checksum=checksum,
        elapsed_s=round(elapsed_s, 3),
    )


def lost(loss: LostWorker) -> Event:
    """A worker died or hung with a candidate."""
    return event("lost", id=loss.candidate_id, split=loss.split.value, reason=loss.reason)


def told(identifiers: Sequence[str]) -> Event:
    """The strategy has received the results of candidates."""
    return event("told", ids=list(identifiers))


def stopped(reasons: Mapping[str, Json], diagnostics: Mapping[str, Json]) -> Event:
    """No further candidate will be proposed; with what the strategy has learned about the problem."""
    return event("stopped", reasons=dict(reasons), diagnostics=dict(diagnostics))


def retry(identifiers: Sequence[str], split: Split) -> Event:
    """Failed results are withdrawn, so that the candidates are evaluated again."""
    return event("retry", ids=list(identifiers), split=split.value)


def finalists(identifiers: Sequence[str]) -> Event:
    """Finalists have been chosen."""
    return event("finalists", ids=list(identifiers))


def best(identifier: str) -> Event:
    """The finals have a winner."""
    return event("best", id=identifier)


def finished() -> Event:
    """The finals are done."""
    return event("finished")


def _genome_fields(genome: Genome) -> dict[str, Json]:
    """Points are written under `values`, children of two candidates under `crossover`."""
    data = genome_to_json(genome)
    return {"values": data} if isinstance(genome, VectorGenome) else {"values": None, "crossover": data}
