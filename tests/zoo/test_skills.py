"""The generators: right answers, disjoint parts, and the same items for the same seed."""

from itertools import combinations, islice

import pytest

from evomerge.core import random_stream
from evomerge.zoo.skills import MAX_LETTERS, MIN_LETTERS, N_CHOICES, SKILLS, Part, endless_items, fixed_items, part_of
from evomerge.zoo.words import TRANSLATIONS, VOCABULARY, number_in_words

ENGLISH = {number_in_words(number): number for number in range(100)}


def body(prompt: str, keyword: str) -> str:
    return prompt.removeprefix(f"{keyword} ").removesuffix(" is")


def test_every_word_of_every_item_is_in_the_vocabulary_once() -> None:
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    for skill in SKILLS:
        for item in fixed_items(skill, Part.TRAIN, 200, seed=3):
            assert set(item.prompt.split() + item.answer.split()) <= set(VOCABULARY)


def test_largest_gives_the_largest_number() -> None:
    for item in fixed_items("largest", Part.CHECK, 200, seed=0):
        numbers = [ENGLISH[words] for words in body(item.prompt, "largest").split(" or ")]
        assert len(set(numbers)) == 3
        assert ENGLISH[item.answer] == max(numbers)


def test_reverse_reverses() -> None:
    lengths = set()
    for item in fixed_items("reverse", Part.CHECK, 200, seed=0):
        letters = body(item.prompt, "reverse").split()
        lengths.add(len(letters))
        assert item.answer.split() == letters[::-1]
    assert lengths == set(range(MIN_LETTERS, MAX_LETTERS + 1))


def test_translate_translates_and_its_wrong_choices_differ_in_one_word() -> None:
    places = set()
    for item in fixed_items("translate", Part.CHECK, 200, seed=0):
        adjective, subject, verb, thing = body(item.prompt, "translate").split()
        right = [TRANSLATIONS[word] for word in (verb, subject, adjective, thing)]
        assert item.answer.split() == right
        assert len(set(item.choices)) == N_CHOICES
        places.add(item.choices.index(item.answer))
        for choice in set(item.choices) - {item.answer}:
            assert sum(one != other for one, other in zip(choice.split(), right, strict=True)) == 1
    assert places == set(range(N_CHOICES)), "the right choice must not always be in the same place"


@pytest.mark.parametrize("skill", SKILLS)
def test_parts_are_disjoint_whatever_the_seeds(skill: str) -> None:
    prompts = {
        part: {item.prompt for seed in (0, 1) for item in fixed_items(skill, part, 150, seed)}
        | {item.prompt for item in islice(endless_items(skill, part, random_stream(5, skill)), 300)}
        for part in Part
    }
    for one, other in combinations(Part, 2):
        assert not prompts[one] & prompts[other]
    assert all(part_of(prompt) is part for part in Part for prompt in prompts[part])


@pytest.mark.parametrize("skill", SKILLS)
def test_items_depend_only_on_the_seed(skill: str) -> None:
    assert fixed_items(skill, Part.SEARCH, 50, seed=4) == fixed_items(skill, Part.SEARCH, 50, seed=4)
    assert fixed_items(skill, Part.SEARCH, 50, seed=4) != fixed_items(skill, Part.SEARCH, 50, seed=5)
    assert len({item.prompt for item in fixed_items(skill, Part.SEARCH, 300, seed=4)}) == 300


def test_numbers_are_written_in_words() -> None:
    assert [number_in_words(number) for number in (0, 13, 20, 42, 99)] == [
        "zero",
        "thirteen",
        "twenty",
        "forty two",
        "ninety nine",
    ]
    with pytest.raises(ValueError, match="100"):
        number_in_words(100)
