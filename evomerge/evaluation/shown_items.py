"""The prompts and answers of a model as text, for display only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.engine import Engine
from evomerge.evaluation.items import Items


@dataclass(frozen=True, slots=True)
class ShownItem:
    """One item of a task.

    Attributes:
        number: its index among the task's items.
        prompt: the text the model read, with special tokens.
        answers: the text it generated, or each continuation it scored with its log-probability.
        target: the right answer; None for later items of a sandboxed task, whose sandbox sends only the first ones.
    """

    number: int
    prompt: str
    answers: tuple[str, ...]
    target: str | None


def show_items(items: Items, count: int, engine: Engine, decode: Callable[[Sequence[int]], str]) -> list[ShownItem]:
    """The first `count` items, answered by the model that is currently in the engine.

    Raises:
        EngineError: the engine fails.
    """
    counts = list(items.counts)[:count]
    n_requests = sum(counts)
    if items.generations:
        prompts = [decode(request.prompt) for request in items.generations[:n_requests]]
        texts = [answer.text for answer in engine.generate(items.generations[:n_requests])]
    else:
        requests = items.likelihoods[:n_requests]
        prompts = [decode(request.context) for request in requests]
        texts = [
            f"{decode(request.continuation)!r} {answer.log_probability:.2f}"
            for request, answer in zip(requests, engine.loglikelihood(requests), strict=True)
        ]
    shown, start = [], 0
    for number, size in enumerate(counts):
        prompt = prompts[start] if size else ""
        shown.append(ShownItem(number, prompt, tuple(texts[start : start + size]), items.target(number)))
        start += size
    return shown
