"""Pareto tools and niches: dominance, fronts, hypervolume, knees, grids of elites, competition for items.

All losses are minimised. Independent of strategies.
"""

from evomerge.archive.dominance import non_dominated_mask
from evomerge.archive.front import Front, hypervolume
from evomerge.archive.grid import EliteGrid
from evomerge.archive.knee import knee_index, knees
from evomerge.archive.niches import Niches, Stakes, attraction, coverage, resource_fitness, solve_rate_entropy

__all__ = [
    "EliteGrid",
    "Front",
    "Niches",
    "Stakes",
    "attraction",
    "coverage",
    "hypervolume",
    "knee_index",
    "knees",
    "non_dominated_mask",
    "resource_fitness",
    "solve_rate_entropy",
]
