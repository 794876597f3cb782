"""Everything in a merged model's folder that is not a weight: config, tokenizer, generation settings, model card, recipe."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.core import Json, atomic_write_json, atomic_write_text, model_name
from evomerge.plan import TEMPLATE_FILE, MergePlan, ModelHeader, file_inside
from evomerge.plan.layer_kinds import listed_kinds
from evomerge.plan.model_folder import read_json_file
from evomerge.plan.model_header import N_LAYERS_KEYS
from evomerge.recipe import Recipe, RecipeFile, method_spec, recipe_to_yaml
from evomerge.weights.chat_templates import chosen_template
from evomerge.weights.vocabulary import Alignment

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

NAMES_CODE = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""files beside config.json whose `auto_map` may name Python files of the model's repository"""

CODE_FILES = ("*.py", "*.tiktoken")
"""such code, and what tokenizers of that kind read"""

MODEL_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, eq=False)
class MergedModel:
    """What was merged.

    Attributes:
        file: what its recipe file and card say.
        recipe: the merge itself, with models that are folders.
        plan, headers: of the merge.
        alignment: the vocabulary; None = the base's.
        warning: of models that are no relatives of the others.
        with_code: whether Python files that the model names are copied too.
    """

    file: RecipeFile
    recipe: Recipe
    plan: MergePlan
    headers: Mapping[str, ModelHeader]
    alignment: Alignment | None
    warning: str | None
    with_code: bool = False

    @property
    def owner(self) -> ModelHeader:
        """The model that lends config and generation settings."""
        return self.headers[self.recipe.models()[0]]


def write_model_files(folder: Path, name: str, model: MergedModel) -> None:
    """Writes or copies them into `folder`; config.json, without which nothing loads a model, comes last.

    Args:
        folder: where the weights are.
        name: of the merged model, for its card.
        model: what was merged.

    Raises:
        RecipeError: the chat template is no template.
        CheckpointError: a file to be copied is a link that leaves its model's folder.
    """
    _copy(model.owner.folder, MODEL_FILES, folder)
    if model.alignment is None:
        _copy(model.owner.folder, TOKENIZER_FILES, folder)
    else:
        tokenizer = model.alignment.tokenizer
        tokenizer.write(folder)
        generation = folder / "generation_config.json"
        if generation.exists():
            atomic_write_json(generation, tokenizer.translated(read_json_file(generation)))
    if model.recipe.chat_template is not None:
        _write_chat_template(folder, model.recipe.chat_template, model.headers)
    text = recipe_to_yaml(model.file)
    atomic_write_text(folder / RECIPE_FILE, text)
    atomic_write_text(folder / "README.md", model_card(name, model, text))
    config = merged_config(model)
    _copy_code(model, folder, config)
    atomic_write_json(folder / "config.json", config)


def _copy_code(model: MergedModel, folder: Path, config: Mapping[str, Json]) -> None:
    """Copies the owner's Python files into `folder` where a file there, or `config`, names some; never runs them."""
    written = {name: read_json_file(folder / name) for name in NAMES_CODE if (folder / name).exists()} | {
        "config.json": config
    }
    naming = [name for name, content in written.items() if isinstance(content, Mapping) and content.get("auto_map")]
    if naming and not model.with_code:
        logger.warning(
            "%s: auto_map in %s names code of the model's repository, which is not copied; --trust-remote-code copies it",
            model.owner.folder, ", ".join(naming),
        )  # fmt: skip
    elif naming:
        found = (path.name for pattern in CODE_FILES for path in model.owner.folder.glob(pattern))
        _copy(model.owner.folder, tuple(sorted(found)), folder)


def _write_chat_template(folder: Path, wanted: str, headers: Mapping[str, ModelHeader]) -> None:
    text = chosen_template(wanted, headers)
    if text is None:
        logger.warning("chat_template: auto: none of the models has a template, so none is written")
        return
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        config = read_json_file(settings)
        if config.pop("chat_template", None) is not None:
            atomic_write_json(settings, config)
    atomic_write_text(folder / TEMPLATE_FILE, text)


def merged_config(model: MergedModel) -> dict[str, Json]:
    """The owner's config with the result's dtype, layers and vocabulary."""
    recipe, plan, owner = model.recipe, model.plan, model.owner
    config: dict[str, Any] = {key: value for key, value in owner.config.items() if key != "_name_or_path"}
    if "torch_dtype" not in config:
        config.setdefault("dtype", plan.dtype)
    config = _with_dtype(config, plan.dtype)
    if owner.copied_head is not None:
        config["tie_word_embeddings"] = True
    if model.alignment is not None:
        config = _with_vocabulary(config, model.alignment)
    layers = _layers_of(recipe)
    if not layers:
        return config
    return with_layers(config, [layer for _, layer in layers], [model.headers[key].config for key, _ in layers])


def _with_dtype(config: Mapping[str, Json], dtype: str) -> dict[str, Any]:
    """The config with another dtype wherever it says one, in those of parts (`text_config`) too."""
    return {
        key: dtype
        if key in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def _with_vocabulary(config: Mapping[str, Json], alignment: Alignment) -> dict[str, Any]:
    changed: dict[str, Any] = alignment.tokenizer.translated(config)
    if "vocab_size" in changed:
        changed["vocab_size"] = alignment.n_rows
    inner = changed.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = _with_vocabulary(inner, alignment)
    return changed


def with_layers(
    config: Mapping[str, Json], layers: Sequence[int], sources: Sequence[Mapping[str, Json]] | None = None
) -> dict[str, Json]:
    """`config` for a model with other layers.

    Args:
        config: what is changed.
        layers: which layer each one is, of the model whose config stands at the same place in `sources`.
        sources: None = all of `config` itself.
    """
    sources = sources or [config] * len(layers)
    changed: dict[str, Any] = dict(config)
    inner = changed.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = with_layers(inner, layers, [_inner(source) for source in sources])
    for key in N_LAYERS_KEYS:
        if isinstance(config.get(key), int):
            changed[key] = len(layers)
    kinds_of = {id(source): listed_kinds(source) for source in sources}
    for key, own in listed_kinds(config).items():
        # a model that lists no kinds has layers of the kind that the owner's have there
        changed[key] = [
            kinds_of[id(source)][key][layer] if key in kinds_of[id(source)] else own[min(layer, len(own) - 1)]
            for source, layer in zip(sources, layers, strict=True)
        ]
    return changed


def _inner(config: Mapping[str, Json]) -> Mapping[str, Json]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _layers_of(recipe: Recipe) -> list[tuple[str, int]]:
    """For each layer made by slices, the model (the base where it is listed, else the first source) and layer it comes from."""
    layers: list[tuple[str, int]] = []
    for piece in recipe.slices:
        chosen = next((source for source in piece.sources if source.key == recipe.base), piece.sources[0])
        layers.extend((chosen.key, layer) for layer in range(*(chosen.layer_range or (0, 0))))
    return layers


def _copy(source: Path, names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(file_inside(source, name), folder / name)


def model_card(name: str, model: MergedModel, recipe_text: str) -> str:
    """The README.md of a merged model; models are named by their folders' last part, those of the hub's cache as there."""
    recipes = [*model.file.named.values(), model.file.final]
    methods = ", then ".join(f"`{recipe.method}` ({method_spec(recipe.method).paper})" for recipe in recipes)
    sources = [recipe.source(key) for recipe in recipes for key in recipe.models()]
    folders = {source.model: model_name(source.model) for source in sources}
    folders |= {source.lora: model_name(source.lora) for source in sources if source.lora is not None}
    lenders = {key for recipe in recipes if recipe.tokenizer is not None for key in recipe.tokenizer.models()}
    folders |= {folder: model_name(folder) for folder in lenders - {source.key for source in sources}}
    listed = dict.fromkeys(
        f"- {folders[source.model]}" + (f" with adapter {folders[source.lora]}" if source.lora is not None else "")
        for source in sources
        if source.model not in model.file.named
    )
    shown = recipe_text[: recipe_text.rindex("# evomerge-recipe: ")]
    for folder in sorted(folders, key=len, reverse=True):
        shown = shown.replace(folder, folders[folder])
    warning = model.warning
    for folder in sorted(folders, key=len, reverse=True):
        warning = None if warning is None else warning.replace(folder, folders[folder])
    beware = "" if warning is None else f"**Beware**: {warning}.\n\n"
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- evomerge\n---\n"
        f"# {name}\n\n{beware}Merged by evomerge with {methods} from:\n\n{chr(10).join(listed)}\n\n"
        f"```yaml\n{shown}```\n\n`{RECIPE_FILE}` holds the complete recipe, fingerprint {model.file.final.fingerprint()}.\n"
    )
