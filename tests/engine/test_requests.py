from itertools import pairwise

from hypothesis import example, given
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


sizes_in_any_order = st.lists(st.integers(1, 300), max_size=60)


@example([10, 10, 10], 20)
@given(sizes_in_any_order | sizes_in_any_order.map(lambda sizes: sorted(sizes, reverse=True)), st.integers(1, 900))
def test_batches_keep_order_and_are_filled(sizes, budget):
    """An item starts a new batch only if the previous batch has no room for it, or if it is much shorter."""
    found = list(batches(sizes, lambda size: size, budget))
    assert [size for batch in found for size in batch] == sizes
    assert all(found)

    def fits(batch, size):
        return (len(batch) + 1) * max(*batch, size) <= budget and size >= 0.75 * max(batch) - 16

    for batch in found:
        assert all(fits(batch[:number], batch[number]) for number in range(1, len(batch)))
    assert not any(fits(batch, following[0]) for batch, following in pairwise(found))
