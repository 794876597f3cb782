"""Whether an engine may be used: it must be open, and its last update must have succeeded."""

from collections.abc import Iterator
from contextlib import contextmanager

from evomerge.core import EngineError


class Usable:
    """State of an engine: usable, being updated (unusable if that fails), or closed."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._closed = False
        self._stale: str | None = None

    def check(self) -> None:
        """Raise EngineError unless the engine is open and its weights are complete."""
        self.check_open()
        if self._stale is not None:
            raise EngineError(f"{self._name}: {self._stale}; update it with complete weights first")

    def check_open(self) -> None:
        """Raise EngineError if the engine was closed."""
        if self._closed:
            raise EngineError(f"{self._name}: the engine is closed")

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Wrap an update: if it raises, the engine is unusable until an update succeeds."""
        self.check_open()
        self._stale = "its last weight update failed halfway"
        yield
        self._stale = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Wrap a batch of requests: if it raises, the engine may still hold some of them, so it is unusable until the next update."""
        self._stale = "its last batch of requests failed"
        yield
        self._stale = None

    def close(self) -> bool:
        """Mark the engine as closed; return True the first time."""
        was_open = not self._closed
        self._closed = True
        return was_open
