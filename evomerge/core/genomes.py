"""Genomes, which strategies propose: a point of the search space, or a child of two earlier candidates.

`evomerge.recipe` turns them into recipes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from evomerge.core.errors import JournalError
from evomerge.core.jsonable import Json


@dataclass(frozen=True, slots=True)
class VectorGenome:
    """A point of the search space in unit coordinates: `values` has shape (d,), every entry in [0, 1]."""

    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Mutation:
    """Normal noise of standard deviation `sigma` on every weight, generated from `seed` in [0, 2^63)."""

    seed: int
    sigma: float


@dataclass(frozen=True, slots=True)
class CrossoverGenome:
    """A child of two earlier candidates: left of a split point the share of the second parent is `mix`, right of it 1 - `mix`.

    Attributes:
        parents: ids of the first and the second parent.
        mix: in [0, 1].
        splits: the split point of each chromosome (a group of weights), as a share of its weights, in [0, 1].
        mutation: noise added afterwards.
    """

    parents: tuple[str, str]
    mix: float
    splits: tuple[float, ...]
    mutation: Mutation | None = None


Genome = VectorGenome | CrossoverGenome


def genome_to_json(genome: Genome) -> Json:
    """A list of coordinates, or an object that describes the crossover; `genome_from_json` restores the genome exactly."""
    if isinstance(genome, VectorGenome):
        return list(genome.values)
    mutation = genome.mutation
    return {
        "parents": list(genome.parents),
        "mix": genome.mix,
        "splits": list(genome.splits),
        "mutation": None if mutation is None else {"seed": mutation.seed, "sigma": mutation.sigma},
    }


def genome_from_json(data: Json) -> Genome:
    """Make a genome from the output of `genome_to_json`.

    Raises:
        JournalError: `data` is not a genome.
    """
    try:
        if isinstance(data, Mapping):
            first, second = cast(Sequence[str], data["parents"])
            mutation = cast(Mapping[str, Json] | None, data["mutation"])
            return CrossoverGenome(
                (first, second),
                float(cast(float, data["mix"])),
                tuple(float(split) for split in cast(Sequence[float], data["splits"])),
                None
                if mutation is None
                else Mutation(cast(int, mutation["seed"]), float(cast(float, mutation["sigma"]))),
            )
        return VectorGenome(tuple(float(value) for value in cast(Sequence[float], data)))
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(f"not a genome: {data!r} ({error!r})") from None
