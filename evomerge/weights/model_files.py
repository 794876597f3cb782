"""Everything in a merged model's folder that is not a weight: config, tokenizer, generation settings, model card, recipe."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.core import Json, RecipeError, atomic_write_json, atomic_write_text
from evomerge.plan import MergePlan, ModelHeader, file_inside
from evomerge.recipe import Recipe, method_spec, recipe_to_yaml

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

MODEL_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")

RECIPE_FILE = "recipe.yaml"


def write_model_files(
    folder: Path, name: str, recipe: Recipe, plan: MergePlan, headers: Mapping[str, ModelHeader]
) -> None:
    """Writes or copies them into `folder`.

    Args:
        folder: where the weights are.
        name: of the merged model, for its card.
        recipe, plan, headers: what was merged.

    Raises:
        RecipeError: the recipe takes the tokenizer from a model that is not among `headers`.
        CheckpointError: a file to be copied is a link that leaves its model's folder.
    """
    owner = headers[recipe.models()[0]]
    donor_key = recipe.tokenizer_source or recipe.models()[0]
    if donor_key not in headers:
        raise RecipeError(f"tokenizer_source {donor_key} is none of the recipe's models: {', '.join(headers)}")
    atomic_write_json(folder / "config.json", merged_config(recipe, plan, owner))
    _copy(headers[donor_key].folder, TOKENIZER_FILES, folder)
    _copy(owner.folder, MODEL_FILES, folder)
    text = recipe_to_yaml(recipe)
    atomic_write_text(folder / RECIPE_FILE, text)
    atomic_write_text(folder / "README.md", model_card(name, recipe, text))


def merged_config(recipe: Recipe, plan: MergePlan, owner: ModelHeader) -> dict[str, Json]:
    """The owner's config with the result's dtype and layers."""
    config: dict[str, Any] = {key: value for key, value in owner.config.items() if key != "_name_or_path"}
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = plan.dtype
    if recipe.whole_model:
        return config
    return with_layers(config, owner.n_layers, _layers_of(recipe))


def with_layers(config: Mapping[str, Json], n_layers: int, layers: Sequence[int]) -> dict[str, Json]:
    """`config`, of a model with `n_layers`, for one whose layers are `layers` of it."""
    changed: dict[str, Any] = dict(config)
    inner = changed.get("text_config")
    if isinstance(inner, Mapping):
        changed["text_config"] = with_layers(inner, n_layers, layers)
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and isinstance(value, int):
            changed[key] = len(layers)
        elif isinstance(value, list) and len(value) == n_layers and key.startswith("layer"):
            changed[key] = [value[layer] for layer in layers]  # e.g. layer_types: one entry a layer
    return changed


def _layers_of(recipe: Recipe) -> list[int]:
    """For each output layer, the layer of the base (where it is listed, else of the first source) it comes from."""
    layers: list[int] = []
    for piece in recipe.slices:
        chosen = next((source for source in piece.sources if source.key == recipe.base), piece.sources[0])
        layers.extend(range(*(chosen.layer_range or (0, 0))))
    return layers


def _copy(source: Path, names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(file_inside(source, name), folder / name)


def model_card(name: str, recipe: Recipe, recipe_text: str) -> str:
    """The README.md of a merged model; models are named by their folders' last part."""
    spec = method_spec(recipe.method)
    models = [Path(key).name for key in recipe.models()]
    listed = "\n".join(f"- {model}" for model in models)
    shown = recipe_text[: recipe_text.rindex("# evomerge-recipe: ")]
    for key in sorted(recipe.models(), key=len, reverse=True):
        shown = shown.replace(key, Path(key).name)
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- evomerge\n---\n"
        f"# {name}\n\nMerged by evomerge with `{recipe.method}` ({spec.paper}) from:\n\n{listed}\n\n"
        f"```yaml\n{shown}```\n\n`{RECIPE_FILE}` holds the complete recipe, fingerprint {recipe.fingerprint()}.\n"
    )
