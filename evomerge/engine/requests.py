"""Checks and groups requests before they reach an engine. Deals in token ids only."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from evomerge.core import EngineError
from evomerge.engine.base import GenerateRequest, LogLikelihoodRequest


@dataclass(slots=True)
class PromptGroup:
    """All requests whose context plus continuation, minus the last token, is the same sequence `prompt`.

    One forward pass over `prompt` answers them all: its positions give the log-probabilities of its own tokens, and its last
    position those of all the last tokens. The common case is multiple-choice answers that are one token long.

    Attributes:
        prompt: token ids.
        start: smallest context length of the members; the tokens of `prompt` from here on need a log-probability.
        last_tokens: the distinct last tokens, in order of appearance.
        members: (index of the request, its context length, its last token).
    """

    prompt: tuple[int, ...]
    start: int
    last_tokens: list[int] = field(default_factory=list)
    members: list[tuple[int, int, int]] = field(default_factory=list)


def group_by_prompt(requests: Sequence[LogLikelihoodRequest]) -> list[PromptGroup]:
    """Group requests that one forward pass can answer, in order of first appearance."""
    groups: dict[tuple[int, ...], PromptGroup] = {}
    for index, request in enumerate(requests):
        prompt = request.context + request.continuation[:-1]
        start, last = len(request.context), request.continuation[-1]
        group = groups.get(prompt)
        if group is None:
            group = groups[prompt] = PromptGroup(prompt, start)
        group.start = min(group.start, start)
        if last not in group.last_tokens:
            group.last_tokens.append(last)
        group.members.append((index, start, last))
    return list(groups.values())


def check_loglikelihood(requests: Sequence[LogLikelihoodRequest], *, max_length: int, vocab_size: int) -> None:
    """Validate requests to `Engine.loglikelihood`.

    Raises:
        EngineError: an empty part, a sequence longer than `max_length`, or a token outside the vocabulary.
    """
    checked: tuple[int, ...] = ()
    for index, request in enumerate(requests):
        if not request.context or not request.continuation:
            part = "context" if not request.context else "continuation"
            raise EngineError(f"log-likelihood request {index}: the {part} is empty; it must have at least one token")
        length = len(request.context) + len(request.continuation)
        if length > max_length:
            raise EngineError(
                f"log-likelihood request {index} has {length} tokens (context {len(request.context)}, continuation "
                f"{len(request.continuation)}), but the engine takes at most {max_length}; raise max_model_len or shorten the item"
            )
        if request.context is not checked:  # the choices of an item share one context, which may be long
            checked = request.context
            _check_tokens(f"log-likelihood request {index}", checked, vocab_size)
        _check_tokens(f"log-likelihood request {index}", request.continuation, vocab_size)


def check_generate(requests: Sequence[GenerateRequest], *, max_length: int, vocab_size: int) -> None:
    """Validate requests to `Engine.generate`.

    Raises:
        EngineError: an empty prompt, no room for a new token within `max_length`, `max_tokens` below 1, an empty stop string, or
            a token outside the vocabulary.
    """
    for index, request in enumerate(requests):
        if not request.prompt:
            raise EngineError(f"generation request {index}: the prompt is empty; it must have at least one token")
        if request.max_tokens < 1:
            raise EngineError(f"generation request {index}: max_tokens must be at least 1, got {request.max_tokens}")
        if "" in request.stop:
            raise EngineError(f"generation request {index}: an empty stop string would end every text at once")
        if len(request.prompt) >= max_length:
            raise EngineError(
                f"generation request {index} has {len(request.prompt)} prompt tokens, which leaves no room within the engine's "
                f"{max_length}; raise max_model_len or shorten the item"
            )
        _check_tokens(f"generation request {index}", request.prompt, vocab_size)


def _check_tokens(what: str, tokens: Iterable[int], vocab_size: int) -> None:
    if not min(tokens, default=0) >= 0 or not max(tokens, default=0) < vocab_size:
        outside = next(token for token in tokens if not 0 <= token < vocab_size)
        raise EngineError(
            f"{what}: token id {outside} is outside the model's vocabulary of {vocab_size}; does the tokenizer belong to the model?"
        )
