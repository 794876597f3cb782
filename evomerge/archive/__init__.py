"""Pareto tools: dominance, fronts, hypervolume, knees. All losses are minimised; nothing here knows a strategy."""

from evomerge.archive.dominance import dominates, non_dominated_mask
from evomerge.archive.front import Front, hypervolume
from evomerge.archive.knee import knee, knee_index

__all__ = ["Front", "dominates", "hypervolume", "knee", "knee_index", "non_dominated_mask"]
