"""What a child has of its parents where coordinates are categorical."""

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
    """Either parent's choice or, mutated, another one; the middle of the choice's interval, (k,).

    Args:
        first, second: the parents' categorical coordinates, (k,).
        counts: how many choices each coordinate has, (k,).
        mutation_rate: of each coordinate.
        generator: draws three numbers for each.
    """
    inherited = np.where(generator.random(len(counts)) < 0.5, first, second)
    choice = choices_at(inherited, counts)
    mutated = generator.random(len(counts)) < mutation_rate
    other = np.floor(generator.random(len(counts)) * (counts - 1))
    return middles_of(np.where(mutated, other + (other >= choice), choice), counts)
