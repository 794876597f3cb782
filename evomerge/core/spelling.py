"""What a message about an unknown name says of the names that there are."""

from collections.abc import Iterable
from difflib import get_close_matches
from itertools import islice


def nearest(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> list[str]:
    """The up to `n` known names that `name` may be meant for.

    Case does not count. Names that begin with `name` come first, the shortest of them first, then those of at least `likeness`, up to 1
    (`difflib`).
    """
    folded, wanted = {one.casefold(): one for one in known}, name.casefold()
    longer = sorted((one for one in folded if len(wanted) > 2 and one.startswith(wanted)), key=len)
    near = dict.fromkeys([*longer, *get_close_matches(wanted, folded, n=n, cutoff=likeness)])
    return [folded[one] for one in islice(near, n)]


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> str:
    """`; did you mean 'x'?` with the `nearest` known names, or a full stop if there are none, so that a sentence may follow."""
    near = nearest(name, known, n=n, likeness=likeness)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
