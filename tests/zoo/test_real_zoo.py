"""The demo's zoo: every expert is good at its own skill and poor at the others, and the base is poor at all of them."""

import json
from pathlib import Path

import pytest
import torch

from evomerge.plan.model_folder import read_model_header
from evomerge.weights import WeightPool, strangers
from evomerge.zoo import SKILLS
from evomerge.zoo.batches import SkillProbe
from evomerge.zoo.build import GOOD_ACCURACY
from evomerge.zoo.skills import Part, fixed_items
from evomerge.zoo.tokenizer import build_tokenizer

POOR_ACCURACY = 0.4
"""Above chance and far below an expert: the most a model may reach on a skill that is not its own."""


@pytest.mark.parametrize("model", ["base", *SKILLS])
def test_experts_are_good_at_one_skill_each(zoo: Path, model: str) -> None:
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(zoo / model, dtype=torch.float32)
    assert 500_000 <= loaded.num_parameters() <= 2_000_000
    tokenizer = build_tokenizer()
    recorded = json.loads((zoo / "zoo.json").read_text(encoding="utf-8"))["scores"][model]
    for skill in SKILLS:
        accuracy = SkillProbe(tokenizer, fixed_items(skill, Part.REPORT, 400, 0)).accuracy(loaded)
        assert accuracy == pytest.approx(recorded[skill], abs=0.01)
        if skill == model:
            assert accuracy > GOOD_ACCURACY
        else:
            assert accuracy < POOR_ACCURACY


def test_experts_are_related(zoo: Path) -> None:
    headers = {name: read_model_header(zoo / name) for name in ("base", *SKILLS)}
    assert strangers(headers, WeightPool(headers).tensor) is None


def test_teacher_forcing_equals_greedy_generation(zoo: Path) -> None:
    from transformers import LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(zoo / "reverse", dtype=torch.float32)
    tokenizer = build_tokenizer()
    items = fixed_items("reverse", Part.CHECK, 20, seed=2) + fixed_items("largest", Part.CHECK, 20, seed=2)
    for item in items:
        prompt = torch.tensor([tokenizer.encode(item.prompt).ids])
        generated = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, do_sample=False)
        text = tokenizer.decode(generated[0, prompt.shape[1] :].tolist(), skip_special_tokens=True)
        assert (text.strip() == item.answer) == (SkillProbe(tokenizer, [item]).accuracy(loaded) == 1.0)
