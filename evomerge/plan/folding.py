"""Which architectures can be stacked with scales, and into which weights the scales are folded. Reads headers only."""

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.core import RecipeError
from evomerge.plan.layer_kinds import kinds_by_place, kinds_of_model
from evomerge.plan.model_header import ModelHeader
from evomerge.recipe import Folding

_LLAMA = Folding(("o_proj", "down_proj"), ("o_proj", "down_proj"))
_MIXTRAL = Folding(("o_proj", ".w2."), ("o_proj", ".w2."))
_POST_NORMS = Folding(("post_attention_layernorm", "post_feedforward_layernorm"), ("o_proj", "down_proj"), shifted=True)

FOLDINGS: Mapping[str, Folding] = MappingProxyType(
    {
        "GemmaForCausalLM": _LLAMA,
        "Gemma2ForCausalLM": _POST_NORMS,
        "Gemma3ForCausalLM": _POST_NORMS,
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "MixtralForCausalLM": _MIXTRAL,
        "Qwen2ForCausalLM": _LLAMA,
        "Qwen2MoeForCausalLM": _LLAMA,
        "Qwen3ForCausalLM": _LLAMA,
        "Qwen3MoeForCausalLM": _LLAMA,
    }
)
"""Architectures whose blocks normalise their input -> where scales are folded in. Each is tested."""

_REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("GraniteForCausalLM", "GraniteMoeForCausalLM"), "it multiplies the outputs of its blocks by a constant"
    )
    | dict.fromkeys(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        "its blocks do not normalise their input, so a scale would change what they compute",
    )
)


def folding_of(header: ModelHeader) -> Folding:
    """Where the scales of a stack of this model's layers are folded in.

    Raises:
        RecipeError: the architecture cannot be stacked or is unknown, or its layers depend on their position.
    """
    name = header.architecture
    if name not in FOLDINGS:
        reason = _REFUSED.get(name, "it is not known which of its weights write to the hidden state")
        raise RecipeError(
            f"{header.folder}: layers of {name or 'an unnamed architecture'} cannot be stacked: {reason}. "
            f"Known: {', '.join(FOLDINGS)}"
        )
    several = [key for key, kinds in kinds_of_model(header).items() if any(kind != kinds[0] for kind in kinds)]
    several += kinds_by_place(header)
    if several:
        raise RecipeError(
            f"{header.folder}: its layers differ by position ({', '.join(several)}), so they cannot be moved"
        )
    return FOLDINGS[name]
