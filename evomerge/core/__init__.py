"""Errors, random streams, small helpers for files and YAML, and the records that all packages exchange.

Imports no other package of evomerge and nothing heavier than NumPy.
"""

from evomerge.core.collector import collect_rarely
from evomerge.core.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EvaluationError,
    EvomergeError,
    JournalError,
    RecipeError,
    SpaceError,
    loading_errors,
)
from evomerge.core.files import (
    FilePath,
    atomic_write_bytes,
    atomic_write_json,
    atomic_write_text,
    fsync_folder,
    why_unreadable,
)
from evomerge.core.genomes import (
    CrossoverGenome,
    Genome,
    Mutation,
    VectorGenome,
    genome_from_json,
    genome_to_json,
)
from evomerge.core.hub_cache import cached_model, model_name
from evomerge.core.jsonable import Json, canonical_json, fingerprint
from evomerge.core.machine import machine_id
from evomerge.core.names import (
    UNIFORM,
    cost_key,
    cost_objective,
    is_task_arithmetic,
    model_of_baseline,
    own_recipe_baseline,
    source_baseline,
    weighted_baseline,
)
from evomerge.core.packages import installed_version
from evomerge.core.random_streams import random_stream
from evomerge.core.records import (
    Candidate,
    Direction,
    Evaluation,
    EvaluationRequest,
    LostWorker,
    Objective,
    Split,
    Status,
    to_losses,
    weights_in_mean,
)
from evomerge.core.safe_yaml import load_yaml, load_yaml_documents
from evomerge.core.sampling_error import standard_error
from evomerge.core.sizes import parse_bytes
from evomerge.core.spelling import did_you_mean, nearest

__all__ = [
    "UNIFORM",
    "Candidate",
    "CheckpointError",
    "ConfigError",
    "CrossoverGenome",
    "Direction",
    "EngineError",
    "Evaluation",
    "EvaluationError",
    "EvaluationRequest",
    "EvomergeError",
    "FilePath",
    "Genome",
    "JournalError",
    "Json",
    "LostWorker",
    "Mutation",
    "Objective",
    "RecipeError",
    "SpaceError",
    "Split",
    "Status",
    "VectorGenome",
    "atomic_write_bytes",
    "atomic_write_json",
    "atomic_write_text",
    "cached_model",
    "canonical_json",
    "collect_rarely",
    "cost_key",
    "cost_objective",
    "did_you_mean",
    "fingerprint",
    "fsync_folder",
    "genome_from_json",
    "genome_to_json",
    "installed_version",
    "is_task_arithmetic",
    "load_yaml",
    "load_yaml_documents",
    "loading_errors",
    "machine_id",
    "model_name",
    "model_of_baseline",
    "nearest",
    "own_recipe_baseline",
    "parse_bytes",
    "random_stream",
    "source_baseline",
    "standard_error",
    "to_losses",
    "weighted_baseline",
    "weights_in_mean",
    "why_unreadable",
]
