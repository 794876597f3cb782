"""Models that the Hugging Face hub's own tools have downloaded to this machine. Asks no network and writes nothing."""

import os
import re
from pathlib import Path

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_REVISION = re.compile(r"[\w-][\w.-]*")


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model (`ORG/NAME`) in the cache of huggingface_hub; None where it is no such name or is not there.

    Follows huggingface_hub's layout, `models--ORG--NAME/snapshots/<commit>` with `refs/<branch or tag>` naming commits, and its variables
    HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME.

    Args:
        name: the model.
        revision: a branch, tag or whole commit; default: main.
    """
    wanted = revision or "main"
    if not _REPOSITORY.fullmatch(name) or not _REVISION.fullmatch(wanted):
        return None
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    folder = cache / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / wanted
    commit = reference.read_text(encoding="ascii", errors="replace").strip() if reference.is_file() else wanted
    snapshot = folder / "snapshots" / commit
    return snapshot if _REVISION.fullmatch(commit) and snapshot.is_dir() else None


def model_name(folder: str) -> str:
    """What to call a model in a text for others: `ORG/NAME` where its folder is one of the cache, else the folder's last part."""
    path = Path(folder)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
