"""Conformance checks for inference engines: each function of `CHECKS` compares the live engine of an `EngineSuite`, whose weights are
replaced in place, with freshly started ones.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from evomerge.core import EngineError, random_stream
from evomerge.engine import GenerateRequest, LogLikelihoodRequest, RemoteWrite
from evomerge.plan import WeightTarget
from evomerge.testing.engine_suite import (
    END_TOKEN,
    FIRST_TOKEN,
    MAX_LENGTH,
    VOCAB,
    EngineSuite,
    is_close,
    random_tokens,
)
from evomerge.testing.engine_writers import write_tensors

N_SWAPS = 100
N_WARM_UP = 12
MAX_GROWTH_BYTES = 12 << 20
"""Maximum growth of resident memory in `N_SWAPS - N_WARM_UP` swaps; leaking one copy of the tiny model's weights per swap would be 90 MB."""


def check_suite_can_fail(suite: EngineSuite) -> None:
    """The weight sets give different answers to nearly every request, and some texts end early or at a stop string."""
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert len(suite.fresh[one].differences(suite.fresh[two])) > len(suite.generate_requests)
    for answers in suite.fresh:
        pairs = list(zip(suite.generate_requests, answers.generations, strict=True))
        assert any(generation.n_tokens < request.max_tokens for request, generation in pairs if not request.stop)
        assert any(generation.n_tokens < request.max_tokens for request, generation in pairs if request.stop)


def check_layout_is_complete(suite: EngineSuite) -> None:
    """Every checkpoint tensor is addressed, its regions cover each element exactly once, and shapes and views agree."""
    if suite.engine.is_sharded:
        suite.load(0)  # each process checks its own part; that the parts are complete is checked when the engine starts
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
    raise AssertionError("regions() of a tensor that the engine does not have must raise KeyError")


def check_live_weights_equal_fresh(suite: EngineSuite) -> None:
    """After an update, the engine serves the new model: same greedy tokens, log-probabilities close to those of a fresh engine (`is_close`)."""
    for which in (1, 2, 0):
        suite.load(which)
        suite.check_serves(which)


def check_swaps_neither_leak_nor_serve_stale_tokens(suite: EngineSuite) -> None:
    """In 100 consecutive updates, every answer comes from the current weights, parameters do not move, and memory does not grow."""
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
        # The second time, the prefix cache contains the blocks of this update.
        assert suite.engine.generate(requests[:1]) == expected[:1], f"swap {swap}"
        answers = suite.engine.loglikelihood([suite.log_likelihood_requests[i] for i in scored])
        for answer, i in zip(answers, scored, strict=True):
            wanted = suite.fresh[which].log_likelihoods[i].log_probability
            assert is_close(answer.log_probability, wanted), f"swap {swap}"
        if swap == N_WARM_UP:
            before = _resident_bytes()
    growth = _resident_bytes() - before
    assert growth <= MAX_GROWTH_BYTES, f"memory grew by {growth / 2**20:.1f} MiB in {N_SWAPS - N_WARM_UP} swaps"
    assert len(places) == (0 if suite.engine.is_sharded else 1), "the live parameters moved"


def check_greedy_agrees_with_generate(suite: EngineSuite) -> None:
    """`is_greedy` is true exactly for what `generate` produces."""
    suite.load(1)
    requests, expected = [], []
    for request, generation in zip(suite.generate_requests, suite.fresh[1].generations, strict=True):
        tokens = tuple(suite.tokenizer.encode(generation.text, add_special_tokens=False).ids)
        if request.stop or len(tokens) != generation.n_tokens:
            continue  # truncated at a stop string, or contains special tokens that are not in the text
        requests.append(LogLikelihoodRequest(request.prompt, tokens))
        expected.append(True)
        for place in {0, len(tokens) - 1}:
            changed = (tokens[place] - FIRST_TOKEN + 1) % (END_TOKEN - FIRST_TOKEN) + FIRST_TOKEN
            other = (*tokens[:place], changed, *tokens[place + 1 :])
            requests.append(LogLikelihoodRequest(request.prompt, other))
            expected.append(False)
    assert expected.count(True) >= 10
    assert [answer.is_greedy for answer in suite.engine.loglikelihood(requests)] == expected


def check_the_second_best_token_is_not_greedy(suite: EngineSuite) -> None:
    """The second most likely token is not greedy, wherever it is in a continuation and whatever follows it."""
    suite.load(1)
    for context in (random_tokens("greedy context", i, n=6 + i) for i in range(3)):
        tokens = range(VOCAB)

        def best(before: tuple[int, ...], among: Sequence[int] = tokens) -> list[int]:
            answers = suite.engine.loglikelihood([LogLikelihoodRequest(before, (token,)) for token in among])
            return sorted(among, key=lambda token: -answers[among.index(token)].log_probability)

        first, second, *_ = best(context)
        continuations = [(token, best((*context, token))[0]) for token in (first, second)]
        answers = suite.engine.loglikelihood([LogLikelihoodRequest(context, one) for one in continuations])
        assert [answer.is_greedy for answer in answers] == [True, False]


def check_log_likelihoods_add_up(suite: EngineSuite) -> None:
    """log p(abc | x) = log p(a | x) + log p(b | xa) + log p(c | xab)."""
    suite.load(2)
    context, continuation = random_tokens("sum context", n=17), random_tokens("sum", n=5)
    steps = [LogLikelihoodRequest(context + continuation[:i], continuation[i : i + 1]) for i in range(5)]
    whole, *parts = suite.engine.loglikelihood([LogLikelihoodRequest(context, continuation), *steps])
    assert is_close(whole.log_probability, sum(part.log_probability for part in parts))
    assert all(part.log_probability < 0 for part in parts)


def check_order_is_kept(suite: EngineSuite) -> None:
    """Answers come in the order of the requests, whatever batches the engine forms; no requests give no answers."""
    suite.load(0)
    order = random_stream(0, "order").permutation(len(suite.log_likelihood_requests))
    answers = suite.engine.loglikelihood([suite.log_likelihood_requests[i] for i in order])
    for answer, i in zip(answers, order, strict=True):
        expected = suite.fresh[0].log_likelihoods[i]
        assert is_close(answer.log_probability, expected.log_probability)
    order = random_stream(0, "order").permutation(len(suite.generate_requests))
    generations = suite.engine.generate([suite.generate_requests[i] for i in order])
    assert generations == [suite.fresh[0].generations[i] for i in order]
    assert suite.engine.loglikelihood([]) == []
    assert suite.engine.generate([]) == []


def check_limits(suite: EngineSuite) -> None:
    """Sequences of `max_length` tokens work, longer ones and invalid requests are errors; the engine keeps working afterwards."""
    suite.load(0)
    engine, limit = suite.engine, suite.engine.max_length
    assert limit == MAX_LENGTH
    full = random_tokens("full", n=limit)
    assert len(engine.loglikelihood([LogLikelihoodRequest(full[:-3], full[-3:])])) == 1
    (at_end,) = engine.generate([GenerateRequest(full[:-2], max_tokens=30)])
    assert at_end.n_tokens <= 2
    for request in (
        LogLikelihoodRequest(full, (5,)),
        LogLikelihoodRequest((), (5,)),
        LogLikelihoodRequest((5,), ()),
        LogLikelihoodRequest((5,), (VOCAB,)),
        LogLikelihoodRequest((-1,), (5,)),
    ):
        _expect_engine_error(partial(engine.loglikelihood, [suite.log_likelihood_requests[0], request]))
    for wrong in (
        GenerateRequest(full, 1),
        GenerateRequest((), 1),
        GenerateRequest((5,), 0),
        GenerateRequest((VOCAB + 7,), 1),
        GenerateRequest((5,), 1, ("",)),
    ):
        _expect_engine_error(partial(engine.generate, [suite.generate_requests[0], wrong]))
    suite.check_serves(0)


def check_nan_is_an_error(suite: EngineSuite) -> None:
    """NaN weights give an error instead of an answer, and leave no traces after the next update."""
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


def check_special_tokens_among_stop_strings(suite: EngineSuite) -> None:
    """A special token whose text contains a stop string ends the text, although answers leave special tokens out."""
    suite.load(0)
    requests = [GenerateRequest(random_tokens("special", i, n=9), max_tokens=40) for i in range(32)]
    whole = suite.engine.generate(requests)
    stopped = suite.engine.generate([GenerateRequest(one.prompt, 40, stop=("unk>",)) for one in requests])
    shorter = [pair for pair in zip(whole, stopped, strict=True) if pair[0] != pair[1]]
    assert shorter
    for before, after in shorter:
        assert before.text.startswith(after.text)
        assert len(after.text) < after.n_tokens < before.n_tokens  # characters are tokens


def check_failed_update_blocks_use(suite: EngineSuite) -> None:
    """If a write fails halfway, its error propagates and the engine refuses to answer until the next update."""

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
    """A second engine in the process has its own weights; closing it leaves the first one working; a closed engine raises errors."""
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
    check_the_second_best_token_is_not_greedy,
    check_log_likelihoods_add_up,
    check_order_is_kept,
    check_limits,
    check_nan_is_an_error,
    check_stop_strings,
    check_special_tokens_among_stop_strings,
    check_failed_update_blocks_use,
    check_engines_are_independent,
)
"""All checks, each independent of the others."""
