"""The README.md of a merged model."""

from collections.abc import Mapping

from evomerge.core import model_name
from evomerge.recipe import method_spec
from evomerge.weights.checkpoint.merged_model import RECIPE_FILE, MergedModel


def model_card(name: str, model: MergedModel, recipe_text: str) -> str:
    """The README.md of a merged model; models are named by the last part of their folder, or by their hub name if they are in the hub's cache."""
    recipes = [*model.file.named.values(), model.file.final]
    methods = ", then ".join(f"`{recipe.method}` ({method_spec(recipe.method).paper})" for recipe in recipes)
    sources = [recipe.source(key) for recipe in recipes for key in recipe.models()]
    merged = [model.recipe.source(key) for key in model.recipe.models()]  # folders of models that were merged first
    folders = {source.model: model_name(source.model) for source in (*sources, *merged)}
    folders |= {source.lora: model_name(source.lora) for source in sources if source.lora is not None}
    lenders = {key for recipe in recipes if recipe.tokenizer is not None for key in recipe.tokenizer.models()}
    folders |= {folder: model_name(folder) for folder in lenders - {source.key for source in sources}}
    listed = dict.fromkeys(
        f"- {folders[source.model]}" + (f" with adapter {folders[source.lora]}" if source.lora is not None else "")
        for source in sources
        if source.model not in model.file.named
    )
    shown = _with_names(recipe_text[: recipe_text.rindex("# evomerge-recipe: ")], folders)
    beware = "" if model.warning is None else f"**Beware**: {_with_names(model.warning, folders)}.\n\n"
    return (
        "---\nlibrary_name: transformers\ntags:\n- merge\n- evomerge\n---\n"
        f"# {name}\n\n{beware}Merged by evomerge with {methods} from:\n\n{chr(10).join(listed)}\n\n"
        f"```yaml\n{shown}```\n\n`{RECIPE_FILE}` contains the complete recipe, fingerprint {model.file.final.fingerprint()}.\n"
    )


def _with_names(text: str, folders: Mapping[str, str]) -> str:
    """`text` with every folder replaced by its name; nested folders are replaced before their parents."""
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder, folders[folder])
    return text
