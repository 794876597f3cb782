"""The engine protocol: an inference engine whose weights are replaced in place.

Knows tokens and log-probabilities; knows nothing of tasks, text or merging.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Protocol

from evomerge.core import Json
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
    """Greedy continuation of `prompt` (token ids), at most `max_tokens` new tokens, up to the end of text or the first of `stop` (strings).

    Of strings that are complete at the same token the first in `stop` counts, as in lm-eval: `("b", "ab")` leaves the a of "ab". A special token
    whose own text holds one (`<|im_end|>`) ends the text too.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """Text without the stop string, the token that ended it and special tokens, and the number of tokens that were generated."""

    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class RemoteWrite:
    """A weight update as data, which an engine's own processes can each carry out on what they hold.

    Attributes:
        function: `package.module:name`, called with the settings and the process's `WeightTarget`.
        settings: what to write; JSON.
    """

    function: str
    settings: Mapping[str, Json]

    def __call__(self, target: WeightTarget) -> None:
        """Carries it out here."""
        resolve_name(self.function)(self.settings, target)


class Engine(Protocol):
    """A running model. Not thread-safe. Order of the answers is the order of the requests."""

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt + continuation) in tokens."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are spread over processes of their own."""
        ...

    def update(self, write: Callable[[WeightTarget], None]) -> None:
        """Replaces the weights: calls `write` with the live parameters, then forgets every cached prefix.

        An engine whose weights are spread over processes takes a `RemoteWrite` only, and calls it in each of them.

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
