"""How scores are written in the terminal."""

import pytest

from evomerge.cli.console import number


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        (0.12345, "", "0.123"),
        (0.12345, "+", "+0.123"),
        (-999_999.0, "", "-999999.000"),
        (1.2345e36, "", "1.23e+36"),
        (-1.2345e36, "+", "-1.23e+36"),
    ],
)
def test_large_scores_are_short(value, sign, shown):
    assert number(value, 3, sign) == shown
