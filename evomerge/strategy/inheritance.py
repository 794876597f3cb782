"""Crossover and mutation of categorical coordinates."""

import numpy as np
from numpy.typing import NDArray

from evomerge.space import choices_at, middles_of


def inherited_choices(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    counts: NDArray[np.int_],
    mutation_rate: float,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Take each choice from either parent, or mutate it to another one; return the middles of the choices' intervals, (k,).

    Args:
        first, second: the parents' categorical coordinates, (k,).
        counts: number of choices of each coordinate, (k,).
        mutation_rate: probability of a mutation, per coordinate.
        generator: source of three random numbers per coordinate.
    """
    inherited = np.where(generator.random(len(counts)) < 0.5, first, second)
    choice = choices_at(inherited, counts)
    mutated = generator.random(len(counts)) < mutation_rate
    other = np.floor(generator.random(len(counts)) * (counts - 1))
    return middles_of(np.where(mutated, other + (other >= choice), choice), counts)
