"""A live engine and freshly started ones, for checks of any engine, ours or a plugin's.

`EngineSuite` starts the engine on tiny random Llamas and collects the answers of freshly started engines for several weight sets; each
function of `evomerge.testing.engine_checks.CHECKS` compares a live engine, whose weights are replaced in place, with them:

    @pytest.fixture(scope="module", params=[True, False])
    def suite(request, tmp_path_factory):
        suite = EngineSuite(MyEngine, tmp_path_factory.mktemp("models"), tied=request.param)
        yield suite
        suite.close()

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(suite, check):
        check(suite)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isclose
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from evomerge.core import random_stream
from evomerge.engine import Engine, GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest, RemoteWrite
from evomerge.plan import WeightTarget
from evomerge.testing.engine_writers import write_tensors
from evomerge.testing.tiny_models import write_tiny_llama

MAX_LENGTH = 448
VOCAB = 99
"""Number of the tokenizer's characters and special tokens; not a multiple of 64, so that engines pad it."""
FIRST_TOKEN, END_TOKEN = 3, 99


def is_close(one: float, other: float) -> bool:
    """Whether two engines with equal float32 weights may differ by this much in a log-probability.

    Different batches and numbers of processes sum in different orders, and the log-probability of hundreds of tokens is itself a sum.
    """
    return isclose(one, other, rel_tol=2.5e-7, abs_tol=1e-4)


@dataclass(frozen=True, slots=True)
class Answers:
    """An engine's answers to the suite's requests."""

    log_likelihoods: tuple[LogLikelihood, ...]
    generations: tuple[Generation, ...]

    def differences(self, other: "Answers") -> list[str]:
        """Differences from `other` that show a different model; empty if there are none."""
        found = []
        for index, (one, two) in enumerate(zip(self.log_likelihoods, other.log_likelihoods, strict=True)):
            if not is_close(one.log_probability, two.log_probability):
                found.append(f"log-likelihood {index}: {one.log_probability} and {two.log_probability}")
            if one.is_greedy != two.is_greedy:
                found.append(f"log-likelihood {index}: is_greedy {one.is_greedy} and {two.is_greedy}")
        for index, (first, second) in enumerate(zip(self.generations, other.generations, strict=True)):
            if first != second:
                found.append(f"generation {index}: {first} and {second}")
        return found


class EngineSuite:
    """A live engine, three weight sets, and the answers of fresh engines with each of them.

    Args:
        start: creates an engine: `start(folder, dtype="float32", max_model_len=...)`.
        folder: where the tiny models are written.
        tied: whether their output layer is tied to the embedding.
        fresh: answers of another suite's fresh engines (with equal `tied`) that this engine must reproduce; by default, those of
            engines created by `start`.
    """

    def __init__(
        self,
        start: Callable[..., Engine],
        folder: Path,
        *,
        tied: bool,
        fresh: Sequence[Answers] | None = None,
    ) -> None:
        self._start, self._folder = start, folder
        self.folders = [
            write_tiny_llama(folder / f"m{seed}", seed=seed, tied=tied, hidden=128, vocab=VOCAB, dtype="float32")
            for seed in range(3)
        ]
        self.weights = [load_file(model / "model.safetensors") for model in self.folders]
        self.tokenizer = Tokenizer.from_file(str(self.folders[0] / "tokenizer.json"))
        self.log_likelihood_requests = _log_likelihood_requests()
        self.generate_requests = _generate_requests()
        self.engine = self.start(self.folders[0])
        self.fresh = [self.answers(self.engine)] if fresh is None else list(fresh)
        for model in self.folders[len(self.fresh) :]:
            engine = self.start(model)
            self.fresh.append(self.answers(engine))
            engine.close()

    def start(self, model: Path) -> Engine:
        """A new engine on `model`."""
        return self._start(model, dtype="float32", max_model_len=MAX_LENGTH)

    def close(self) -> None:
        """Close the live engine."""
        self.engine.close()

    def answers(self, engine: Engine) -> Answers:
        """The engine's answers to all requests of the suite."""
        return Answers(
            tuple(engine.loglikelihood(self.log_likelihood_requests)), tuple(engine.generate(self.generate_requests))
        )

    def load(self, which: int) -> None:
        """Update the live engine to weight set `which`."""
        self.engine.update(self.writer(self.weights[which]))

    def writer(self, tensors: dict[str, torch.Tensor]) -> Callable[[WeightTarget], None]:
        """A write of `tensors`; for a sharded engine, a `RemoteWrite` that reads them from a file."""
        if not self.engine.is_sharded:
            return partial(write_tensors, tensors=tensors)
        file = self._folder / "written.safetensors"
        save_file(tensors, file)
        return RemoteWrite("evomerge.testing.engine_writers:write_file", {"file": str(file)})

    def check_serves(self, which: int) -> None:
        """Assert that the live engine answers like a fresh one with weight set `which`."""
        found = self.fresh[which].differences(self.answers(self.engine))
        assert not found, f"weight set {which}, fresh and live engine: {found[:5]}"


def random_tokens(*names: str | int, n: int) -> tuple[int, ...]:
    """`n` ordinary tokens, determined by the names."""
    stream = random_stream(0, "engine suite", *names)
    return tuple(int(token) for token in stream.integers(FIRST_TOKEN, END_TOKEN, n))


def _log_likelihood_requests() -> list[LogLikelihoodRequest]:
    """Short and long requests, one token and many, four choices after the same context, long common beginnings, a duplicate."""
    requests = []
    for item in range(6):
        context = random_tokens("context", item, n=5 + 9 * item)
        requests += [LogLikelihoodRequest(context, random_tokens("choice", item, choice, n=1)) for choice in range(4)]
        requests += [
            LogLikelihoodRequest(context, random_tokens("long", item, choice, n=2 + item)) for choice in range(2)
        ]
    shared = random_tokens("shared", n=300)
    requests += [
        LogLikelihoodRequest(shared + random_tokens("own", i, n=4), random_tokens("answer", i, n=1 + i % 2))
        for i in range(4)
    ]
    # The same sequence, split at different places, so that one forward pass must serve both.
    requests += [LogLikelihoodRequest(shared[:20], shared[20:24]), LogLikelihoodRequest(shared[:23], shared[23:24])]
    # Continuations with a common beginning that is longer than a block of a prefix cache.
    requests += [LogLikelihoodRequest(shared[:7], shared[7:] + random_tokens("end", i, n=1 + i)) for i in range(3)]
    return [*requests, requests[0]]


def _generate_requests() -> list[GenerateRequest]:
    """Prompts of many lengths, with limits and stop strings; long ones share 300 tokens for the prefix cache."""
    requests = [GenerateRequest(random_tokens("prompt", i, n=1 + 3 * i), max_tokens=4 + i % 9) for i in range(24)]
    requests += [GenerateRequest(random_tokens("prompt", i, n=9), max_tokens=40) for i in range(16)]
    requests += [
        GenerateRequest(random_tokens("stop", i, n=7), max_tokens=24, stop=("a", "bc", "7", "{")) for i in range(8)
    ]
    shared = random_tokens("shared", n=300)
    requests += [GenerateRequest(shared + random_tokens("tail", i, n=2 + i), max_tokens=4) for i in range(4)]
    return requests
