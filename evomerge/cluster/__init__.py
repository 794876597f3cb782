"""Worker pools: threads of this process, or Ray actors. Only the `ray_*` modules import Ray; they are not imported here."""

from evomerge.cluster.local_pool import LocalPool
from evomerge.cluster.worker import Evaluator, make_evaluator

__all__ = ["Evaluator", "LocalPool", "make_evaluator"]
