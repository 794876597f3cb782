"""`resolved.json`: what a run was started with, and what its results depend on."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Checkout(_Record):
    """The git revision of the code, and whether the code differs from it."""

    revision: str
    dirty: bool


class RecordedSpace(_Record):
    """The search space: its fingerprint; and name, bounds and, of a categorical one, choices of every parameter."""

    fingerprint: str
    parameters: tuple[tuple[str, float, float] | tuple[str, float, float, tuple[str, ...]], ...]


class Resolved(_Record):
    """The content of the file; older runs lack what has a default.

    Attributes:
        config: the full configuration.
        given: the settings of `config.yaml`, by which edits are noticed.
        versions: package -> version, as of the last session.
        checkout: where evomerge ran from a git checkout, as of the last session.
        models: what recipes call a model -> fingerprint.
        tasks: file or name -> fingerprint.
        baselines: the user's own recipe -> fingerprint.
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
