"""Models in the local Hugging Face hub cache. Uses no network and writes nothing."""

from pathlib import Path


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model (`ORG/NAME`) in the cache of huggingface_hub; None if the name has another form or the model is not cached.

    Args:
        name: the model.
        revision: a branch, a tag, or a full commit hash; default: main.
    """
    if name.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download  # takes 0.2 s to import, and most names are folders
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def model_name(folder: str) -> str:
    """A model's name for texts that others read: `ORG/NAME` if its folder is in the hub cache, otherwise the name of the folder."""
    path = Path(folder)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
