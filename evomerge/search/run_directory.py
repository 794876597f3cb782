"""A run directory: its files, and how they are written to."""

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
        """What goes on with the run, as a shell takes it."""
        return f"evomerge resume {shlex.quote(str(self.folder))}"

    def read_resolved(self) -> Resolved:
        """What the run was started with.

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
            raise JournalError(f"{self.resolved}: {where}{first['msg']}; it is damaged, or none of a run") from None

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
