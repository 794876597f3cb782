"""The three skills, with infinite streams of items; every prompt belongs to exactly one part of the data.

The part of a prompt depends only on its text (through a hash), so training text and the splits of the task files
are disjoint whatever seeds they are drawn with. Knows nothing of tokens or models.
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
    """used to train the models"""
    CHECK = "check"
    """held out; used to decide when training stops"""
    SEARCH = "search"
    SELECT = "select"
    REPORT = "report"


_PART_OF_BUCKET: Final = (*[Part.TRAIN] * 6, Part.CHECK, Part.SEARCH, Part.SELECT, Part.REPORT)


@dataclass(frozen=True, slots=True)
class Item:
    """One question.

    Attributes:
        prompt: ends without a space.
        answer: the text after the prompt and one space, before the end of text.
        choices: for multiple choice, `N_CHOICES` different answers including the right one; else empty.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


def part_of(prompt: str) -> Part:
    """The part to which `prompt` belongs."""
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
    """Translation of a sentence into the invented language, whose word order is verb, subject, adjective, object.

    Each wrong choice is the right one with one word replaced by another of its kind, so rejecting all three may require knowing
    three words: a model that knows no words is right between one time in eight and one in four.
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
"""Name of a skill -> a function that draws one item."""


def endless_items(skill: str, part: Part, stream: np.random.Generator) -> Iterator[Item]:
    """An infinite stream of items of `skill` whose prompts belong to `part`; prompts may repeat."""
    draw = SKILLS[skill]
    while True:
        item = draw(stream)
        if part_of(item.prompt) is part:
            yield item


def fixed_items(skill: str, part: Part, n: int, seed: int) -> list[Item]:
    """`n` items of `skill` with different prompts, all in `part`; equal arguments give equal items."""
    found: dict[str, Item] = {}
    for item in endless_items(skill, part, random_stream(seed, "zoo", "items", skill, str(part))):
        found.setdefault(item.prompt, item)
        if len(found) == n:
            break
    return list(found.values())
