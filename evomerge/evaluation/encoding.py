"""Conversations -> text -> token ids, exactly as lm-eval encodes requests for causal models.

Follows lm-eval 0.4.13, `TemplateLM.loglikelihood`, `TemplateLM._encode_pair`, `HFLM.tok_encode` and `HFLM.apply_chat_template`.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from evomerge.core import EvaluationError

logger = logging.getLogger(__name__)


class Encoder:
    """A transformers tokenizer with lm-eval's conventions.

    Args:
        tokenizer: the models' tokenizer.
        keep_system: raise an error if the chat template rejects system messages.

    Raises:
        EvaluationError: the tokenizer has neither a beginning-of-text nor an end-of-text token.
    """

    def __init__(self, tokenizer: Any, *, keep_system: bool = False) -> None:
        self._tokenizer, self._keep_system = tokenizer, keep_system
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if prefix is None:
            raise EvaluationError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token; lm-eval's conventions require one"
            )
        self._told_about_system = False
        self._context = lru_cache(maxsize=1)(self.prompt)  # contexts are long and shared by all choices of an item
        self._prefix = int(prefix)
        self._prefix_text: str = tokenizer.decode([self._prefix])
        self.end_text: str | None = (
            None if tokenizer.eos_token_id is None else tokenizer.decode([tokenizer.eos_token_id])
        )

    def prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of a prompt, with the special tokens that the tokenizer adds unless the text already begins with the prefix token."""
        if self._prefix_text and text.startswith(self._prefix_text):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False))
        return tuple(self._tokenizer.encode(text))

    def generation_prompt(self, text: str) -> tuple[int, ...]:
        """Like `prompt`, for generation: here lm-eval does not take an end-of-text token for the prefix (`HFLM.tok_batch_encode`)."""
        bos: str | None = self._tokenizer.bos_token
        return tuple(self._tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))))

    def pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(context, continuation) tokens. Trailing spaces of the context move to the continuation, so that words stay whole.

        An empty context becomes the beginning-of-text (else end-of-text) token.
        """
        if not context:
            tokens = tuple(self._tokenizer.encode(continuation, add_special_tokens=False))
            if tokens and tokens[0] == self._prefix:
                return tokens[:1], tokens[1:]
            return (self._prefix,), tokens
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole, before = self.prompt(stripped + continuation), self._context(stripped)
        return before, whole[len(before) :]

    def windows(self, text: str, length: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Split a whole text into (context, continuation) pieces of at most `length` tokens; each token of the text is in exactly one continuation.

        The context is the beginning-of-text (else end-of-text) token for the first piece, one token of the text for the others, and as many
        tokens as fit for the last. An empty text has no pieces. Same as lm-eval's `loglikelihood_rolling` for a model with `max_length` = `length - 1`.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        pieces = get_rolling_token_windows(list(self.prompt(text)), self._prefix, max_seq_len=length - 1, context_len=1)
        return [(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, pieces)]

    def conversation(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Format a conversation with the tokenizer's chat template, rendered in transformers' sandbox.

        If the template rejects system messages, they are left out with a warning, as in lm-eval, unless `keep_system` is set.

        Args:
            messages: `role` (system, user, assistant) and `content` of each turn.
            add_generation_prompt: end with the start of an answer; otherwise the last turn is left open.

        Raises:
            EvaluationError: the tokenizer has no chat template, or it rejects this conversation.
        """
        try:
            try:
                return self._render(messages, add_generation_prompt)
            except TemplateError:
                others = [message for message in messages if message["role"] != "system"]
                if self._keep_system or len(others) == len(messages):
                    raise
                text = self._render(others, add_generation_prompt)
        except (TemplateError, ValueError, TypeError) as error:
            raise EvaluationError(f"the tokenizer's chat template rejects a conversation: {error}") from error
        if not self._told_about_system:
            logger.warning("the chat template rejects system messages: task descriptions are left out")
            self._told_about_system = True
        return text

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text
