"""`RecipeFile`: a recipe together with the recipes of its models that are merges themselves (several YAML documents)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from evomerge.core import RecipeError, cached_model
from evomerge.recipe.parts import Slice, Source
from evomerge.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """The contents of a recipe file.

    Attributes:
        final: the recipe of the result.
        named: name -> recipe of a model that other recipes refer to by this name instead of a path.
        where: the file's name, for messages.

    Raises:
        RecipeError: a name is not valid, or recipes depend on each other in a cycle.
    """

    final: Recipe
    named: Mapping[str, Recipe] = field(default_factory=dict)
    where: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in self.named:
            check_name(name)
        self.order()

    def place(self, name: str | None = None) -> str | None:
        """How messages refer to the recipe of the result or of the model called `name`; None if it does not come from a file."""
        if self.where is None or not self.named:
            return self.where
        name = name or self.final.name
        return f"{self.where}, " + ("the document without a name" if name is None else f"document {name!r}")

    def order(self) -> tuple[str, ...]:
        """The names in an order in which every recipe comes after those it depends on. Unused names are left out.

        Raises:
            RecipeError: recipes depend on each other in a cycle.
        """
        done: list[str] = []
        open_names: list[str] = []

        def visit(recipe: Recipe) -> None:
            for name in named_in(recipe, self.named):
                if name in open_names:
                    raise RecipeError(f"documents {' -> '.join([*open_names, name])} depend on each other in a cycle")
                if name not in done:
                    open_names.append(name)
                    visit(self.named[name])
                    open_names.pop()
                    done.append(name)

        visit(self.final)
        return tuple(done)


def check_name(name: object) -> None:
    """Refuse invalid document names. A document's model is written to a folder of the same name.

    Raises:
        RecipeError: shows the name.
    """
    fits = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
    if not fits or any(mark in str(name) for mark in "/+@"):
        raise RecipeError(f"name: expected a word without '/', '+' and '@', got {name!r}")


@contextmanager
def naming(where: str | None) -> Iterator[None]:
    """Prefix messages of RecipeError with `where`, unless they already begin with it."""
    try:
        yield
    except RecipeError as problem:
        if where is None or str(problem).startswith(where):
            raise
        raise RecipeError(f"{where}: {problem}") from None


def places_of(recipe: Recipe, folder: str) -> tuple[str, ...]:
    """The keys in the mergekit document of `recipe` whose value is the given folder of a model or adapter."""
    places = []
    if recipe.base is not None and folder in _folders(recipe.source(recipe.base)):
        places.append("base_model")
    for number, part in enumerate(recipe.slices):
        listed = "models" if part.sources[0].layer_range is None else f"slices[{number}].sources"
        where = listed if part.module is None else f"modules.{part.module}.{listed}"
        if part.base is not None and folder in _folders(recipe.source(part.base)):
            places.append(f"slices[{number}].base_model")
        places += [f"{where}[{index}]" for index, source in enumerate(part.sources) if folder in _folders(source)]
    if recipe.tokenizer is not None and folder in recipe.tokenizer.models():
        places.append("tokenizer")
    return tuple(places)


def _folders(source: Source) -> tuple[str | None, ...]:
    return source.model, source.lora


def named_in(recipe: Recipe, names: Mapping[str, object]) -> tuple[str, ...]:
    """Those of `names` that the recipe depends on."""
    used = [source.model for source in recipe.sources]
    used += [recipe.base or "", *(part.base or "" for part in recipe.slices)]
    used += recipe.tokenizer.models() if recipe.tokenizer else ()
    return tuple(dict.fromkeys(name for name in used if name in names))


def with_adapters(recipe: Recipe, adapted: Mapping[str, tuple[str, str]]) -> Recipe:
    """The recipe with every source whose model is a key of `adapted` replaced by the (model, adapter) of that key."""

    def parted(source: Source) -> Source:
        if source.lora is not None or source.model not in adapted:
            return source
        model, lora = adapted[source.model]
        return replace(source, model=model, lora=lora)

    return recipe if not adapted else replace(recipe, slices=_with_sources(recipe.slices, parted))


def with_cached_revisions(recipe: Recipe) -> Recipe:
    """The recipe with every model of a pinned revision replaced by its folder in the hub's cache, if it is there."""

    def found(source: Source) -> Source:
        place = None if source.revision is None else cached_model(source.model, source.revision)
        return source if place is None else replace(source, model=str(place), revision=None)

    return _renamed(recipe, found, lambda key: key)


def with_folders(recipe: Recipe, folder: Callable[[str], str]) -> Recipe:
    """The recipe with `folder` applied to every path of a model or adapter."""
    return _renamed(recipe, lambda source: source.moved(folder), folder)


def _renamed(recipe: Recipe, change: Callable[[Source], Source], unlisted: Callable[[str], str]) -> Recipe:
    """The recipe with `change` applied to every source and to references to it in bases and tokenizer; `unlisted` is applied to keys that are not sources."""
    keys = {source.key: change(source).key for source in recipe.sources}

    def key(old: str) -> str:
        return keys[old] if old in keys else unlisted(old)

    def optional(old: str | None) -> str | None:
        return None if old is None else key(old)

    return replace(
        recipe,
        slices=tuple(replace(part, base=optional(part.base)) for part in _with_sources(recipe.slices, change)),
        base=optional(recipe.base),
        tokenizer=None if recipe.tokenizer is None else recipe.tokenizer.with_keys(key),
    )


def _with_sources(slices: Sequence[Slice], change: Callable[[Source], Source]) -> tuple[Slice, ...]:
    return tuple(replace(part, sources=tuple(map(change, part.sources))) for part in slices)
