"""Checks whether models assign the same ids to tokens. Reads their tokenizer.json without loading a tokenizer."""

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path

from evomerge.plan.merge_plan import MergePlan
from evomerge.plan.model_header import ModelHeader, is_embedding, is_head

_FILE = "tokenizer.json"

_SHOWN = 3
"""maximum number of tokens named in a message"""


def other_tokens(headers: Mapping[str, ModelHeader], plan: MergePlan) -> str | None:
    """A message if models assign other ids to tokens than the first model, whose tokenizer is used: their rows belong to other tokens.

    Tokens that only one of the two has are ignored: fine-tuned models often have more. None if no ids differ or the files do not tell.

    Args:
        headers: key -> model; first the one whose tokenizer is used.
        plan: of the merge; models that contribute neither embedding nor output layer are ignored.
    """
    (first, reference), *others = headers.items()
    rows = {
        entry.source
        for step in plan.steps
        if is_embedding(step.output) or is_head(step.output)
        for entry in step.sources
    }
    found = []
    for key, header in others:
        if key not in rows:
            continue
        moved = _moved(reference.folder / _FILE, header.folder / _FILE)
        if moved:
            shown = ", ".join(map(repr, moved[:_SHOWN])) + (", ..." if len(moved) > _SHOWN else "")
            found.append(f"{key} has different ids for {len(moved)} token{'s' if len(moved) > 1 else ''} ({shown})")
    if not found:
        return None
    return f"the models' tokenizers differ from that of {first}, which is used for all: {'; '.join(found)}; rows of different tokens will be merged or used for the wrong token"


def _moved(reference: Path, other: Path) -> list[str]:
    """Tokens that both tokenizers have with different ids."""
    if not reference.is_file() or not other.is_file() or filecmp.cmp(reference, other, shallow=False):
        return []
    known = _ids(reference)
    return [token for token, number in _ids(other).items() if known.get(token, number) != number]


def _ids(path: Path) -> dict[str, object]:
    """Token -> id; empty if the file is not in the format of `tokenizers`, which loading it will report."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids: dict[str, object] = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    if isinstance(vocabulary, list):  # Unigram's, of (token, score)
        ids = {entry[0]: number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens") if isinstance(content, dict) else None
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            ids[entry["content"]] = entry.get("id")
    return ids
