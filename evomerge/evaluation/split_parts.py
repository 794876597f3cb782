"""Parts of a data split in the syntax of the `datasets` library: `train[:60%]`, `train[60%:80%]`, `train[-500:]`. Loads no data."""

import re

from evomerge.core import EvaluationError

_PART = re.compile(r"(?P<name>[^\[\]]+)\[(?P<first>-?\d+%?)?:(?P<last>-?\d+%?)?\]")


def split_name(part: str) -> str:
    """The data split that `part` is a part of; a whole split's own name."""
    return part.partition("[")[0]


def part_range(part: str, n_rows: int) -> range:
    """The rows that `part` selects from a split of `n_rows` rows, in the order of the data; percentages are rounded down.

    Raises:
        EvaluationError: `part` is neither a split's name nor a name with rows in brackets, or a percentage exceeds 100%.
    """
    if "[" not in part:
        return range(n_rows)
    match = _PART.fullmatch(part)
    if match is None:
        raise EvaluationError(f"{part!r}: expected a split, or a part of one such as train[:60%] or train[100:300]")
    if any(
        text is not None and text.endswith("%") and abs(int(text[:-1])) > 100 for text in match.group("first", "last")
    ):
        raise EvaluationError(f"{part!r}: a percentage exceeds 100%")
    first, last = (_row(text, n_rows) for text in (match["first"] or "0", match["last"] or "100%"))
    return range(first, max(first, last))


def always_share_rows(one: str, two: str) -> bool:
    """Whether two parts overlap whatever the number of rows of the data (ten or more).

    Raises:
        EvaluationError: as for `part_range`.
    """
    return split_name(one) == split_name(two) and all(
        max(a.start, b.start) < min(a.stop, b.stop)
        for a, b in ((part_range(one, n_rows), part_range(two, n_rows)) for n_rows in (10**n for n in range(1, 10)))
    )


def _row(text: str, n_rows: int) -> int:
    number = int(text.removesuffix("%"))
    if text.endswith("%"):
        number = n_rows * (number + 100 * (number < 0)) // 100
    elif number < 0:
        number += n_rows
    return min(max(number, 0), n_rows)
