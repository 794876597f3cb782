"""Everything in a merged model's folder except weights: config, tokenizer, generation settings, model card, recipe."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from evomerge.core import CheckpointError, Json, atomic_write_json, atomic_write_text
from evomerge.plan import PROCESSOR_TEMPLATE_FILE, TEMPLATE_FILE, file_inside
from evomerge.plan.model_folder import read_json_file
from evomerge.recipe import recipe_to_yaml
from evomerge.weights.checkpoint.merged_config import merged_config
from evomerge.weights.checkpoint.merged_model import RECIPE_FILE, MergedModel
from evomerge.weights.checkpoint.model_card import model_card

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
    TEMPLATE_FILE,
    PROCESSOR_TEMPLATE_FILE,
)

NAMES_CODE = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
"""files besides config.json whose `auto_map` may refer to Python files in the model's repository"""

CODE_FILES = ("*.py", "*.tiktoken")
"""such code, and the data files of tokenizers of that kind"""

MODEL_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")

_OBJECTS = (*NAMES_CODE, "generation_config.json")
"""files that are parsed and must be JSON objects"""


def check_model_files(owner: Path, *, with_tokenizer: bool) -> None:
    """Check before the merge that `write_model_files` can copy and read the owner's files.

    Raises:
        CheckpointError: a file is a link out of the folder, or should be a JSON object but is not.
    """
    for name in (*MODEL_FILES, *(TOKENIZER_FILES if with_tokenizer else ())):
        if (owner / name).exists():
            path = file_inside(owner, name)
            if name in _OBJECTS and not isinstance(read_json_file(path), Mapping):
                raise CheckpointError(f"{path}: expected a JSON object")


def write_model_files(folder: Path, name: str, model: MergedModel) -> None:
    """Write or copy the files into `folder`; config.json, without which no model can be loaded, comes last.

    Args:
        folder: the folder with the weights.
        name: of the merged model, for its card.
        model: the merge.

    Raises:
        CheckpointError: a file to be copied is a link out of its model's folder.
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
    if model.chat_template is not None:
        _write_chat_template(folder, model.chat_template)
    elif model.recipe.chat_template is not None:
        logger.warning("chat_template: auto: none of the models has a template, so none is written")
    text = recipe_to_yaml(model.file)
    atomic_write_text(folder / RECIPE_FILE, text)
    atomic_write_text(folder / "README.md", model_card(name, model, text))
    config = merged_config(model)
    _copy_code(model, folder, config)
    atomic_write_json(folder / "config.json", config)


def _copy_code(model: MergedModel, folder: Path, config: Mapping[str, Json]) -> None:
    """Copy the owner's Python files into `folder` if a file there, or `config`, refers to some; never runs them."""
    written = {name: read_json_file(folder / name) for name in NAMES_CODE if (folder / name).exists()} | {
        "config.json": config
    }
    naming = [name for name, content in written.items() if isinstance(content, Mapping) and content.get("auto_map")]
    if naming and not model.with_code:
        logger.warning(
            "%s: auto_map in %s refers to code in the model's repository, which is not copied; use --trust-remote-code to copy it",
            model.owner.folder, ", ".join(naming),
        )  # fmt: skip
    elif naming:
        found = (path.name for pattern in CODE_FILES for path in model.owner.folder.glob(pattern))
        _copy(model.owner.folder, tuple(sorted(found)), folder)


def _write_chat_template(folder: Path, text: str) -> None:
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        config = read_json_file(settings)
        if config.pop("chat_template", None) is not None:
            atomic_write_json(settings, config)
    (folder / PROCESSOR_TEMPLATE_FILE).unlink(missing_ok=True)  # processors would prefer this file
    atomic_write_text(folder / TEMPLATE_FILE, text)


def _copy(source: Path, names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        if (source / name).exists():
            shutil.copyfile(file_inside(source, name), folder / name)
