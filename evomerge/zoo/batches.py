"""Items -> padded token batches, and exact scores of a model on them. Knows tokens and tensors, but nothing of training."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from evomerge.zoo.skills import N_CHOICES, Item
from evomerge.zoo.tokenizer import EOS_ID, PAD_ID

IGNORED = -100
"""Target at positions that are not scored (PyTorch's convention)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences.

    Attributes:
        tokens: (n, length) int64.
        targets: (n, length) int64: the next token if it is part of an answer or ends it, else `IGNORED`.
    """

    tokens: Tensor
    targets: Tensor


def answer_batch(tokenizer: Tokenizer, pairs: Iterable[tuple[str, str]], *, end_of_text: bool = True) -> Batch:
    """A batch of prompts with their answers; with `end_of_text`, the end-of-text token after an answer is a target too."""
    rows = []
    for prompt, answer in pairs:
        prompt_ids = tokenizer.encode(prompt).ids
        answer_ids = tokenizer.encode(f"{prompt} {answer}").ids[len(prompt_ids) :]
        rows.append((prompt_ids, answer_ids + [EOS_ID] * end_of_text))
    length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
    tokens = torch.full((len(rows), length), PAD_ID)
    targets = torch.full((len(rows), length), IGNORED)
    for i, (prompt_ids, answer_ids) in enumerate(rows):
        inputs = (prompt_ids + answer_ids)[:-1]
        tokens[i, : len(inputs)] = torch.tensor(inputs)
        targets[i, len(prompt_ids) - 1 : len(inputs)] = torch.tensor(answer_ids)
    return Batch(tokens, targets)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Logits (n, length, vocabulary). No mask is needed, because padding is on the right and attention is causal."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


class SkillProbe:
    """Exact accuracy on fixed items of one skill, as scored by the task files, in one forward pass.

    If items have choices: the fraction whose right answer has the highest summed log-probability. Otherwise: the fraction for which
    every answer token, including the end of text, is the model's most likely one given the previous ones, so that greedy decoding
    gives exactly these answers.

    Args:
        tokenizer: the zoo's.
        items: of one skill.
    """

    def __init__(self, tokenizer: Tokenizer, items: Sequence[Item]) -> None:
        self._choice = bool(items[0].choices)
        if self._choice:
            pairs = [(item.prompt, choice) for item in items for choice in item.choices]
            self._right = torch.tensor([item.choices.index(item.answer) for item in items])
            self._batch = answer_batch(tokenizer, pairs, end_of_text=False)
        else:
            self._batch = answer_batch(tokenizer, ((item.prompt, item.answer) for item in items))

    @torch.no_grad()
    def accuracy(self, model: Any) -> float:
        """The accuracy in [0, 1]."""
        targets = self._batch.targets
        logits = logits_of(model, self._batch.tokens)
        if self._choice:
            losses = functional.cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
            ).sum(1)
            right = losses.view(-1, N_CHOICES).argmin(1) == self._right
        else:
            right = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(1)
        return float(right.double().mean())
