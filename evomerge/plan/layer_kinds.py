"""Layers of different kinds according to a config, such as sliding-window and full attention."""

from collections.abc import Mapping
from typing import Any

from evomerge.core import Json
from evomerge.plan.model_header import N_LAYERS_KEYS, ModelHeader, config_value, language_config

_WINDOWS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""model type -> n where every n-th layer has full attention and the others a sliding window, if the config does not say so (as written by transformers 4)"""

_MAKES = {
    "layer_types": ("full_attention_interval", "full_attn_idxs", "global_attn_every_n_layers", "max_window_layers", "sliding_window_pattern"),
    "mlp_layer_types": ("decoder_sparse_step", "first_k_dense_replace", "mlp_only_layers"),
    "no_rope_layers": ("no_rope_layer_interval",),
}  # fmt: skip
"""list with an entry for each layer -> settings from which it is derived, which are redundant if the list is present"""

_PERIODS = (
    "attn_layer_period", "decoder_sparse_step", "expert_layer_period", "full_attention_interval", "global_attn_every_n_layers",
    "interleave_moe_layer_step", "moe_layer_freq", "no_rope_layer_interval", "sliding_window_pattern",
)  # fmt: skip
"""periods with which a different kind of layer occurs; 1 = all layers are alike"""

_PLACES = (
    "attention_types", "attn_layer_indices", "block_types", "cross_attention_layers", "first_k_dense_replace", "full_attn_idxs",
    "hybrid_override_pattern", "mlp_only_layers", "moe_layers",
)  # fmt: skip
"""indices or numbers of layers of a different kind; empty or 0 = all layers are alike"""

_NO_LAYER_LISTS = ("architectures", "eos_token_id", *_PLACES)
"""lists that are not per layer but may happen to have as many entries as there are layers"""


def listed_kinds(config: Mapping[str, Json]) -> dict[str, list[Any]]:
    """Settings with one entry for each layer: name -> entries. Alternating attention that the config leaves implicit is made explicit."""
    n_layers = config_value(config, *N_LAYERS_KEYS)
    listed = {
        key: value
        for key, value in config.items()
        if isinstance(value, list) and len(value) == n_layers and key not in _NO_LAYER_LISTS
    }
    period = config.get("sliding_window_pattern") or _WINDOWS.get(str(config.get("model_type")))
    if "layer_types" not in listed and isinstance(period, int) and isinstance(n_layers, int):
        kinds = ("full_attention", "sliding_attention")
        listed["layer_types"] = [kinds[bool((layer + 1) % period)] for layer in range(n_layers)]
    return listed


def kinds_of_model(header: ModelHeader) -> dict[str, list[Any]]:
    """`listed_kinds` of the language model."""
    return listed_kinds(language_config(header.config))


def kinds_by_place(header: ModelHeader) -> list[str]:
    """Settings that make layers differ without an entry for each layer: they apply to positions, whichever layer is there."""
    config, listed = language_config(header.config), kinds_of_model(header)
    found = [key for key in _PERIODS if config.get(key) not in (None, False, 0, 1)]
    found += [key for key in _PLACES if config.get(key)]
    window = config.get("max_window_layers")
    if config.get("use_sliding_window") and isinstance(window, int) and 0 < window < header.n_layers:
        found.append("max_window_layers")
    explained = [key for made, keys in _MAKES.items() if made in listed for key in keys]
    return [key for key in dict.fromkeys(found) if key not in listed and key not in explained]
