"""Rotary embeddings in config files, normalised: transformers 4 and 5, and some models, write the same embedding differently."""

from collections.abc import Mapping
from typing import Any

from evomerge.core import Json
from evomerge.plan.model_header import config_value

Rope = Mapping[str, Mapping[str, Any]]
"""kind of layer ("" = all) -> settings; unknown settings and the default `rope_type` are left out"""

_USUAL_THETA = 10_000.0
_USUAL_TYPES = ("default", "mrope")
"""`mrope` is redundant with `mrope_section`"""


def rope_of(config: Mapping[str, Json]) -> Rope:
    """The rotary embedding of a language model, from its config.json."""
    scaling: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config_value(config, key)
        scaling |= value if isinstance(value, Mapping) else {}
    common = {
        "rope_theta": config_value(config, "rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": config_value(config, "partial_rotary_factor", "rotary_pct"),
    }
    # within `text_config`, transformers 4 omits defaults of the model's class
    usual = {} if isinstance(config.get("text_config"), Mapping) else {"rope_theta": _USUAL_THETA}
    by_kind = {kind: part for kind, part in scaling.items() if isinstance(part, Mapping)}
    local = config_value(config, "rope_local_base_freq")
    if not by_kind and local is not None:
        by_kind = {"full_attention": scaling, "sliding_attention": {"rope_theta": local}}
    return {kind: _settings(part, common, usual) for kind, part in (by_kind or {"": scaling}).items()}


def same_rope(one: Rope, other: Rope) -> bool:
    """Whether two models' rotary embeddings agree in all settings known for both.

    Settings for all layers are compared with the other model's settings for full-attention layers; sliding-window layers differ on purpose.
    """
    for kind in one.keys() & other.keys() or {"full_attention"}:
        ours, theirs = one.get(kind, one.get("")), other.get(kind, other.get(""))
        if ours is None or theirs is None:
            continue
        known = (ours.keys() & theirs.keys()) | {"rope_type"}
        if any(ours.get(name) != theirs.get(name) for name in known):
            return False
    return True


def _settings(part: Mapping[str, Any], common: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one kind of layer: its own, else those common to all kinds, else the defaults."""
    found = {name: value for name, value in {**common, **part}.items() if value is not None}
    kind = found.pop("type", None)
    kind = found.pop("rope_type", kind)
    if kind is not None and kind not in _USUAL_TYPES:
        found["rope_type"] = "longrope" if kind == "su" else kind  # "su" is its old name
    return {**usual, **found}
