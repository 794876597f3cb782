"""Recipe + model headers -> merge plan. Reads headers and config files, never a weight."""

from evomerge.plan.merge_plan import MergePlan, Region, TensorInput, TensorStep, WeightTarget

__all__ = ["MergePlan", "Region", "TensorInput", "TensorStep", "WeightTarget"]
