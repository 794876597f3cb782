"""Greedy decoding of one batch with a transformers model and its key-value cache.

A compact loop instead of `model.generate`, which does far more than an arg max per step and cannot drop finished rows.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.core import EngineError
from evomerge.engine.base import GenerateRequest, Generation
from evomerge.engine.stop_tokens import StopTokens

_CONTEXT_TOKENS = 6
"""Prompt tokens decoded together with the answer: some tokenizers drop a leading space at the start of a text."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """Turns generated tokens into text.

    Attributes:
        tokenizer: a transformers tokenizer.
        end_tokens: tokens that end a text.
        stop_tokens: special tokens that end a text because their own text contains a stop string.
    """

    tokenizer: Any
    end_tokens: frozenset[int]
    stop_tokens: StopTokens

    def after(self, prompt: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """Returns a function: tokens -> the text they add to `prompt`, without special tokens or an incomplete character at the end."""
        context = list(prompt[-_CONTEXT_TOKENS:])
        before = self._plain(context)

        def text(tokens: Sequence[int]) -> str:
            both = self._plain([*context, *tokens])
            added = both[len(before) :] if both.startswith(before) else self._plain(tokens)
            return added.rstrip("\ufffd")

        return text

    def _plain(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class _Row:
    """A prompt and what has been generated after it, at most `room` tokens."""

    def __init__(self, request: GenerateRequest, room: int, decoder: Decoder) -> None:
        self._stop, self._room = request.stop, room
        self._end_tokens = decoder.end_tokens.union(decoder.stop_tokens.of(request.stop))
        self._text_of = decoder.after(request.prompt)
        self._tokens: list[int] = []
        self._n_tokens = 0
        self._text = ""

    def add(self, token: int) -> bool:
        """Takes the next token; True when the text is finished."""
        self._n_tokens += 1
        if token in self._end_tokens:  # an end token need not be a special token
            return True
        self._tokens.append(token)
        return self._is_stopped() or self._n_tokens >= self._room

    def _is_stopped(self) -> bool:
        if not self._stop:
            return False
        text = self._text = self._text_of(self._tokens)
        for stop in self._stop:
            self._text = self._text.partition(stop)[0]
        return self._text != text

    def generation(self) -> Generation:
        """The text and the number of tokens so far."""
        return Generation(self._text if self._stop else self._text_of(self._tokens), self._n_tokens)


STATEFUL = (
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text",
    "qwen3_next", "zamba2",
)  # fmt: skip
"""Model types whose recurrent state is unaffected by padding (checked by a test); that of mamba, falcon_mamba and recurrent_gemma is affected."""


def cache_argument(model: Any) -> str | None:
    """Name of the cache argument of the model's `forward`; None if `decode_batch` cannot decode this model with a cache.

    transformers renamed the argument in 5.24. A model may accept it and still keep its state elsewhere, or let padding change its state.
    """
    if not model._supports_default_dynamic_cache() or (
        model._is_stateful and model.config.get_text_config().model_type not in STATEFUL
    ):
        return None
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


@torch.inference_mode()
def decode_batch(
    model: Any, decoder: Decoder, requests: Sequence[GenerateRequest], *, max_length: int, device: torch.device
) -> list[Generation]:
    """Greedy continuations of one batch of prompts, in order, from a model that has a `cache_argument`.

    Raises:
        EngineError: the model's logits contain NaN.
    """
    from transformers import DynamicCache

    rows = [_Row(request, min(request.max_tokens, max_length - len(request.prompt)), decoder) for request in requests]
    active = list(rows)
    tokens, mask = _left_padded([request.prompt for request in requests], device)
    # Positions are counted from each prompt's first real token.
    positions = (
        torch.arange(tokens.shape[1], device=device)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    )
    cache = DynamicCache(config=model.config)
    given = {str(cache_argument(model)): cache}
    while True:
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **given,
        )
        logits = output.logits[:, -1]
        if bool(logits.amax(dim=-1).isnan().any()):
            raise EngineError(f"transformers engine: NaN logits while generating for {len(active)} prompts")
        chosen = logits.argmax(dim=-1)
        unfinished = [
            i for i, (row, token) in enumerate(zip(active, chosen.tolist(), strict=True)) if not row.add(token)
        ]
        if not unfinished:
            return [row.generation() for row in rows]
        positions = positions[:, -1:] + 1
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        if len(unfinished) < len(active):
            kept = torch.tensor(unfinished, device=device)
            active = [active[i] for i in unfinished]
            cache.reorder_cache(kept)  # not batch_select_indices, which recurrent states lack
            chosen = chosen[kept]
            if mask is not None:
                mask, positions = mask[kept], positions[kept]
        tokens = chosen[:, None]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(tokens, attention mask), each of shape (n, longest); the mask is None if no prompt needs padding."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.tensor([[*[0] * (longest - len(prompt)), *prompt] for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return tokens, None
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return tokens, (torch.arange(longest, device=device)[None] >= padding[:, None]).long()
