"""What a message about an unknown name says of the names that there are."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> str:
    """`; did you mean 'x'?` with the up to `n` nearest known names, and a full stop where none is near: a sentence may follow.

    Upper and lower case count as the same; near are those that begin so, the shortest first, and those of at least `likeness`, up to
    1 (`difflib`).
    """
    folded, wanted = {one.casefold(): one for one in known}, name.casefold()
    longer = sorted((one for one in folded if len(wanted) > 2 and one.startswith(wanted)), key=len)
    near = dict.fromkeys([*longer, *get_close_matches(wanted, folded, n=n, cutoff=likeness)])
    listed = " or ".join(repr(folded[one]) for one in islice(near, n))
    return f"; did you mean {listed}?" if near else "."
