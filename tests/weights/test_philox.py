"""Masks are Philox4x32-10 exactly, and the same at any chunking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.weights.philox import keep_mask, keep_threshold, mask_key, random_words


def test_known_answers():
    """Counters 0 and up with a zero key: Random123's test vector for the first block."""
    assert [hex(word) for word in random_words((0, 0), 0, 4)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]


@settings(max_examples=50)
@given(st.integers(0, 1 << 40), st.integers(0, 300), st.integers(0, 300))
def test_any_chunking_gives_the_same_words(start, first, second):
    key = mask_key(3, "x", 1)
    whole = random_words(key, start, first + second)
    parts = [random_words(key, start, first), random_words(key, start + first, second)]
    assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_keep_rate(probability):
    n = 200_000
    rate = keep_mask(mask_key(0, "w", 0), (n,), probability).double().mean().item()
    assert abs(rate - probability) <= 5 * np.sqrt(probability * (1 - probability) / n)


def test_keys_depend_on_all_of_their_parts():
    keys = {mask_key(seed, name, position) for seed in (0, 1) for name in ("a", "b") for position in (0, 1)}
    assert len(keys) == 8
    assert keep_threshold(1.0) == 2**32
    assert keep_threshold(-1.0) == 0
