"""The schema of `resolved.json`: the configuration that a run was started with, and what its results depend on."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Checkout(_Record):
    """The git revision of the code, and whether the code differs from it."""

    revision: str
    dirty: bool


class RecordedSpace(_Record):
    """The search space: its fingerprint, and the name, bounds and (if categorical) choices of every parameter."""

    fingerprint: str
    parameters: tuple[tuple[str, float, float] | tuple[str, float, float, tuple[str, ...]], ...]


class Resolved(_Record):
    """The content of the file. Fields with a default may be missing in older runs.

    Attributes:
        config: the full configuration.
        given: the settings in `config.yaml`, to notice edits.
        versions: package -> version, in the last session.
        checkout: the git checkout that evomerge ran from in the last session, if any.
        models: model name in recipes -> fingerprint.
        tasks: file or name -> fingerprint.
        baselines: name of the user's own recipe -> fingerprint.
        space: the search space.
    """

    config: dict[str, Any]
    given: dict[str, Any] = {}
    versions: dict[str, str] = {}
    checkout: Checkout | None = None
    models: dict[str, str] = {}
    tasks: dict[str, str] = {}
    baselines: dict[str, str] = {}
    space: RecordedSpace
