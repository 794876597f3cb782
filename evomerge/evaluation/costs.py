"""The costs that evaluations on lm-eval tasks report; each can be an objective, called `cost.<name>`."""

from collections.abc import Mapping
from types import MappingProxyType

COSTS: Mapping[str, str] = MappingProxyType(
    {
        "items": "items scored",
        "prompt_tokens": "tokens of all prompts",
        "generated_tokens": "tokens the model wrote",
        "layers": "transformer layers of the merged model",
        "active_parameters": "elements of the merged model's tensors that a token is computed with: of a mixture, the chosen experts",
        "tokens_per_second": "prompt and generated tokens per second of the engine, measured; noisy on a shared machine",
        "engine_s": "seconds of the engine",
        "total_s": "seconds in all",
    }
)
"""name -> meaning; higher is better for `HIGHER_IS_BETTER` alone"""

HIGHER_IS_BETTER = frozenset({"tokens_per_second"})
