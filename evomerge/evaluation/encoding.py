"""Text -> token ids, exactly as lm-eval encodes requests for causal models.

Follows lm-eval 0.4.13, `TemplateLM.loglikelihood`, `TemplateLM._encode_pair` and `HFLM.tok_encode`.
"""

from typing import Any

from evomerge.core import EvaluationError


class Encoder:
    """A transformers tokenizer with lm-eval's conventions.

    Args:
        tokenizer: the models' tokenizer.

    Raises:
        EvaluationError: it has neither a beginning-of-text nor an end-of-text token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise EvaluationError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token; lm-eval's conventions need one"
            )
        self._prefix = int(prefix)
        self._prefix_text: str = tokenizer.decode([self._prefix])
        self.end_text: str | None = (
            None if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])
        )

    def prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt: with the special tokens that the tokenizer adds, unless the text already begins with one."""
        if self._prefix_text and text.startswith(self._prefix_text):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return tuple(self._tokenizer.encode(text))

    def pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(context, continuation) tokens. Spaces at the end of the context go to the continuation, so that words stay whole.

        An empty context becomes the beginning-of-text (else end-of-text) token.
        """
        if not context:
            tokens = tuple(self._tokenizer.encode(continuation, add_special_tokens=False))
            if tokens and tokens[0] == self._prefix:
                return tokens[:1], tokens[1:]
            return (self._prefix,), tokens
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, before = self.prompt(stripped + continuation), self.prompt(stripped)
        return before, whole[len(before) :]
