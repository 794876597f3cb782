"""Greedy decoding of one batch with a transformers model and its key-value cache.

A compact loop instead of `model.generate`, which does far more than an arg max per step and cannot drop finished rows.
"""

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch

from evomerge.core import EngineError
from evomerge.engine.answers import AnswerDecoder, cut
from evomerge.engine.base import GenerateRequest, Generation


class _Row:
    """A prompt and what has been generated after it, at most `room` tokens."""

    def __init__(
        self, request: GenerateRequest, room: int, decoder: AnswerDecoder, end_tokens: Collection[int]
    ) -> None:
        self._request, self._room, self._decoder = request, room, decoder
        self._end_tokens = {*end_tokens, *decoder.stop_tokens(request.stop)}
        self._with_special = decoder.spans_special_tokens(request.stop)
        self._text_of = decoder.after(request.prompt)
        self._tokens: list[int] = []
        self._n_tokens = 0

    def add(self, token: int) -> bool:
        """Take the next token; True when the text is finished."""
        self._n_tokens += 1
        if token in self._end_tokens:  # an end token need not be a special token
            return True
        self._tokens.append(token)
        return self._n_tokens >= self._room or self._is_stopped()

    def _is_stopped(self) -> bool:
        stop = self._request.stop
        if not stop:
            return False
        texts = [self._text_of(self._tokens)]
        if self._with_special:
            texts.append(self._decoder.with_special_tokens(self._tokens))
        return any(string in text for string in stop for text in texts)

    def generation(self) -> Generation:
        """The text and the number of tokens so far."""
        return Generation(cut(self._text_of(self._tokens), self._request.stop), self._n_tokens)


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
    model: Any,
    decoder: AnswerDecoder,
    requests: Sequence[GenerateRequest],
    *,
    end_tokens: Collection[int],
    max_length: int,
    device: torch.device,
) -> list[Generation]:
    """Greedy continuations of one batch of prompts, in order, from a model that has a `cache_argument`.

    Texts end with one of `end_tokens`.

    Raises:
        EngineError: the model's logits contain NaN.
    """
    from transformers import DynamicCache

    rows = [
        _Row(request, min(request.max_tokens, max_length - len(request.prompt)), decoder, end_tokens)
        for request in requests
    ]
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
