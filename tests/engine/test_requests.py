from hypothesis import given
from hypothesis import strategies as st

from evomerge.engine import LogLikelihoodRequest
from evomerge.engine.batching import batches
from evomerge.engine.requests import group_by_prompt

tokens = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)
requests = st.lists(st.builds(LogLikelihoodRequest, tokens, tokens), max_size=30)


@given(requests)
def test_groups_hold_every_request_once(asked):
    groups = group_by_prompt(asked)
    assert sorted(index for group in groups for index, _, _ in group.members) == list(range(len(asked)))
    assert len({group.prompt for group in groups}) == len(groups)
    for group in groups:
        assert group.start == min(start for _, start, _ in group.members)
        assert sorted(set(group.last_tokens)) == sorted(group.last_tokens)
        for index, start, last in group.members:
            request = asked[index]
            assert (*group.prompt, last) == request.context + request.continuation
            assert start == len(request.context)
            assert last in group.last_tokens


@given(st.lists(st.integers(1, 300), max_size=60).map(lambda sizes: sorted(sizes, reverse=True)), st.integers(1, 900))
def test_batches_keep_order_and_budget(sizes, budget):
    found = list(batches(sizes, lambda size: size, budget))
    assert [size for batch in found for size in batch] == sizes
    for batch in found:
        assert len(batch) == 1 or len(batch) * batch[0] <= budget
        assert batch[-1] >= 0.75 * batch[0] - 16
