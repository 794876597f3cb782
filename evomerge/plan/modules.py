"""The modules of a model (a language model, an image encoder, the projector between them), recognised by tensor names."""

import re
from collections.abc import Mapping, Sequence

from evomerge.core import RecipeError

_VISION = re.compile(r"(^|\.)(vision_tower|vision_model|visual)\.")

_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "multi_modal_projector": re.compile(r"(^|\.)(multi_modal_projector\.|visual\.(merger|deepstack_merger_list)\.)"),
    "vision_tower": _VISION,
    "vision_model": _VISION,
    "encoder": re.compile(r"^(model\.)?encoder\."),
    "decoder": re.compile(r"^(model\.)?decoder\."),
}
"""mergekit's name of a module -> its tensors; a tensor belongs to the first that matches"""

_REST = ("text_decoder", "shared")
"""names of the module of tensors that match no pattern"""


def split_into_modules(tensors: Sequence[str], modules: Sequence[str | None]) -> dict[str | None, list[str]]:
    """Module -> its tensors, for the distinct `modules` in order; in a recipe without modules, a single module None contains all tensors.

    Raises:
        RecipeError: a module is unknown or has no tensors, or a tensor belongs to none of `modules`.
    """
    parts: dict[str | None, list[str]] = {module: [] for module in modules}
    if None in parts:
        return {None: list(tensors)}
    unknown = [module for module in parts if module not in _PATTERNS and module not in _REST]
    if unknown:
        raise RecipeError(
            f"modules: unknown {', '.join(map(str, unknown))}; known: default, {', '.join((*_REST, *_PATTERNS))}"
        )
    for tensor in tensors:
        names = _names_of_module(tensor)
        owner = next((name for name in names if name in parts), None)
        if owner is None:
            raise RecipeError(
                f"modules: tensor {tensor!r} belongs to {' or '.join(names)}, which the recipe does not list; add it"
            )
        parts[owner].append(tensor)
    empty = [str(module) for module, names in parts.items() if not names]
    if empty:
        raise RecipeError(
            f"modules: the model has no {', '.join(empty)}; its modules are {', '.join(str(m) for m, n in parts.items() if n)}"
        )
    return parts


def _names_of_module(tensor: str) -> tuple[str, ...]:
    """Possible names of the module of `tensor`."""
    pattern = next((pattern for pattern in _PATTERNS.values() if pattern.search(tensor)), None)
    return _REST if pattern is None else tuple(name for name, other in _PATTERNS.items() if other is pattern)
