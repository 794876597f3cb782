"""Special tokens that end a text because a stop string stands in their own text (`<|im_end|>`): answers leave them out, so it is never found there.

lm-eval's backends look for stop strings in the text with special tokens, and answer without them.
"""

from collections.abc import Sequence
from typing import Any


class StopTokens:
    """The special tokens of a transformers tokenizer that a model may write.

    Args:
        tokenizer: gives their texts.
        vocab_size: of the model; tokens beyond it are never written.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        # vLLM's tokenizer of Mistral's own format has none
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        self._texts = {number: str(token) for number, token in added if token.special and number < vocab_size}
        self._found: dict[tuple[str, ...], list[int]] = {}

    def of(self, stop: Sequence[str]) -> list[int]:
        """The ids of those whose text holds one of the strings."""
        key = tuple(stop)
        if key not in self._found:  # a task's requests have the same, and tokenizers a thousand of these tokens
            self._found[key] = [n for n, text in self._texts.items() if any(string in text for string in key)]
        return list(self._found[key])
