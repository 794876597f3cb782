"""Recipe files: mergekit YAML with evomerge's lossless form in a trailing comment.

mergekit reads the YAML; evomerge reads the comment, unless someone has changed the YAML since it was written: then the
YAML counts.
"""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path

import yaml

from evomerge.core import RecipeError, atomic_write_text, canonical_json
from evomerge.core.safe_yaml import MAX_YAML_BYTES, load_yaml
from evomerge.recipe.mergekit_reader import recipe_from_mergekit
from evomerge.recipe.mergekit_writer import has_mergekit_form, recipe_to_mergekit
from evomerge.recipe.parts import Source
from evomerge.recipe.recipe import Recipe
from evomerge.recipe.validation import check_recipe

logger = logging.getLogger(__name__)

_TRAILER = "# evomerge-recipe: "


_NO_MERGEKIT_FORM = (
    "# mergekit cannot express this merge: its weights change inside tensors or carry noise. evomerge reads the line below.\n"
    "# With `space: {crossover: {split: tensor}}` and no mutation a search finds merges that mergekit can express.\n"
)


class _Dumper(yaml.SafeDumper):
    """Lists of scalars on one line, and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[object]) -> yaml.SequenceNode:
    flow = all(isinstance(entry, int | float | str) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def recipe_to_yaml(recipe: Recipe) -> str:
    """The text of a recipe file; `recipe_from_yaml` gives back the identical recipe.

    Where mergekit cannot express the merge there is no YAML in it, only a comment that says so.

    Raises:
        RecipeError: a recipe that `check_recipe` refuses.
    """
    check_recipe(recipe)
    body = _NO_MERGEKIT_FORM
    if has_mergekit_form(recipe):
        body = yaml.dump(recipe_to_mergekit(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    trailer = canonical_json({"body": _digest(body), "recipe": recipe.to_json()})
    # other line separators would end the comment for a YAML reader
    for separator in ("\x85", "\u2028", "\u2029"):
        trailer = trailer.replace(separator, f"\\u{ord(separator):04x}")
    return f"{body}{_TRAILER}{trailer}\n"


def recipe_from_yaml(text: str, where: str = "recipe") -> Recipe:
    """The recipe in `text`: evomerge's own file or any mergekit file. Model paths are left as they are written.

    Args:
        text: the file's content.
        where: its name, for messages.

    Raises:
        RecipeError: not readable, or a recipe that `check_recipe` refuses.
    """
    recipe = _native(text, where)
    if recipe is None:
        recipe = recipe_from_mergekit(load_yaml(text, where, RecipeError), where)
    try:
        check_recipe(recipe)
    except RecipeError as problem:
        raise RecipeError(f"{where}: {problem}") from None
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes `recipe` as a file that evomerge reads back identically and mergekit as the same merge.

    Raises:
        RecipeError: a recipe that `check_recipe` refuses.
        OSError: `path` cannot be written.
    """
    atomic_write_text(path, recipe_to_yaml(recipe))


def read_recipe(path: Path) -> Recipe:
    """The recipe in the file `path`, with relative model folders resolved against its folder, else the working directory.

    Raises:
        RecipeError: the file or a model folder is missing, or as `recipe_from_yaml`.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 2 * MAX_YAML_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; a recipe has at most {2 * MAX_YAML_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: cannot be read as a recipe: {problem}") from None
    return _resolved(recipe_from_yaml(text, str(path)), path)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _native(text: str, where: str) -> Recipe | None:
    """The recipe in the trailing comment, if there is one and the YAML above it is unchanged."""
    body, mark, trailer = text.rpartition(_TRAILER)
    if not mark or (body and not body.endswith("\n")):
        return None
    try:
        data = json.loads(trailer)
        if data["body"] != _digest(body):
            logger.warning("%s: the YAML was changed after evomerge wrote it; its seed and name are not used", where)
            return None
        return Recipe.from_json(data["recipe"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecipeError(
            f"{where}: the line {_TRAILER.strip()!r} is damaged; delete it to use the YAML alone"
        ) from None


def _resolved(recipe: Recipe, file: Path) -> Recipe:
    tried: dict[str, str] = {}

    def resolve(folder: str) -> str:
        if folder not in tried:
            places = [file.parent / folder, Path.cwd() / folder]
            found = next((place for place in places if place.is_dir()), None)
            if found is None:
                listed = " and ".join(dict.fromkeys(str(place) for place in places))
                raise RecipeError(f"{file}: model {folder!r} is no folder; tried {listed}")
            tried[folder] = folder if Path(folder).is_absolute() else str(found.resolve())
        return tried[folder]

    def resolve_source(source: Source) -> Source:
        return replace(source, model=resolve(source.model), lora=None if source.lora is None else resolve(source.lora))

    keys = {source.key: resolve_source(source).key for piece in recipe.slices for source in piece.sources}

    def resolve_key(key: str | None) -> str | None:
        return None if key is None else keys[key] if key in keys else resolve(key)

    slices = tuple(replace(piece, sources=tuple(map(resolve_source, piece.sources))) for piece in recipe.slices)
    return replace(
        recipe,
        slices=slices,
        base=resolve_key(recipe.base),
        tokenizer_source=resolve_key(recipe.tokenizer_source),
    )
