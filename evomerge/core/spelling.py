"""Suggestions for messages about unknown names."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice


def nearest(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> list[str]:
    """Up to `n` known names that are similar to `name`, ignoring case.

    Names that start with `name` (if it has at least three characters) come first, the shortest first, then those with a `difflib` ratio of at
    least `likeness`, from 0 to 1.
    """
    folded, wanted = {candidate.casefold(): candidate for candidate in known}, name.casefold()
    longer = sorted((candidate for candidate in folded if len(wanted) > 2 and candidate.startswith(wanted)), key=len)
    near = dict.fromkeys([*longer, *get_close_matches(wanted, folded, n=n, cutoff=likeness)])
    return [folded[candidate] for candidate in islice(near, n)]


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> str:
    """The end of a sentence: `; did you mean 'x'?` with the `nearest` known names, or just a full stop if there are none."""
    near = nearest(name, known, n=n, likeness=likeness)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
