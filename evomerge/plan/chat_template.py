"""Reads the chat template of a model folder as text. It is Jinja code, which is never rendered here."""

from pathlib import Path
from typing import Any

from evomerge.core import CheckpointError, why_unreadable
from evomerge.plan.model_folder import file_inside, read_json_file
from evomerge.plan.model_header import ModelHeader

TEMPLATE_FILE = "chat_template.jinja"
PROCESSOR_TEMPLATE_FILE = "chat_template.json"
"""where older processors, such as those of image models, keep it"""


def chat_template_of(header: ModelHeader) -> str | None:
    """A model's own template, wherever its tokenizer or processor keeps it; None if it has none.

    Raises:
        CheckpointError: a file cannot be read, or is outside the folder.
    """
    if (header.folder / TEMPLATE_FILE).exists():
        return _text(file_inside(header.folder, TEMPLATE_FILE))
    kept = (_kept_in(header, name) for name in ("tokenizer_config.json", PROCESSOR_TEMPLATE_FILE))
    return next((template for template in kept if template is not None), None)


def _kept_in(header: ModelHeader, name: str) -> str | None:
    """The template under `chat_template` of a JSON file."""
    if not (header.folder / name).exists():
        return None
    config: Any = read_json_file(file_inside(header.folder, name))
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    return template if isinstance(template, str) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise CheckpointError(f"{path}: {why_unreadable(problem)}") from None
