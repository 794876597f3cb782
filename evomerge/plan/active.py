"""Counts the parameters of a merged model that are active per token. Reads names and shapes only."""

import re
from collections.abc import Mapping
from typing import Any

from evomerge.plan.layers import layer_name
from evomerge.plan.merge_plan import MergePlan, TensorStep
from evomerge.plan.model_header import config_value

_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""config keys for the number of routed experts of a layer"""

_EXPERT = re.compile(r"(^|\.)experts\.")
"""in names of routed experts' tensors, but not of shared experts' (`shared_expert`, `shared_experts`), which process every token"""


def active_parameters(plan: MergePlan, config: Mapping[str, Any]) -> float:
    """Number of elements of all tensors of the plan, with those of routed experts multiplied by the fraction of experts used per token.

    Args:
        plan: of the merge.
        config: of any of its models, with `num_experts_per_tok` and one of `num_experts` (Qwen2-MoE, Qwen3-MoE), `num_local_experts`
            (Mixtral) and `n_routed_experts`; without these settings everything counts.
    """
    share = _chosen_share(config)
    return sum(step.n_elements * (share if _is_routed(step) else 1.0) for step in plan.steps)


def _is_routed(step: TensorStep) -> bool:
    layer = layer_name(step.output)
    return layer is not None and _EXPERT.search(layer.rest) is not None


def _chosen_share(config: Mapping[str, Any]) -> float:
    chosen, total = config_value(config, "num_experts_per_tok"), config_value(config, *_N_EXPERTS)
    if not isinstance(chosen, int) or not isinstance(total, int) or not 0 < chosen <= total:
        return 1.0
    return chosen / total
