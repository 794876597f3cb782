"""Rotary embeddings as configurations give them: transformers 4 and 5, and single models, spell the same one differently."""

from collections.abc import Mapping
from typing import Any

from evomerge.core import Json
from evomerge.plan.model_header import config_value

Rope = Mapping[str, Mapping[str, Any]]
"""kind of layer ("" = all) -> settings; a setting that is not known is left out, and so is the usual `rope_type`"""

_USUAL_THETA = 10_000.0
_USUAL_TYPES = ("default", "mrope")
"""`mrope_section` says as much"""


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
    # within `text_config` transformers 4 leaves out what is the default of the model's class
    usual = {} if isinstance(config.get("text_config"), Mapping) else {"rope_theta": _USUAL_THETA}
    by_kind = {kind: part for kind, part in scaling.items() if isinstance(part, Mapping)}
    local = config_value(config, "rope_local_base_freq")
    if not by_kind and local is not None:
        by_kind = {"full_attention": scaling, "sliding_attention": {"rope_theta": local}}
    return {kind: _settings(part, common, usual) for kind, part in (by_kind or {"": scaling}).items()}


def same_rope(one: Rope, other: Rope) -> bool:
    """Whether two models' rotary embeddings agree in everything that is known of both.

    What one gives for all layers is compared with the other's for layers that see everything; those with a window differ on purpose.
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
    """One kind's: its own, else those that all have, else the usual ones."""
    found = {name: value for name, value in {**common, **part}.items() if value is not None}
    kind = found.pop("type", None)
    kind = found.pop("rope_type", kind)
    if kind is not None and kind not in _USUAL_TYPES:
        found["rope_type"] = "longrope" if kind == "su" else kind  # its first name
    return {**usual, **found}
