"""The closed vocabulary of the zoo: number words, letters, an English word list and its translation.

The translations are words of an invented language; they are the same for every seed, because the task files
in `tasks/` are committed and every zoo must use their language.
"""

from itertools import chain
from typing import Final

from evomerge.core import random_stream


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


UNITS: Final = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS: Final = _words("twenty thirty forty fifty sixty seventy eighty ninety")
LETTERS: Final = tuple("abcdefghijklmnopqrstuvwxyz")
KEYWORDS: Final = ("largest", "reverse", "translate", "or", "is")

ADJECTIVES: Final = _words(
    "red green blue white black yellow old young small big tall short quick slow warm cold loud quiet soft hard bright dark "
    "wise brave calm proud thin heavy clean sweet round empty"
)
NOUNS: Final = _words(
    "cat dog bird fish horse cow tree flower stone river house door boat king queen child farmer baker star moon wolf bear "
    "lamp book garden bridge cloud hammer ship mountain spoon basket"
)
VERBS: Final = _words(
    "sees finds likes calls helps follows carries paints hears holds feeds guards watches draws lifts leaves"
)

_LANGUAGE_SEED: Final = 20
_CONSONANTS: Final = "bdfgklmnprstvz"
_VOWELS: Final = "aeiou"


def _invented_words(n: int) -> list[str]:
    """`n` different two-syllable words, none of which is an English word of this module."""
    taken = {*UNITS, *TENS, *ADJECTIVES, *NOUNS, *VERBS, *KEYWORDS}
    stream = random_stream(_LANGUAGE_SEED, "zoo", "language")
    words: list[str] = []
    while len(words) < n:
        picks = stream.integers([len(_CONSONANTS), len(_VOWELS)] * 2)
        word = "".join((_CONSONANTS if place % 2 == 0 else _VOWELS)[pick] for place, pick in enumerate(picks))
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


TRANSLATIONS: Final = dict(
    zip(chain(ADJECTIVES, NOUNS, VERBS), _invented_words(len(ADJECTIVES) + len(NOUNS) + len(VERBS)), strict=True)
)
"""English word -> its translation."""

VOCABULARY: Final = (*KEYWORDS, *UNITS, *TENS, *LETTERS, *TRANSLATIONS, *TRANSLATIONS.values())
"""All words of the zoo's texts, each once."""


def number_in_words(number: int) -> str:
    """0 to 99 in English, such as "forty two".

    Raises:
        ValueError: the number is out of range.
    """
    if not 0 <= number <= 99:
        raise ValueError(f"the zoo's numbers are from 0 to 99, got {number}")
    if number < len(UNITS):
        return UNITS[number]
    tens, units = TENS[number // 10 - 2], number % 10
    return f"{tens} {UNITS[units]}" if units else tens
