"""Groups of a model's tensors that can have their own parameters: attention, mlp, embeddings, norms and the rest, recognised by name."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from evomerge.core import SpaceError

REST = "rest"

MODULE_GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "attention": ("attn.", "attention."),
        "mlp": ("mlp.", "moe.", "feed_forward.", "ffn.", "fc1.", "fc2."),
        "embeddings": ("embed_tokens", "lm_head", "embed_in", "embed_out", "embed_positions", "embeddings.", "embedding.", "wte.", "wpe."),
        "norms": ("norm", "ln_"),
        REST: (),
    }
)  # fmt: skip
"""module group -> substrings of tensor names (mergekit filters) in all kinds of models; "rest" contains all tensors not in other groups"""


def module_filters(groups: Sequence[str], tensors: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group -> those of its filters that are needed for models with these tensors. A tensor belongs to the first group that matches it.

    Raises:
        SpaceError: a group is unknown, appears twice or has no tensors, or a tensor belongs to no group.
    """
    unknown = [group for group in groups if group not in MODULE_GROUPS]
    if unknown:
        raise SpaceError(f"module_groups: unknown {unknown}; known: {', '.join(MODULE_GROUPS)}")
    if len(set(groups)) != len(groups):
        raise SpaceError(f"module_groups {list(groups)}: a group appears twice")
    if REST in groups[:-1]:
        raise SpaceError(
            f"module_groups {list(groups)}: {REST!r} contains the tensors not in other groups; put it last"
        )
    left = list(dict.fromkeys(tensors))
    filters: dict[str, tuple[str, ...]] = {}
    for group in groups:
        filters[group] = _needed(MODULE_GROUPS[group], left)
        kept = [] if group == REST else [name for name in left if not _any_in(filters[group], name)]
        if len(kept) == len(left):
            existing = [other for other, texts in MODULE_GROUPS.items() if any(_any_in(texts, name) for name in left)]
            raise SpaceError(
                f"module_groups {list(groups)}: no tensors of the models are left for {group!r}; leave it out or use another group "
                f"(the models have {', '.join([*filters][:-1] + existing)})"
            )
        left = kept
    if groups and left:
        raise SpaceError(
            f"module_groups {list(groups)} must end with {REST!r}, so that every tensor belongs to a group ({left[0]!r} does not)"
        )
    return filters


def group_of(tensor: str, filters: Mapping[str, tuple[str, ...]]) -> str:
    """The group of a tensor, for `filters` from `module_filters`; tensors that match none belong to the last group."""
    return next((group for group, texts in filters.items() if _any_in(texts, tensor)), list(filters)[-1])


def _needed(texts: Sequence[str], tensors: Iterable[str]) -> tuple[str, ...]:
    """Those of `texts` that are the first match for some tensor name."""
    first = {next((text for text in texts if text in name), None) for name in tensors}
    return tuple(text for text in texts if text in first)


def _any_in(texts: Iterable[str], tensor: str) -> bool:
    return any(text in tensor for text in texts)
