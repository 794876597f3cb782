"""Random numbers are exactly Philox's, in any chunking; masks keep elements at the right rate and independently of each other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.weights.philox import (
    DECISIONS,
    MASK_ROUNDS,
    WORD_ROUNDS,
    keep_mask,
    keep_threshold,
    mask_key,
    philox,
    random_halves,
)

# counter, key, rounds -> words: test vectors published with Random123, the code of the paper
ALL_ONES = 0xFFFFFFFF
DIGITS_OF_PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
KNOWN = [
    ((0,) * 4, (0,) * 2, 7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, 7, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (*DIGITS_OF_PI, 7, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    ((0,) * 4, (0,) * 2, 10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, 10, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*DIGITS_OF_PI, 10, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "rounds", "words"), KNOWN)
def test_known_answers_are_reproduced(counter, key, rounds, words):
    assert (
        tuple(word.item() for word in philox([np.array([word], np.uint64) for word in counter], key, rounds)) == words
    )


def test_halves_of_the_first_counter_are_in_order():
    assert (WORD_ROUNDS, MASK_ROUNDS) == (10, 7)
    w0, w1, w2, w3 = KNOWN[0][3]
    even, odd = w1 | w0 << 32, w3 | w2 << 32
    expected = [(number >> (16 * digit)) & 0xFFFF for digit in range(4) for number in (even, odd)]
    assert random_halves((0, 0), 0, 8).tolist() == expected


@settings(max_examples=50)
@given(start=st.integers(0, 1 << 40), first=st.integers(0, 300), second=st.integers(0, 300))
def test_any_chunking_gives_the_same_numbers(start, first, second):
    key = mask_key(3, "x", 1)
    whole = random_halves(key, start, first + second)
    parts = [random_halves(key, start, first), random_halves(key, start + first, second)]
    assert np.array_equal(whole, np.concatenate(parts))


N_ELEMENTS = 1_000_000


def correlation(a, b):
    """Correlation of two 0/1 rows, in standard deviations of the correlation of independent rows."""
    return np.corrcoef(a, b)[0, 1] * np.sqrt(len(a))


@pytest.mark.parametrize("probability", [0.0, 1e-4, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_keep_rate_matches_the_probability(probability):
    mask = keep_mask(mask_key(0, "w", 0), (8, N_ELEMENTS // 8), probability).reshape(-1, 8).double()
    for rate, n in ((mask.mean(), N_ELEMENTS), *[(column.mean(), N_ELEMENTS // 8) for column in mask.T]):
        assert abs(rate.item() - probability) <= 5 * np.sqrt(probability * (1 - probability) / n)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.8])
def test_elements_inputs_tensors_and_seeds_are_independent(probability):
    """Elements at any distance within a counter and beyond; different inputs, tensors and seeds."""
    keys = [mask_key(0, "w", 0), mask_key(0, "w", 1), mask_key(0, "v", 0), mask_key(1, "w", 0)]
    masks = [keep_mask(key, (N_ELEMENTS,), probability).numpy() for key in keys]
    found = [correlation(masks[0][:-distance], masks[0][distance:]) for distance in (*range(1, 18), 64, 4096)]
    found += [correlation(masks[a], masks[b]) for a in range(4) for b in range(a)]
    assert max(abs(value) for value in found) < 4.5


def test_halves_are_uniform():
    """Chi-squared over all 65,536 values, in standard deviations from its mean; and over pairs within one counter."""
    halves = random_halves(mask_key(5, "w", 2), 0, 64 * DECISIONS)
    pairs = (halves[0::2].astype(np.int64) >> 8) * 256 + (halves[1::2] >> 8)
    for values in (halves, pairs):
        counts = np.bincount(values, minlength=DECISIONS)
        expected = len(values) / DECISIONS
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_squared - (DECISIONS - 1)) < 5 * np.sqrt(2 * (DECISIONS - 1))


def test_thresholds_are_the_nearest_and_are_never_rounded_to_zero():
    assert keep_threshold(1.0) == DECISIONS
    assert keep_threshold(0.25) == DECISIONS // 4
    assert keep_threshold(1 / 3) == 21845
    assert keep_threshold(1e-9) == 1
    assert keep_threshold(0.0) == keep_threshold(-1.0) == 0
    assert keep_mask(mask_key(0, "w", 0), (N_ELEMENTS,), 1e-9).any()


def test_keys_depend_on_all_of_their_parts():
    keys = {mask_key(seed, name, position) for seed in (0, 1) for name in ("a", "b") for position in (0, 1)}
    assert len(keys) == 8
