"""The engine protocol: an inference engine whose weights are replaced in place.

Knows tokens and log-probabilities; knows nothing of tasks, text or merging.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from evomerge.plan import WeightTarget


@dataclass(frozen=True, slots=True)
class LogLikelihoodRequest:
    """Score `continuation` after `context`; both are token ids, neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Sum of the continuation's log-probabilities (natural log), and whether greedy decoding would produce exactly it."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Greedy continuation of `prompt` (token ids), at most `max_tokens` new tokens, cut before the first of `stop` (strings) or at end of text."""

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """Text without the stop string and without special tokens, and the number of tokens that were generated."""

    text: str
    n_tokens: int


class Engine(Protocol):
    """A running model. Not thread-safe. Order of the answers is the order of the requests."""

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt + continuation) in tokens."""
        ...

    def update(self, write: Callable[[WeightTarget], None]) -> None:
        """Replaces the weights: calls `write` with the live parameters, then forgets every cached prefix.

        Raises:
            EngineError: the weights could not be taken; the engine must then be updated again before it is used.
        """
        ...

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        """Raises EngineError on a request longer than `max_length` or a NaN log-probability."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Raises EngineError on a prompt that leaves no room within `max_length`."""
        ...

    def close(self) -> None:
        """Frees the engine; further calls are errors."""
        ...
