"""NaN and infinities are found at any position, and nothing else is reported."""

import pytest
import torch

from evomerge.weights.scan import first_bad_element

N_ELEMENTS = (1 << 18) + 1000
"""more than are looked through at a time"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_first_bad_element_is_found(dtype):
    good = torch.randn(N_ELEMENTS, generator=torch.Generator().manual_seed(0)).to(dtype)
    good[:4] = torch.tensor(
        [torch.finfo(dtype).max, torch.finfo(dtype).min, -0.0, torch.finfo(dtype).tiny], dtype=dtype
    )
    assert first_bad_element(good) is None
    assert first_bad_element(good[2:].reshape(-1, 2)) is None
    assert first_bad_element(good[::2]) is None
    for value in (float("nan"), -float("nan"), float("inf"), -float("inf")):
        for place in (0, 17, (1 << 18) - 1, 1 << 18, N_ELEMENTS - 1):
            bad = good.clone()
            bad[place] = bad[-1] = value
            assert first_bad_element(bad) == place


def test_scalars_and_empty_tensors_are_scanned():
    assert first_bad_element(torch.zeros(0)) is None
    assert first_bad_element(torch.tensor(1.0)) is None
    assert first_bad_element(torch.tensor(float("nan"))) == 0
