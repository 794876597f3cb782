"""Special tokens that end a text because their own text contains a stop string (`<|im_end|>`).

Answers leave special tokens out, so such a stop string would never be found in them. lm-eval's backends look for stop strings in the text
with special tokens, and return it without them.
"""

from collections.abc import Sequence
from typing import Any


class StopTokens:
    """The special tokens of a transformers tokenizer that a model can generate.

    Args:
        tokenizer: gives the tokens and their texts.
        vocab_size: of the model; token ids beyond it are never generated.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        # vLLM's tokenizer for Mistral's own format does not have this attribute
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self._texts = {number: str(token) for number, token in added if token.special and number < vocab_size}
        self._found: dict[tuple[str, ...], list[int]] = {}

    def of(self, stop: Sequence[str]) -> list[int]:
        """The ids of the tokens whose text contains one of the strings."""
        key = tuple(stop)
        if (
            key not in self._found
        ):  # cached: a task's requests share their strings, and a tokenizer may have a thousand special tokens
            self._found[key] = [n for n, text in self._texts.items() if any(string in text for string in key)]
        return list(self._found[key])
