"""The engine protocol: an inference engine whose weights are replaced in place.

Deals in tokens and log-probabilities; knows nothing of tasks, text or merging.
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
    """Sum of the continuation's log-probabilities (natural log), and whether greedy decoding would produce exactly this continuation."""

    log_probability: float
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Greedy continuation of `prompt` (token ids): at most `max_tokens` new tokens, up to the end of text or the first string of `stop`.

    If several stop strings are completed by the same token, the one listed first in `stop` applies, as in lm-eval: `("b", "ab")` leaves the
    "a" of "ab". Stop strings are looked for in the text with and without special tokens (`<|im_end|>`).
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """The text, without the stop string, the token that ended it and special tokens, and the number of generated tokens."""

    text: str
    n_tokens: int


@dataclass(frozen=True, slots=True)
class RemoteWrite:
    """A serialisable weight update, which each process of an engine can apply to its own shard.

    Attributes:
        function: `package.module:name`, called with the settings and the process's `WeightTarget`.
        settings: what to write; JSON.
    """

    function: str
    settings: Mapping[str, Json]

    def __call__(self, target: WeightTarget) -> None:
        """Apply the update to `target` in this process."""
        resolve_name(self.function)(self.settings, target)


class Engine(Protocol):
    """A running model. Not thread-safe. Answers come in the order of the requests."""

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt + continuation) in tokens."""
        ...

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded over worker processes."""
        ...

    def update(self, write: Callable[[WeightTarget], None]) -> None:
        """Replace the weights: call `write` with the live parameters, then drop every cached prefix.

        A sharded engine accepts only a `RemoteWrite`, which it calls in each worker process.

        Raises:
            EngineError: the update failed; the engine must be updated again before it is used.
        """
        ...

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        """Raise EngineError on a request longer than `max_length` or a NaN log-probability."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        """Raise EngineError on a prompt that leaves no room within `max_length`."""
        ...

    def close(self) -> None:
        """Free the engine; any later call is an error."""
        ...
