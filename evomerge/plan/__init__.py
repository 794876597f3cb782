"""Recipe + model headers -> merge plan. Reads headers and config files, never a weight."""

from evomerge.plan.folding import RESIDUAL_WRITERS, residual_writers
from evomerge.plan.merge_plan import MergePlan, Piece, Region, TensorInput, TensorStep, WeightTarget
from evomerge.plan.model_folder import check_unchanged, file_inside, read_model_header
from evomerge.plan.model_header import ModelHeader, TensorHeader
from evomerge.plan.planner import make_plan
from evomerge.plan.slots import padded

__all__ = [
    "RESIDUAL_WRITERS",
    "MergePlan",
    "ModelHeader",
    "Piece",
    "Region",
    "TensorHeader",
    "TensorInput",
    "TensorStep",
    "WeightTarget",
    "check_unchanged",
    "file_inside",
    "make_plan",
    "padded",
    "read_model_header",
    "residual_writers",
]
