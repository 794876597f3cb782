"""Which architectures can be stacked with scales, and where the scales go. Reads headers only."""

from collections.abc import Mapping
from types import MappingProxyType

from evomerge.core import RecipeError
from evomerge.plan.model_header import ModelHeader

_LLAMA = ("o_proj", "down_proj")
_MIXTRAL = ("o_proj", ".w2.")

RESIDUAL_WRITERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": _LLAMA,
        "Qwen2MoeForCausalLM": _LLAMA,
        "Qwen3ForCausalLM": _LLAMA,
        "Qwen3MoeForCausalLM": _LLAMA,
        "MixtralForCausalLM": _MIXTRAL,
    }
)
"""Pre-norm architectures -> filters of the tensors (and biases) whose output is added to the hidden state. Each is tested."""

_REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "what its blocks add is normalised once more by weights that stand for 1 + w, which no merge of weights can scale, and "
        "its layers see windows that depend on their position",
    )
    | dict.fromkeys(("GraniteForCausalLM", "GraniteMoeForCausalLM"), "it multiplies what its blocks add by a constant")
    | dict.fromkeys(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        "its blocks do not normalise their input, so a scale changes what they compute",
    )
)


def residual_writers(header: ModelHeader) -> tuple[str, ...]:
    """Filters of the tensors that write to the residual stream of a model whose layers can be stacked.

    Raises:
        RecipeError: the architecture cannot be stacked, or is not known to be; or its layers depend on their position.
    """
    name = header.architecture
    if name not in RESIDUAL_WRITERS:
        reason = _REFUSED.get(name, "it is not known which of its weights write to the hidden state")
        raise RecipeError(
            f"{header.folder}: layers of {name or 'an unnamed architecture'} cannot be stacked: {reason}. "
            f"Known: {', '.join(RESIDUAL_WRITERS)}"
        )
    kinds = header.config.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        raise RecipeError(
            f"{header.folder}: its layers differ by position (layer_types: {', '.join(sorted(set(map(str, kinds))))}), so they cannot "
            "change places"
        )
    window, total = header.config.get("max_window_layers"), header.n_layers
    if header.config.get("use_sliding_window") and isinstance(window, int) and 0 < window < total:
        raise RecipeError(
            f"{header.folder}: layers from {window} on see a sliding window (max_window_layers), so they cannot change places"
        )
    for key in ("mlp_only_layers", "no_rope_layers"):
        if header.config.get(key):
            raise RecipeError(f"{header.folder}: {key} makes layers differ by position, so they cannot change places")
    if header.config.get("decoder_sparse_step") not in (None, 1):
        raise RecipeError(
            f"{header.folder}: decoder_sparse_step makes layers differ by position, so they cannot change places"
        )
    return RESIDUAL_WRITERS[name]
