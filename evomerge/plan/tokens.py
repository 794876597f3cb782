"""Whether models mean the same tokens by the rows of their embeddings. Reads their tokenizer.json, and loads no tokenizer."""

import filecmp
import json
from collections.abc import Mapping
from pathlib import Path

from evomerge.plan.merge_plan import MergePlan
from evomerge.plan.model_header import ModelHeader, is_embedding, is_head

_FILE = "tokenizer.json"

_SHOWN = 3
"""tokens that a message names"""


def other_tokens(headers: Mapping[str, ModelHeader], plan: MergePlan) -> str | None:
    """What to say where models give tokens other ids than the first one does, whose tokenizer is used: their rows are those of other tokens.

    Tokens that only one of them has do not count: fine-tuned models often have more. None where no ids differ, or files cannot tell.

    Args:
        headers: key -> model, the one whose tokenizer is used first.
        plan: of the merge; models that give neither embedding nor output layer do not count.
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
            found.append(f"{key} gives {len(moved)} token{'s' if len(moved) > 1 else ''} other ids ({shown})")
    if not found:
        return None
    return f"the models' tokenizers differ from that of {first}, which is used for all: {'; '.join(found)}; rows of different tokens are merged, or stand for others"


def _moved(reference: Path, other: Path) -> list[str]:
    """Tokens that both tokenizers have, under different ids."""
    if not reference.is_file() or not other.is_file() or filecmp.cmp(reference, other, shallow=False):
        return []
    known = _ids(reference)
    return [token for token, number in _ids(other).items() if known.get(token, number) != number]


def _ids(path: Path) -> dict[str, object]:
    """Token -> id; nothing where the file is none of `tokenizers`, which whoever loads it will say."""
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
