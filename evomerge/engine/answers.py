"""From generated tokens to answers: which tokens and strings end a text, and its text as lm-eval's Hugging Face backend returns it.

lm-eval looks for stop strings in the text with special tokens, decodes the answer without them, and cuts it at the stop strings one after the
other (lm-eval 0.4.13, `MultiTokenEOSCriteria` and `postprocess_generated_text`).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

_CONTEXT_TOKENS = 6
"""Prompt tokens decoded together with the answer: some tokenizers drop a leading space at the start of a text."""


class AnswerDecoder:
    """Decodes answers with a transformers tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; token ids beyond it are never generated.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        # vLLM's tokenizer for Mistral's own format does not have this attribute
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self._special = {number: str(token) for number, token in added if token.special and number < vocab_size}
        # a task's requests share their stop strings, and a tokenizer may have a thousand special tokens
        self._stop_tokens_of, self._overlaps = cache(self._tokens_with), cache(self._overlaps_special)

    def stop_tokens(self, stop: Sequence[str]) -> list[int]:
        """The ids of special tokens whose own text contains a stop string (`<|im_end|>`): a text without special tokens never shows it."""
        return list(self._stop_tokens_of(tuple(stop)))

    def spans_special_tokens(self, stop: Sequence[str]) -> bool:
        """Whether a stop string can consist of a special token, or a part of one, and other text (`<|im_end|>\\n`)."""
        return self._overlaps(tuple(stop))

    def after(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """Return a function: tokens -> the text they add to `prompt`, without special tokens or an incomplete character at the end."""
        context = list(prompt[-_CONTEXT_TOKENS:])
        before = self._plain(context)

        def text(tokens: Sequence[int]) -> str:
            both = self._plain([*context, *tokens])
            added = both[len(before) :] if both.startswith(before) else self._plain(tokens)
            return added.rstrip("\ufffd")

        return text

    def with_special_tokens(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    def answer(self, prompt: Sequence[int], tokens: Sequence[int], stop: Sequence[str]) -> str:
        """The answer `tokens` after `prompt`, up to the first of the stop strings."""
        return cut(self.after(prompt)(tokens), stop)

    def _plain(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _tokens_with(self, stop: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(number for number, text in self._special.items() if any(string in text for string in stop))

    def _overlaps_special(self, stop: tuple[str, ...]) -> bool:
        return any(_overlap(string, text) for string in stop for text in self._special.values())


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` cut at each stop string in turn, in the order of `stop`."""
    for string in stop:
        text = text.partition(string)[0]
    return text


def _overlap(string: str, special: str) -> bool:
    """Whether `string` can contain `special` and more, or begin or end with a part of it that is not all of `string`."""
    if special in string:
        return special != string
    shorter = range(1, min(len(string), len(special) + 1))
    return any(special.startswith(string[-n:]) or special.endswith(string[:n]) for n in shorter)
