"""Recipe files: mergekit YAML with evomerge's lossless form in a trailing comment.

mergekit reads the YAML; evomerge reads the comment, unless the YAML has been changed since it was written: then the
YAML takes precedence. A file of several documents contains a recipe and those of the models it depends on, each with a `name`.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evomerge.core import FilePath, Json, RecipeError, atomic_write_text, cached_model, canonical_json, why_unreadable
from evomerge.core.safe_yaml import MAX_YAML_BYTES, load_yaml_documents
from evomerge.recipe.documents import (
    RecipeFile,
    check_name,
    named_in,
    naming,
    places_of,
    with_cached_revisions,
    with_folders,
)
from evomerge.recipe.mergekit_reader import recipe_from_mergekit
from evomerge.recipe.mergekit_writer import has_mergekit_form, recipe_to_mergekit
from evomerge.recipe.recipe import Recipe
from evomerge.recipe.validation import check_recipe

logger = logging.getLogger(__name__)

_TRAILER = "# evomerge-recipe: "

_SEPARATORS = ("\x85", "\u2028", "\u2029")
"""line breaks in YAML besides the usual ones"""


_NO_MERGEKIT_FORM = (
    "# mergekit cannot express this merge: its weights change inside tensors, include noise or are shifted. evomerge reads the line\n"
    "# below. For crossovers that mergekit can express, use `space: {crossover: {split: tensor}}` without mutation.\n"
)


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line, and no aliases."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[object]) -> yaml.SequenceNode:
    flow = all(isinstance(entry, int | float | str) for entry in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    # in single quotes PyYAML writes these separators verbatim, and reads the first one as a space
    style = '"' if any(separator in data for separator in _SEPARATORS) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)


def recipe_to_yaml(recipe: Recipe | RecipeFile) -> str:
    """The text of a recipe file; `recipe_file_from_yaml` returns the identical recipe.

    If mergekit cannot express the merge, the file contains no YAML, only a comment that says so.

    Raises:
        RecipeError: `check_recipe` refuses a recipe.
    """
    file = RecipeFile(recipe) if isinstance(recipe, Recipe) else recipe
    documents: list[dict[str, Any]] = []
    recipes = [*file.named.items(), (None, file.final)]
    for name, each in recipes:
        check_recipe(each)
        if has_mergekit_form(each):
            documents.append(({} if name is None else {"name": name}) | recipe_to_mergekit(each))
    body = _NO_MERGEKIT_FORM
    if len(documents) == len(recipes):
        body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    content: dict[str, Json] = {"body": _digest(body), "recipe": file.final.to_json()}
    if file.named:
        content["named"] = [[name, each.to_json()] for name, each in file.named.items()]
    trailer = canonical_json(content)
    # other line separators would end the comment for a YAML reader
    for separator in _SEPARATORS:
        trailer = trailer.replace(separator, f"\\u{ord(separator):04x}")
    return f"{body}{_TRAILER}{trailer}\n"


def recipe_file_from_yaml(text: str, where: str = "recipe") -> RecipeFile:
    """Parse evomerge's own files and any mergekit file. Model paths are left unchanged.

    Args:
        text: the file's content.
        where: its name, for messages.

    Raises:
        RecipeError: the text cannot be parsed, recipes depend on each other in a cycle, or `check_recipe` refuses one.
    """
    file = _native(text, where)
    if file is None:
        file = _from_documents(load_yaml_documents(text, where, RecipeError), where)
    file = replace(file, where=where)
    for name, recipe in [*file.named.items(), (None, file.final)]:
        with naming(file.place(name)):
            check_recipe(recipe)
    return file


def write_recipe(recipe: Recipe | RecipeFile, path: FilePath) -> None:
    """Write a file that evomerge reads back as the identical recipe, and mergekit as the same merge.

    Raises:
        RecipeError: `check_recipe` refuses a recipe.
        OSError: `path` cannot be written.
    """
    atomic_write_text(Path(path), recipe_to_yaml(recipe))


def read_recipe_file(path: FilePath) -> RecipeFile:
    """Read the file `path`, with relative folders resolved against its folder, then the working directory, then the hub's cache.

    Raises:
        RecipeError: the file or a model folder is missing, or as for `recipe_file_from_yaml`.
    """
    path = Path(path)
    try:
        if path.stat().st_size > 2 * MAX_YAML_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size} bytes; a recipe can have at most {2 * MAX_YAML_BYTES}")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RecipeError(f"{path}: {why_unreadable(problem)}") from None
    file = recipe_file_from_yaml(text, str(path))
    resolve = _resolver(path, set(file.named))

    def found(recipe: Recipe, name: str | None) -> Recipe:
        recipe = with_cached_revisions(recipe)
        with naming(file.place(name)):
            return with_folders(recipe, lambda folder: resolve(folder, recipe))

    return replace(
        file, final=found(file.final, None), named={name: found(each, name) for name, each in file.named.items()}
    )


def read_recipe(path: FilePath) -> Recipe:
    """The recipe in the file `path`, which must be the only one.

    Raises:
        RecipeError: as for `read_recipe_file`, or the file has several documents.
    """
    file = read_recipe_file(path)
    if file.named:
        raise RecipeError(
            f"{path}: contains {len(file.named) + 1} recipes, of which {', '.join(file.named)} must be merged first; "
            "use `evomerge merge` to build the model"
        )
    return file.final


def _from_documents(documents: list[Any], where: str) -> RecipeFile:
    """The recipes of a file; the result is the one without a name, else the one that no other depends on."""
    named: dict[str, Recipe] = {}
    finals: list[Recipe] = []
    if not documents:
        raise RecipeError(f"{where}: is empty; expected a recipe")
    for index, document in enumerate(documents):
        place = where if len(documents) == 1 else f"{where}, document {index + 1}"
        name = None
        with naming(place):
            if isinstance(document, dict) and "name" in document:
                name = document["name"]
                check_name(name)
                document = {key: value for key, value in document.items() if key != "name"}
            recipe = recipe_from_mergekit(document, place)
        if name is None:
            finals.append(recipe)
        elif name in named:
            raise RecipeError(f"{place}: name {name!r} appears twice")
        else:
            named[name] = recipe
    if not finals:
        used = {name for recipe in named.values() for name in named_in(recipe, named)}
        results = [name for name in named if name not in used]
        if len(results) != 1:
            raise RecipeError(
                f"{where}: exactly one document must be the result, found {', '.join(results) or 'none'}; remove the name of the one that is"
            )
        finals = [replace(named.pop(results[0]), name=results[0])]
    if len(finals) > 1:
        raise RecipeError(f"{where}: {len(finals)} documents have no name; give all but the result a name")
    return RecipeFile(finals[0], named)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _native(text: str, where: str) -> RecipeFile | None:
    """The contents of the trailing comment, if there is one and the YAML above it is unchanged."""
    body, mark, trailer = text.rpartition(_TRAILER)
    if not mark or (body and not body.endswith("\n")):
        return None
    try:
        data = json.loads(trailer)
        if data["body"] != _digest(body):
            logger.warning(
                "%s: the YAML was changed after evomerge wrote it, so it is used instead of the last line", where
            )
            return None
        with naming(where):
            named = {name: Recipe.from_json(each) for name, each in data.get("named", [])}
            return RecipeFile(Recipe.from_json(data["recipe"]), named)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RecipeError(
            f"{where}: the line {_TRAILER.strip()!r} is damaged; delete it to use only the YAML"
        ) from None


def _resolver(file: Path, names: set[str]) -> Callable[[str, Recipe], str]:
    """A function (folder as written, recipe that names it) -> resolved folder; names of other documents stay unchanged."""
    found: dict[str, str] = {name: name for name in names}

    def resolve(folder: str, recipe: Recipe) -> str:
        if folder not in found:
            home = folder.startswith("~/")
            places = [Path.home() / folder[2:]] if home else [file.parent / folder, Path.cwd() / folder]
            try:
                place = next((place for place in places if place.is_dir()), None) or cached_model(folder)
            except OSError as problem:
                where = ", ".join(places_of(recipe, folder))
                raise RecipeError(f"{where}: model {folder!r}: {why_unreadable(problem)}") from None
            if place is None:
                what = f"{', '.join(places_of(recipe, folder))}: model {folder!r} is not a folder"
                if Path(folder).is_absolute():
                    raise RecipeError(f"{what}; if it has moved, change its path in the file")
                listed = " and ".join(dict.fromkeys(str(place) for place in places))
                raise RecipeError(
                    f"{what} (tried {listed}) and not in the hub's cache; `hf download ORG/NAME` downloads a model"
                )
            found[folder] = folder if Path(folder).is_absolute() else str(place.resolve())
        return found[folder]

    return resolve
