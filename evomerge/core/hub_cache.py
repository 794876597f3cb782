"""Models that the Hugging Face hub's own tools have downloaded to this machine. Asks no network and writes nothing."""

from pathlib import Path


def cached_model(name: str, revision: str | None = None) -> Path | None:
    """The folder of a hub model (`ORG/NAME`) in the cache of huggingface_hub; None where it is no such name or is not there.

    Args:
        name: the model.
        revision: a branch, tag or whole commit; default: main.
    """
    if name.count("/") != 1:
        return None
    from huggingface_hub import snapshot_download  # takes a fifth of a second to import, and most names are folders
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def model_name(folder: str) -> str:
    """What to call a model in a text for others: `ORG/NAME` where its folder is one of the cache, else the folder's last part."""
    path = Path(folder)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name
