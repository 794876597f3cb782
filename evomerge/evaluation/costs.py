"""Costs that evaluations on lm-eval tasks report; each can be used as the objective `cost.<name>`."""

from collections.abc import Mapping
from types import MappingProxyType

COSTS: Mapping[str, str] = MappingProxyType(
    {
        "items": "items scored",
        "prompt_tokens": "tokens of all prompts",
        "generated_tokens": "tokens the model generated",
        "layers": "transformer layers of the merged model",
        "active_parameters": "parameters of the merged model used per token; of a mixture of experts, only the routed experts count",
        "tokens_per_second": "prompt and generated tokens per second of engine time; noisy on a shared machine",
        "engine_s": "seconds in the engine",
        "total_s": "total seconds",
    }
)
"""name -> meaning; lower is better except for `HIGHER_IS_BETTER`"""

HIGHER_IS_BETTER = frozenset({"tokens_per_second"})
