"""The run directory and its files."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from evomerge.core import JournalError
from evomerge.search.resolved import Resolved


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
        """The shell command that continues the run."""
        return f"evomerge resume {shlex.quote(str(self.folder))}"

    def read_resolved(self) -> Resolved:
        """Read `resolved.json`.

        Raises:
            JournalError: this is not a run directory, or the file is damaged.
        """
        try:
            return Resolved.model_validate_json(self.resolved.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise JournalError(f"{self.folder}: not a run directory (no {self.resolved.name} in it)") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise JournalError(
                f"{self.resolved}: {where}{first['msg']}; the file is damaged or does not belong to a run"
            ) from None

    def check_journal(self) -> None:
        """Check that the journal is not lost; a run that was stopped while it was starting has none yet.

        Raises:
            JournalError: there are results but no journal.
        """
        if not self.journal.exists() and (self.front_json.exists() or any(self.folder.glob("items.*"))):
            raise JournalError(
                f"{self.journal}: is missing, and the run cannot be read without it; restore it from a backup"
            )


@contextmanager
def writing_into(directory: RunDirectory) -> Iterator[None]:
    """Convert errors of the operating system, such as a full or read-only disk, to `JournalError`."""
    try:
        yield
    except OSError as problem:
        raise JournalError(
            f"{directory.folder}: cannot be written to ({problem.strerror}); every finished evaluation is saved. Fix the cause and resume the run"
        ) from problem
