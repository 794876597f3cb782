"""Search spaces: named parameters, their bounds, and the unit cube in which strategies work."""

from evomerge.space.choices import choices_at, middles_of, placed
from evomerge.space.search_space import MAX_DIMENSION, Conditions, Parameter, SearchSpace

__all__ = ["MAX_DIMENSION", "Conditions", "Parameter", "SearchSpace", "choices_at", "middles_of", "placed"]
