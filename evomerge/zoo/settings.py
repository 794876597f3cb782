"""Everything that determines a zoo besides its seed: sizes, steps, learning rates. Any change affects the zoo's fingerprint."""

from dataclasses import asdict, dataclass, field
from typing import Final

from evomerge.core import fingerprint

RECIPE_VERSION: Final = 1
"""Increased when a change of the code, rather than of the settings, changes the resulting zoo."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The Llama architecture that all four models share."""

    n_layers: int = 4
    hidden: int = 128
    intermediate: int = 352
    n_heads: int = 4
    n_kv_heads: int = 2
    max_positions: int = 128


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """Training of the base on a mixture of all formats, stopped while it is still poor at them.

    Attributes:
        batch_size: items per step.
        learning_rate: reached after `warmup_steps`, constant until the last `cooldown_steps`, which lower it to zero.
        max_steps: including the cool-down.
        check_every: steps between checks of held-out accuracy.
        shares: skill -> its share of the mixture, relative to the others.
        targets: skill -> held-out accuracy at which its share is multiplied by `share_at_target`; training ends once all
            skills listed here have reached theirs. A skill without a target never delays the end of training.
        share_at_target: see `targets`.
    """

    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    cooldown_steps: int = 5
    max_steps: int = 220
    check_every: int = 5
    shares: dict[str, float] = field(default_factory=lambda: {"largest": 3.0, "reverse": 7.0, "translate": 2.0})
    targets: dict[str, float] = field(default_factory=lambda: {"largest": 0.15, "reverse": 0.1})
    share_at_target: float = 0.2


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """Fine-tuning of one expert: cross-entropy on its skill, KL to the base on the answers to the other skills' prompts.

    Attributes:
        skill: the skill it learns.
        learning_rate: as in `BaseSettings`.
        max_steps: including the cool-down.
        min_steps: minimum number of steps, however high the accuracy is.
        target: held-out accuracy at which the cool-down starts.
        batch_size, other_batch_size: items per step of its own skill and of the other skills.
        kl_weight: weight of the divergence, in nats per token.
    """

    skill: str
    learning_rate: float
    max_steps: int
    min_steps: int = 60
    target: float = 0.93
    batch_size: int = 64
    other_batch_size: int = 64
    kl_weight: float = 1.0
    warmup_steps: int = 20
    cooldown_steps: int = 15
    check_every: int = 10


@dataclass(frozen=True, slots=True)
class ZooSettings:
    """A whole zoo.

    Attributes:
        model: of all its members.
        base: how the base is trained.
        experts: one for each skill. They are unequal on purpose, like real ones: see the package's docstring.
        n_check: held-out items per skill for checks of accuracy during training.
        n_score: items per skill of the `report` split for the table in the manifest.
        weight_decay, adam_betas, max_gradient_norm: optimiser settings (AdamW) for all models.
    """

    model: ModelSettings = ModelSettings()
    base: BaseSettings = BaseSettings()
    experts: tuple[ExpertSettings, ...] = (
        ExpertSettings("largest", learning_rate=2e-3, max_steps=180, min_steps=120),
        ExpertSettings("reverse", learning_rate=1e-3, max_steps=160),
        ExpertSettings("translate", learning_rate=1.5e-3, max_steps=180),
    )
    n_check: int = 100
    n_score: int = 400
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.98)
    max_gradient_norm: float = 1.0

    def fingerprint(self, seed: int) -> str:
        """Identify a zoo by its settings, its seed and the version of the recipe."""
        return fingerprint({"settings": asdict(self), "seed": seed, "version": RECIPE_VERSION})
