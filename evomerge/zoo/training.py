"""Trains one model of the zoo: the base on the mixture, or an expert on its skill. Knows nothing of folders or processes.

All random numbers come from named streams of the seed, and everything runs on one thread, so the same machine gives the same bits.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from evomerge.core import random_stream
from evomerge.zoo.batches import IGNORED, Batch, SkillProbe, answer_batch, logits_of
from evomerge.zoo.settings import BaseSettings, ExpertSettings, ModelSettings, ZooSettings
from evomerge.zoo.skills import SKILLS, Item, Part, endless_items, fixed_items
from evomerge.zoo.tokenizer import EOS_ID, PAD_ID, TOKENS

Progress = Callable[[str], None]

_CHECK_SEED: Final = 1
"""Seed of the held-out items used during training: the same for every zoo."""


def use_one_exact_thread() -> None:
    """Make this process compute bit-identically: one thread, no nondeterministic kernels."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def new_model(settings: ModelSettings, seed: int) -> Any:
    """A `LlamaForCausalLM` with transformers' default initialisation, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_kv_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_stream(seed, "zoo", "initial weights").integers(2**31)))
        return LlamaForCausalLM(config)


class Trainer:
    """AdamW with warm-up, a constant rate, and a linear cool-down that starts on request or when the steps run out.

    Args:
        model: trained in place.
        stage: steps and learning rate.
        settings: the zoo's.
    """

    def __init__(self, model: Any, stage: BaseSettings | ExpertSettings, settings: ZooSettings) -> None:
        self._stage, self._settings = stage, settings
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=0.0, betas=settings.adam_betas, weight_decay=settings.weight_decay
        )
        self._end = stage.max_steps
        self.n_steps = 0

    @property
    def done(self) -> bool:
        """Whether the last step has been taken."""
        return self.n_steps >= self._end

    @property
    def checks(self) -> bool:
        """Whether held-out accuracy is due to be checked."""
        return self.n_steps % self._stage.check_every == 0 and self.n_steps < self._end - self._stage.cooldown_steps

    def cool_down(self) -> None:
        """End the training after `cooldown_steps` more steps."""
        self._end = min(self._end, self.n_steps + self._stage.cooldown_steps)

    def step(self, loss: Tensor) -> None:
        """One update of the weights."""
        stage = self._stage
        factor = min(
            (self.n_steps + 1) / stage.warmup_steps, (self._end - self.n_steps) / (stage.cooldown_steps + 1), 1.0
        )
        for group in self._optimizer.param_groups:
            group["lr"] = stage.learning_rate * factor
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_gradient_norm)
        self._optimizer.step()
        self.n_steps += 1


def train_base(tokenizer: Tokenizer, settings: ZooSettings, seed: int, progress: Progress) -> Any:
    """Train a base that has seen all formats and is still poor at them."""
    stage = settings.base
    model = new_model(settings.model, seed)
    trainer = Trainer(model, stage, settings)
    probes = _probes(tokenizer, settings)
    sources = _sources(seed, "base")
    mixture = random_stream(seed, "zoo", "base", "mixture")
    shares = dict(stage.shares)
    while not trainer.done:
        names = _draw_skills(mixture, shares, stage.batch_size)
        batch = _batch(tokenizer, [next(sources[name]) for name in names])
        loss = _answer_loss(logits_of(model, batch.tokens), batch.targets)
        trainer.step(loss)
        if trainer.checks:
            found = {name: probe.accuracy(model) for name, probe in probes.items()}
            reached = {name for name, target in stage.targets.items() if found[name] >= target}
            shares = {
                name: share * (stage.share_at_target if name in reached else 1.0)
                for name, share in stage.shares.items()
            }
            progress(_line("base", trainer.n_steps, loss, found))
            if reached == set(stage.targets):
                trainer.cool_down()
    progress(_line("base", trainer.n_steps, loss, {name: probe.accuracy(model) for name, probe in probes.items()}))
    return model


def train_expert(
    base: Any,
    reference: Any,
    tokenizer: Tokenizer,
    stage: ExpertSettings,
    settings: ZooSettings,
    seed: int,
    progress: Progress,
) -> Any:
    """Fine-tunes `base` in place into the expert for `stage.skill`, keeping it close to `reference` on the other skills.

    Args:
        base: the initial model, float32.
        reference: a second copy of the same model, which is only read.
        tokenizer: the zoo's.
        stage: the expert's settings.
        settings: the zoo's.
        seed: the zoo's.
        progress: receives a line at every check.
    """
    trainer = Trainer(base, stage, settings)
    probes = _probes(tokenizer, settings)
    sources = _sources(seed, stage.skill)
    others = [name for name in SKILLS if name != stage.skill]
    n_own = stage.batch_size
    while not trainer.done:
        own = list(islice(sources[stage.skill], n_own))
        rest = [next(sources[others[i % len(others)]]) for i in range(stage.other_batch_size)]
        batch = _batch(tokenizer, own + rest)
        logits = logits_of(base, batch.tokens)
        with torch.no_grad():
            wanted = logits_of(reference, batch.tokens[n_own:])
        loss = _answer_loss(logits[:n_own], batch.targets[:n_own])
        loss = loss + stage.kl_weight * _divergence(logits[n_own:], wanted, batch.targets[n_own:])
        trainer.step(loss)
        if trainer.checks:
            own_accuracy = probes[stage.skill].accuracy(base)
            progress(_line(stage.skill, trainer.n_steps, loss, {stage.skill: own_accuracy}))
            if own_accuracy >= stage.target and trainer.n_steps >= stage.min_steps:
                trainer.cool_down()
    found = {name: probe.accuracy(base) for name, probe in probes.items()}
    progress(_line(stage.skill, trainer.n_steps, loss, found))
    return base


def _probes(tokenizer: Tokenizer, settings: ZooSettings) -> dict[str, SkillProbe]:
    return {
        name: SkillProbe(tokenizer, fixed_items(name, Part.CHECK, settings.n_check, _CHECK_SEED)) for name in SKILLS
    }


def _sources(seed: int, model: str) -> dict[str, Iterator[Item]]:
    return {name: endless_items(name, Part.TRAIN, random_stream(seed, "zoo", model, name)) for name in SKILLS}


def _draw_skills(stream: np.random.Generator, shares: Mapping[str, float], n: int) -> list[str]:
    names, weights = list(shares), np.array(list(shares.values()))
    return [names[i] for i in stream.choice(len(names), n, p=weights / weights.sum())]


def _batch(tokenizer: Tokenizer, items: list[Item]) -> Batch:
    return answer_batch(tokenizer, ((item.prompt, item.answer) for item in items))


def _answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of the answer tokens, in nats."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _divergence(logits: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """Mean KL(wanted || logits) over the answer tokens, in nats."""
    scored = targets != IGNORED
    return functional.kl_div(
        logits[scored].log_softmax(-1), wanted[scored].log_softmax(-1), log_target=True, reduction="batchmean"
    )


def _line(model: str, step: int, loss: Tensor, found: Mapping[str, float]) -> str:
    accuracies = ", ".join(f"{name} {accuracy:.2f}" for name, accuracy in found.items())
    return f"{model}: step {step}, loss {loss.item():.2f}, held-out accuracy {accuracies}"
