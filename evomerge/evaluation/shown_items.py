"""What a model was asked and what it said, in text: to be looked at, not scored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.engine import Engine
from evomerge.evaluation.items import Items


@dataclass(frozen=True, slots=True)
class ShownItem:
    """One item of a task.

    Attributes:
        number: its place among the task's items.
        prompt: what the model read, with the special tokens.
        answers: what it wrote; or every continuation it was asked about, with its log-probability.
        target: the right answer; None for items far down in a task with code of its own, whose sandbox tells only the first.
    """

    number: int
    prompt: str
    answers: tuple[str, ...]
    target: str | None


def show_items(items: Items, count: int, engine: Engine, decode: Callable[[Sequence[int]], str]) -> list[ShownItem]:
    """The first `count` items, answered by the model that is in the engine now.

    Raises:
        EngineError: as the engine.
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
