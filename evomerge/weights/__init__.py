"""Resident weights, merge methods, and the merger that writes a plan's tensors into an engine or a checkpoint."""

import evomerge.weights.kernel_cache  # noqa: F401 - must come before anything that numba compiles
from evomerge.weights.checkpoint.chat_templates import chosen_template
from evomerge.weights.checkpoint.export import check_target, merge_file_to_folder, merge_to_folder
from evomerge.weights.checkpoint.slots import write_slots_folder
from evomerge.weights.checkpoint.vocabulary import alignment_to
from evomerge.weights.kinship import strangers
from evomerge.weights.merger import Merger
from evomerge.weights.pool import WeightPool
from evomerge.weights.remote_merge import WRITE_MERGE
from evomerge.weights.triton import gpu_methods

__all__ = [
    "WRITE_MERGE",
    "Merger",
    "WeightPool",
    "alignment_to",
    "check_target",
    "chosen_template",
    "gpu_methods",
    "merge_file_to_folder",
    "merge_to_folder",
    "strangers",
    "write_slots_folder",
]
