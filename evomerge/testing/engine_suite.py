"""What every inference engine must do, as checks that run over any engine: ours and a plugin's.

`EngineSuite` starts the engine on tiny random Llamas, collects the answers of freshly started engines for several weight sets, and
each function of `CHECKS` compares a live engine whose weights are replaced in place against them:

    @pytest.fixture(scope="module", params=[True, False])
    def suite(request, tmp_path_factory):
        suite = EngineSuite(MyEngine, tmp_path_factory.mktemp("models"), tied=request.param)
        yield suite
        suite.close()

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(suite, check):
        check(suite)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from evomerge.core import EngineError, random_stream
from evomerge.engine import Engine, GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest, RemoteWrite
from evomerge.plan import WeightTarget
from evomerge.testing.engine_writers import write_tensors
from evomerge.testing.tiny_models import write_tiny_llama

MAX_LENGTH = 448
LOG_PROBABILITY_TOLERANCE = 1e-4
"""Between a live and a fresh engine in float32; equal batches give equal sums, other batches differ in the last bits."""
N_SWAPS = 100
N_WARM_UP = 12
MAX_GROWTH_BYTES = 12 << 20
"""Resident memory that `N_SWAPS - N_WARM_UP` swaps may add; one leaked copy per swap of the tiny model's weights is 90 MB."""
_VOCAB = 99
"""The tokenizer's characters and special tokens; not a multiple of 64, so that engines pad it."""
_FIRST_TOKEN, _END_TOKEN = 3, 99


@dataclass(frozen=True, slots=True)
class Answers:
    """What an engine says to the suite's requests."""

    log_likelihoods: tuple[LogLikelihood, ...]
    generations: tuple[Generation, ...]

    def differences(self, other: "Answers") -> list[str]:
        """Where `other` is not the same model's answer; empty if it is."""
        found = []
        for index, (one, two) in enumerate(zip(self.log_likelihoods, other.log_likelihoods, strict=True)):
            if abs(one.log_probability - two.log_probability) > LOG_PROBABILITY_TOLERANCE:
                found.append(f"log-likelihood {index}: {one.log_probability} and {two.log_probability}")
            if one.is_greedy != two.is_greedy:
                found.append(f"log-likelihood {index}: is_greedy {one.is_greedy} and {two.is_greedy}")
        for index, (first, second) in enumerate(zip(self.generations, other.generations, strict=True)):
            if first != second:
                found.append(f"generation {index}: {first} and {second}")
        return found


class EngineSuite:
    """A live engine, three weight sets, and what fresh engines say with each of them.

    Args:
        start: makes an engine: `start(folder, dtype="float32", max_model_len=...)`.
        folder: where the tiny models are written.
        tied: whether their output layer is the embedding.
        fresh: what fresh engines of another suite (of equal `tied`) say, where this engine must answer like those; default: ask
            engines that `start` makes.
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
            write_tiny_llama(folder / f"m{seed}", seed=seed, tied=tied, hidden=128, vocab=_VOCAB, dtype="float32")
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
        """Closes the live engine."""
        self.engine.close()

    def answers(self, engine: Engine) -> Answers:
        """The engine's answers to all requests of the suite."""
        return Answers(
            tuple(engine.loglikelihood(self.log_likelihood_requests)), tuple(engine.generate(self.generate_requests))
        )

    def load(self, which: int) -> None:
        """Updates the live engine to weight set `which`."""
        self.engine.update(self.writer(self.weights[which]))

    def writer(self, tensors: dict[str, torch.Tensor]) -> Callable[[WeightTarget], None]:
        """Writes `tensors`; as data, through a file, where the engine's weights are spread over processes."""
        if not self.engine.is_sharded:
            return partial(write_tensors, tensors=tensors)
        file = self._folder / "written.safetensors"
        save_file(tensors, file)
        return RemoteWrite("evomerge.testing.engine_writers:write_file", {"file": str(file)})

    def check_serves(self, which: int) -> None:
        """The live engine answers like a fresh one with weight set `which`."""
        found = self.fresh[which].differences(self.answers(self.engine))
        assert not found, f"weight set {which}, fresh and live engine: {found[:5]}"


def _tokens(*names: str | int, n: int) -> tuple[int, ...]:
    stream = random_stream(0, "engine suite", *names)
    return tuple(int(token) for token in stream.integers(_FIRST_TOKEN, _END_TOKEN, n))


def _log_likelihood_requests() -> list[LogLikelihoodRequest]:
    """Short and long, one token and many, four choices after the same context, a duplicate."""
    requests = []
    for item in range(6):
        context = _tokens("context", item, n=5 + 9 * item)
        requests += [LogLikelihoodRequest(context, _tokens("choice", item, choice, n=1)) for choice in range(4)]
        requests += [LogLikelihoodRequest(context, _tokens("long", item, choice, n=2 + item)) for choice in range(2)]
    shared = _tokens("shared", n=300)
    requests += [
        LogLikelihoodRequest(shared + _tokens("own", i, n=4), _tokens("answer", i, n=1 + i % 2)) for i in range(4)
    ]
    # Same sequence, split at different places, so that one forward pass must serve both.
    requests += [LogLikelihoodRequest(shared[:20], shared[20:24]), LogLikelihoodRequest(shared[:23], shared[23:24])]
    return [*requests, requests[0]]


def _generate_requests() -> list[GenerateRequest]:
    """Prompts of many lengths, with limits and stop strings; long ones share 300 tokens, which a prefix cache keeps."""
    requests = [GenerateRequest(_tokens("prompt", i, n=1 + 3 * i), max_tokens=4 + i % 9) for i in range(24)]
    requests += [GenerateRequest(_tokens("prompt", i, n=9), max_tokens=40) for i in range(16)]
    requests += [GenerateRequest(_tokens("stop", i, n=7), max_tokens=24, stop=("a", "bc", "7", "{")) for i in range(8)]
    shared = _tokens("shared", n=300)
    requests += [GenerateRequest(shared + _tokens("tail", i, n=2 + i), max_tokens=4) for i in range(4)]
    return requests


def check_suite_can_fail(suite: EngineSuite) -> None:
    """The weight sets give different answers to nearly everything, some texts end early and some at a stop string."""
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert len(suite.fresh[one].differences(suite.fresh[two])) > len(suite.generate_requests)
    for answers in suite.fresh:
        pairs = list(zip(suite.generate_requests, answers.generations, strict=True))
        assert any(generation.n_tokens < request.max_tokens for request, generation in pairs if not request.stop)
        assert any(generation.n_tokens < request.max_tokens for request, generation in pairs if request.stop)


def check_layout_is_complete(suite: EngineSuite) -> None:
    """Every checkpoint tensor is addressed, every element of it exactly where its regions say, shapes and views agree."""
    if suite.engine.is_sharded:
        suite.load(0)  # each process checks its own part; that they are all together is checked when the engine starts
        suite.check_serves(0)
        return
    seen: list[WeightTarget] = []

    def write(target: WeightTarget) -> None:
        seen.append(target)
        write_tensors(target, suite.weights[0])

    suite.engine.update(write)
    (target,) = seen
    assert set(target.names()) == set(suite.weights[0])
    for name in target.names():
        covered = torch.zeros(suite.weights[0][name].shape, dtype=torch.int32)
        for region in target.regions(name):
            covered[region.index] += 1
            assert tuple(region.view.shape) == tuple(covered[region.index].shape)
            assert torch.equal(region.view.cpu(), suite.weights[0][name][region.index])
        assert bool((covered == 1).all()), name
    try:
        target.regions("no.such.tensor")
    except KeyError:
        return
    raise AssertionError("a tensor that the engine does not have must be a KeyError")


def check_live_weights_equal_fresh(suite: EngineSuite) -> None:
    """After an update the engine is the model it was given: same greedy tokens, log-probabilities within 1e-4."""
    for which in (1, 2, 0):
        suite.load(which)
        suite.check_serves(which)


def check_swaps_neither_leak_nor_serve_stale_tokens(suite: EngineSuite) -> None:
    """100 updates in a row: every answer is the current weights', parameters stay where they are, memory stays flat."""
    places: set[tuple[tuple[str, int], ...]] = set()
    shared = [i for i, request in enumerate(suite.generate_requests) if len(request.prompt) > 300]
    requests = [suite.generate_requests[i] for i in shared]
    scored = [i for i, request in enumerate(suite.log_likelihood_requests) if len(request.context) > 300]
    before = 0
    for swap in range(N_SWAPS):
        which = swap % 3

        def write(target: WeightTarget, which: int = which) -> None:
            places.add(
                tuple((name, region.view.data_ptr()) for name in target.names() for region in target.regions(name))
            )
            write_tensors(target, suite.weights[which])

        suite.engine.update(suite.writer(suite.weights[which]) if suite.engine.is_sharded else write)
        expected = [suite.fresh[which].generations[i] for i in shared]
        assert suite.engine.generate(requests) == expected, f"swap {swap}"
        # The second time the prefix cache holds this very update's blocks.
        assert suite.engine.generate(requests[:1]) == expected[:1], f"swap {swap}"
        answers = suite.engine.loglikelihood([suite.log_likelihood_requests[i] for i in scored])
        for answer, i in zip(answers, scored, strict=True):
            difference = answer.log_probability - suite.fresh[which].log_likelihoods[i].log_probability
            assert abs(difference) <= LOG_PROBABILITY_TOLERANCE, f"swap {swap}"
        if swap == N_WARM_UP:
            before = _resident_bytes()
    growth = _resident_bytes() - before
    assert growth <= MAX_GROWTH_BYTES, f"{growth / 2**20:.1f} MiB more after {N_SWAPS - N_WARM_UP} swaps"
    assert len(places) == (0 if suite.engine.is_sharded else 1), "the live parameters moved"


def check_greedy_agrees_with_generate(suite: EngineSuite) -> None:
    """`is_greedy` is true of exactly what `generate` writes."""
    suite.load(1)
    requests, expected = [], []
    for request, generation in zip(suite.generate_requests, suite.fresh[1].generations, strict=True):
        tokens = tuple(suite.tokenizer.encode(generation.text, add_special_tokens=False).ids)
        if request.stop or len(tokens) != generation.n_tokens:
            continue  # cut at a stop string, or special tokens that the text does not show
        requests.append(LogLikelihoodRequest(request.prompt, tokens))
        expected.append(True)
        for place in {0, len(tokens) - 1}:
            changed = (tokens[place] - _FIRST_TOKEN + 1) % (_END_TOKEN - _FIRST_TOKEN) + _FIRST_TOKEN
            other = (*tokens[:place], changed, *tokens[place + 1 :])
            requests.append(LogLikelihoodRequest(request.prompt, other))
            expected.append(False)
    assert expected.count(True) >= 10
    assert [answer.is_greedy for answer in suite.engine.loglikelihood(requests)] == expected


def check_log_likelihoods_add_up(suite: EngineSuite) -> None:
    """log p(abc | x) = log p(a | x) + log p(b | xa) + log p(c | xab)."""
    suite.load(2)
    context, continuation = _tokens("sum context", n=17), _tokens("sum", n=5)
    steps = [LogLikelihoodRequest(context + continuation[:i], continuation[i : i + 1]) for i in range(5)]
    whole, *parts = suite.engine.loglikelihood([LogLikelihoodRequest(context, continuation), *steps])
    assert abs(whole.log_probability - sum(part.log_probability for part in parts)) < LOG_PROBABILITY_TOLERANCE
    assert all(part.log_probability < 0 for part in parts)


def check_order_is_kept(suite: EngineSuite) -> None:
    """Answers come in the order of the requests, whatever batches the engine makes; no requests, no answers."""
    suite.load(0)
    order = random_stream(0, "order").permutation(len(suite.log_likelihood_requests))
    answers = suite.engine.loglikelihood([suite.log_likelihood_requests[i] for i in order])
    for answer, i in zip(answers, order, strict=True):
        expected = suite.fresh[0].log_likelihoods[i]
        assert abs(answer.log_probability - expected.log_probability) <= LOG_PROBABILITY_TOLERANCE
    order = random_stream(0, "order").permutation(len(suite.generate_requests))
    generations = suite.engine.generate([suite.generate_requests[i] for i in order])
    assert generations == [suite.fresh[0].generations[i] for i in order]
    assert suite.engine.loglikelihood([]) == []
    assert suite.engine.generate([]) == []


def check_limits(suite: EngineSuite) -> None:
    """Sequences of `max_length` tokens work, longer ones are errors, and so is nonsense; the engine works on afterwards."""
    suite.load(0)
    engine, limit = suite.engine, suite.engine.max_length
    assert limit == MAX_LENGTH
    full = _tokens("full", n=limit)
    assert len(engine.loglikelihood([LogLikelihoodRequest(full[:-3], full[-3:])])) == 1
    (at_end,) = engine.generate([GenerateRequest(full[:-2], max_tokens=30)])
    assert at_end.n_tokens <= 2
    for request in (
        LogLikelihoodRequest(full, (5,)),
        LogLikelihoodRequest((), (5,)),
        LogLikelihoodRequest((5,), ()),
        LogLikelihoodRequest((5,), (_VOCAB,)),
        LogLikelihoodRequest((-1,), (5,)),
    ):
        _expect_engine_error(partial(engine.loglikelihood, [suite.log_likelihood_requests[0], request]))
    for wrong in (
        GenerateRequest(full, 1),
        GenerateRequest((), 1),
        GenerateRequest((5,), 0),
        GenerateRequest((_VOCAB + 7,), 1),
        GenerateRequest((5,), 1, ("",)),
    ):
        _expect_engine_error(partial(engine.generate, [suite.generate_requests[0], wrong]))
    suite.check_serves(0)


def check_nan_is_an_error(suite: EngineSuite) -> None:
    """NaN weights give an error, not an answer; and nothing of them is left after the next update."""
    for name in ("model.layers.0.self_attn.v_proj.weight", "model.norm.weight"):
        broken = dict(suite.weights[1])
        broken[name] = torch.full_like(broken[name], torch.nan)
        asks: tuple[Callable[[], object], ...] = (
            lambda: suite.engine.loglikelihood(suite.log_likelihood_requests),
            lambda: suite.engine.loglikelihood(suite.log_likelihood_requests[:1]),
            lambda: suite.engine.generate(suite.generate_requests),
        )
        for ask in asks:
            suite.engine.update(suite.writer(broken))
            _expect_engine_error(ask)
        suite.load(2)
        suite.check_serves(2)


def check_stop_strings(suite: EngineSuite) -> None:
    """A text ends before the first stop string, and no further tokens are generated."""
    suite.load(0)
    checked = 0
    for request, generation in zip(suite.generate_requests, suite.fresh[0].generations, strict=True):
        text = generation.text
        if request.stop or len(text) < 6:
            continue
        later, earlier = text[4:6], text[2:4]
        first = min(text.find(later), text.find(earlier))
        (stopped,) = suite.engine.generate([GenerateRequest(request.prompt, request.max_tokens, (later, earlier))])
        assert stopped.text == text[:first]
        assert stopped.n_tokens < generation.n_tokens or first + 2 >= len(text)
        checked += 1
    assert checked >= 5


def check_failed_update_blocks_use(suite: EngineSuite) -> None:
    """If writing fails halfway, its error passes through and the engine refuses to answer until the next update."""

    class HalfwayError(Exception):
        pass

    def write(target: WeightTarget) -> None:
        name = target.names()[0]
        target.regions(name)[0].view.zero_()
        raise HalfwayError

    half = RemoteWrite("evomerge.testing.engine_writers:write_half", {})
    expected = EngineError if suite.engine.is_sharded else HalfwayError
    suite.load(1)
    try:
        suite.engine.update(half if suite.engine.is_sharded else write)
    except expected:
        pass
    else:
        raise AssertionError("the writer's error was swallowed")
    _expect_engine_error(lambda: suite.engine.loglikelihood(suite.log_likelihood_requests))
    _expect_engine_error(lambda: suite.engine.generate(suite.generate_requests))
    suite.load(1)
    suite.check_serves(1)


def check_engines_are_independent(suite: EngineSuite) -> None:
    """A second engine in the process has its own weights; closing it leaves the first one working; a closed one says so."""
    suite.load(0)
    other = suite.start(suite.folders[1])
    suite.check_serves(0)
    assert not suite.fresh[1].differences(suite.answers(other))
    suite.load(2)
    assert not suite.fresh[1].differences(suite.answers(other))
    other.close()
    other.close()
    suite.check_serves(2)
    _expect_engine_error(lambda: other.generate(suite.generate_requests))
    _expect_engine_error(lambda: other.loglikelihood(suite.log_likelihood_requests))
    _expect_engine_error(lambda: other.update(lambda target: write_tensors(target, suite.weights[0])))


def _resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _expect_engine_error(call: Callable[[], object]) -> None:
    try:
        answer = call()
    except EngineError:
        return
    raise AssertionError(f"expected an EngineError, got {answer!r:.200}")


CHECKS: Sequence[Callable[[EngineSuite], None]] = (
    check_suite_can_fail,
    check_layout_is_complete,
    check_live_weights_equal_fresh,
    check_swaps_neither_leak_nor_serve_stale_tokens,
    check_greedy_agrees_with_generate,
    check_log_likelihoods_add_up,
    check_order_is_kept,
    check_limits,
    check_nan_is_an_error,
    check_stop_strings,
    check_failed_update_blocks_use,
    check_engines_are_independent,
)
"""All checks, each independent of the others."""
