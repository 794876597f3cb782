"""How many of a merged model's weights one token is computed with. Reads names and shapes alone."""

import re
from collections.abc import Mapping
from typing import Any

from evomerge.plan.layers import layer_name
from evomerge.plan.merge_plan import MergePlan, TensorStep
from evomerge.plan.model_header import config_value

_N_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""what configurations call the number of experts of a layer among which a router chooses"""

_EXPERT = re.compile(r"(^|\.)experts\.")
"""in the names of those experts' tensors; not in those of shared ones (`shared_expert`, `shared_experts`), which see every token"""


def active_parameters(plan: MergePlan, config: Mapping[str, Any]) -> float:
    """Elements of all tensors of the plan, those of routed experts counted by the share of experts that a token goes through.

    Args:
        plan: of the merge.
        config: of any of its models (`num_experts_per_tok` of `num_experts` or `num_local_experts`, as Mixtral, Qwen2-MoE and
            Qwen3-MoE have them); without these settings everything counts.
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
