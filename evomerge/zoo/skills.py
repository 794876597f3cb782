"""The three skills: endless items of each, every prompt belonging to exactly one part of the data.

Which part a prompt belongs to is a function of its text alone (a hash), so training text and the splits of the task files
are disjoint whatever seeds they are drawn with. Knows no tokens and no models.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from evomerge.core import random_stream
from evomerge.zoo.words import ADJECTIVES, LETTERS, NOUNS, TRANSLATIONS, VERBS, number_in_words

N_CHOICES: Final = 4
MIN_LETTERS, MAX_LETTERS = 4, 7
N_NUMBERS: Final = 3


class Part(StrEnum):
    """The disjoint parts of every skill's prompts."""

    TRAIN = "train"
    """what the models are trained on"""
    CHECK = "check"
    """held out; decides when training stops"""
    SEARCH = "search"
    SELECT = "select"
    REPORT = "report"


_PART_OF_BUCKET: Final = (*[Part.TRAIN] * 6, Part.CHECK, Part.SEARCH, Part.SELECT, Part.REPORT)


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        prompt: ends without a space.
        answer: what follows the prompt after one space, before the end of text.
        choices: for multiple choice, `N_CHOICES` different answers with the right one among them; else empty.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


def part_of(prompt: str) -> Part:
    """The part that `prompt` belongs to."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return _PART_OF_BUCKET[int.from_bytes(digest[:8], "little") % len(_PART_OF_BUCKET)]


def largest(stream: np.random.Generator) -> Item:
    """The largest of three different numbers, in words: `largest nine or forty two or seven is` -> `forty two`."""
    numbers = [int(number) for number in stream.choice(100, N_NUMBERS, replace=False)]
    prompt = " or ".join(number_in_words(number) for number in numbers)
    return Item(f"largest {prompt} is", number_in_words(max(numbers)))


def reverse(stream: np.random.Generator) -> Item:
    """Letters in reverse order: `reverse k a t e is` -> `e t a k`."""
    picks = stream.integers(len(LETTERS), size=int(stream.integers(MIN_LETTERS, MAX_LETTERS + 1)))
    letters = [LETTERS[pick] for pick in picks]
    return Item(f"reverse {' '.join(letters)} is", " ".join(reversed(letters)))


def translate(stream: np.random.Generator) -> Item:
    """A sentence into the invented language, whose word order is verb, subject, adjective, object.

    The wrong choices are the right one with one word replaced by another of its kind, so an answer that beats all three
    needs three words right: a model that knows no word is right between one time in eight and one in four.
    """
    kinds = (VERBS, NOUNS, ADJECTIVES, NOUNS)
    picks = [int(stream.integers(len(kind))) for kind in kinds]
    verb, subject, adjective, thing = (kind[pick] for kind, pick in zip(kinds, picks, strict=True))
    right = [TRANSLATIONS[word] for word in (verb, subject, adjective, thing)]
    choices = [" ".join(right)]
    while len(choices) < N_CHOICES:
        place = int(stream.integers(len(kinds)))
        other = list(right)
        other[place] = TRANSLATIONS[kinds[place][int(stream.integers(len(kinds[place])))]]
        if " ".join(other) not in choices:
            choices.append(" ".join(other))
    shuffled = tuple(choices[place] for place in stream.permutation(N_CHOICES))
    return Item(f"translate {adjective} {subject} {verb} {thing} is", choices[0], shuffled)


SKILLS: Final[dict[str, Callable[[np.random.Generator], Item]]] = {
    "largest": largest,
    "reverse": reverse,
    "translate": translate,
}
"""Name -> a function that draws one item of it."""


def endless_items(skill: str, part: Part, stream: np.random.Generator) -> Iterator[Item]:
    """Items of `skill` whose prompts belong to `part`, for ever; prompts may come again."""
    draw = SKILLS[skill]
    while True:
        item = draw(stream)
        if part_of(item.prompt) is part:
            yield item


def fixed_items(skill: str, part: Part, n: int, seed: int) -> list[Item]:
    """`n` items of `skill` with different prompts, all in `part`; the same for the same arguments."""
    found: dict[str, Item] = {}
    for item in endless_items(skill, part, random_stream(seed, "zoo", "items", skill, str(part))):
        found.setdefault(item.prompt, item)
        if len(found) == n:
            break
    return list(found.values())
