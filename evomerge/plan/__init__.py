"""Recipe + model headers -> merge plan. Reads headers and config files, never weights."""

from evomerge.plan.active import active_parameters
from evomerge.plan.chat_template import PROCESSOR_TEMPLATE_FILE, TEMPLATE_FILE, chat_template_of
from evomerge.plan.compatibility import check_compatible
from evomerge.plan.folding import FOLDINGS, folding_of
from evomerge.plan.merge_plan import MergePlan, Piece, Region, TensorInput, TensorKey, TensorStep, WeightTarget
from evomerge.plan.model_folder import check_tokenizer, check_unchanged, file_inside, read_model_header
from evomerge.plan.model_header import LoraUpdate, ModelHeader, TensorHeader, config_value, is_embedding, is_head
from evomerge.plan.modules import split_into_modules
from evomerge.plan.planner import DTYPE_BYTES, default_dtype, make_plan, slices_with_inputs
from evomerge.plan.ranks import MOST_RANKS, PLACE_BYTES, RANK_BYTES, RANKED_METHODS, keeps_ranks, n_columns, rank_bytes
from evomerge.plan.recorded import headers_from_json, headers_to_json
from evomerge.plan.slots import padded
from evomerge.plan.sources import ModelTable, read_headers, read_models, read_source, table_of
from evomerge.plan.statistics import LARGE_TENSOR, MOST_KEPT_NORMS, statistics_bytes
from evomerge.plan.tokens import other_tokens

__all__ = [
    "DTYPE_BYTES",
    "FOLDINGS",
    "LARGE_TENSOR",
    "MOST_KEPT_NORMS",
    "MOST_RANKS",
    "PLACE_BYTES",
    "PROCESSOR_TEMPLATE_FILE",
    "RANKED_METHODS",
    "RANK_BYTES",
    "TEMPLATE_FILE",
    "LoraUpdate",
    "MergePlan",
    "ModelHeader",
    "ModelTable",
    "Piece",
    "Region",
    "TensorHeader",
    "TensorInput",
    "TensorKey",
    "TensorStep",
    "WeightTarget",
    "active_parameters",
    "chat_template_of",
    "check_compatible",
    "check_tokenizer",
    "check_unchanged",
    "config_value",
    "default_dtype",
    "file_inside",
    "folding_of",
    "headers_from_json",
    "headers_to_json",
    "is_embedding",
    "is_head",
    "keeps_ranks",
    "make_plan",
    "n_columns",
    "other_tokens",
    "padded",
    "rank_bytes",
    "read_headers",
    "read_model_header",
    "read_models",
    "read_source",
    "slices_with_inputs",
    "split_into_modules",
    "statistics_bytes",
    "table_of",
]
