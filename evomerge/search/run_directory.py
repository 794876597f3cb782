"""A run directory: its files, and how they are written to."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evomerge.core import JournalError


class RunDirectory:
    """Paths of the files of one run; see docs/run-directory.md for what each holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "config.yaml"
        self.resolved = folder / "resolved.json"
        self.models = folder / "models.json"
        self.journal = folder / "journal.jsonl"
        self.front_json = folder / "front.json"
        self.front_csv = folder / "front.csv"
        self.best = folder / "best.yaml"
        self.summary = folder / "summary.json"
        self.logs = folder / "logs"

    @property
    def exists(self) -> bool:
        """Whether a run has been started here."""
        return self.journal.exists() or self.resolved.exists()

    @property
    def resume_command(self) -> str:
        """What goes on with the run, as a shell takes it."""
        return f"evomerge resume {shlex.quote(str(self.folder))}"

    def read_resolved(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            JournalError: this is not a run directory.
        """
        try:
            value = json.loads(self.resolved.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise JournalError(f"{self.folder}: not a run directory (no {self.resolved.name} in it)") from None
        except ValueError as problem:
            raise JournalError(f"{self.resolved}: not readable: {problem}") from None
        if not isinstance(value, dict) or not isinstance(value.get("config"), dict):
            raise JournalError(f"{self.resolved}: has no configuration in it, so it is damaged or none of a run")
        return value

    def check_journal(self) -> None:
        """A run that was stopped while it started has no journal yet; with results and without a journal something is lost.

        Raises:
            JournalError: it is.
        """
        if not self.journal.exists() and (self.front_json.exists() or any(self.folder.glob("items.*"))):
            raise JournalError(
                f"{self.journal}: is missing, and nothing can be told of a run without it; restore it from a backup"
            )


@contextmanager
def writing_into(directory: RunDirectory) -> Iterator[None]:
    """Turns what the operating system says about a full or read-only disk into a `JournalError`."""
    try:
        yield
    except OSError as problem:
        raise JournalError(
            f"{directory.folder}: cannot be written to ({problem.strerror}); nothing finished is lost. Mend that and resume the run"
        ) from problem
