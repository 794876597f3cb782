"""The process that trains one model: `python -m evomerge.zoo.worker '<job as JSON>'`. Prints progress lines.

It is a separate process because training needs one thread and no accelerator, whatever the caller has set up, and because
three experts on one thread each use two cores better than one expert on two threads.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evomerge.core import Json, atomic_write_json
from evomerge.zoo.settings import BaseSettings, ExpertSettings, ModelSettings, ZooSettings

BASE = "base"


@dataclass(frozen=True, slots=True)
class Job:
    """The job of a worker.

    Attributes:
        model: `base` or an expert's skill.
        folder: the zoo being built; the model is written to the subfolder of its name. Experts read `folder/base`.
        seed: the zoo's.
        settings: the zoo's.
    """

    model: str
    folder: Path
    seed: int
    settings: ZooSettings

    def to_json(self) -> str:
        """The command-line argument of the worker."""
        return json.dumps(
            {"model": self.model, "folder": str(self.folder), "seed": self.seed, "settings": asdict(self.settings)}
        )

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The inverse of `to_json`."""
        data = json.loads(text)
        return cls(data["model"], Path(data["folder"]), data["seed"], _settings(data["settings"]))


def run(job: Job) -> None:
    """Train the model, and write its folder and, next to it, `<model>.scores.json`: skill -> accuracy on `report` items."""
    from evomerge.zoo.batches import SkillProbe
    from evomerge.zoo.skills import SKILLS, Part, fixed_items
    from evomerge.zoo.tokenizer import build_tokenizer
    from evomerge.zoo.training import train_base, train_expert, use_one_exact_thread

    use_one_exact_thread()
    tokenizer, settings = build_tokenizer(), job.settings
    if job.model == BASE:
        model = train_base(tokenizer, settings, job.seed, _say)
    else:
        stage = next(stage for stage in settings.experts if stage.skill == job.model)
        start, reference = (_load(job.folder / BASE) for _ in range(2))
        model = train_expert(start, reference, tokenizer, stage, settings, job.seed, _say)
    _save(model, job.folder / job.model, settings.model)
    # score the stored weights, which are rounded to bfloat16
    stored = _load(job.folder / job.model)
    scores: dict[str, Json] = {
        name: SkillProbe(tokenizer, fixed_items(name, Part.REPORT, settings.n_score, 0)).accuracy(stored)
        for name in SKILLS
    }
    atomic_write_json(job.folder / f"{job.model}.scores.json", scores)


def _say(line: str) -> None:
    # A single write below the pipe's atomic size, so that lines of the three experts never mix.
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _load(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _save(model: Any, folder: Path, settings: ModelSettings) -> None:
    import torch

    from evomerge.zoo.tokenizer import EOS_ID, PAD_ID, write_tokenizer

    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    atomic_write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    write_tokenizer(folder, settings.max_positions)


def _settings(data: dict[str, Any]) -> ZooSettings:
    experts = tuple(ExpertSettings(**expert) for expert in data.pop("experts"))
    model, base = ModelSettings(**data.pop("model")), BaseSettings(**data.pop("base"))
    return ZooSettings(model=model, base=base, experts=experts, **data | {"adam_betas": tuple(data["adam_betas"])})


if __name__ == "__main__":
    run(Job.from_json(sys.argv[1]))
