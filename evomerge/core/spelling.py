"""What a message about an unknown name says of the names that there are."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], *, n: int = 1, likeness: float = 0.6) -> str:
    """`; did you mean 'x'?` with the up to `n` nearest known names, and a full stop where none is near: a sentence may follow.

    Upper and lower case count as the same; near are those of at least `likeness`, up to 1 (`difflib`).
    """
    folded = {one.casefold(): one for one in known}
    near = [folded[one] for one in get_close_matches(name.casefold(), folded, n=n, cutoff=likeness)]
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
