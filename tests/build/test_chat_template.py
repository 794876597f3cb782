"""A search that presents items as conversations needs a tokenizer with a chat template."""

import json
from pathlib import Path

import pytest

from evomerge.build import evaluate_model, make_problem, parse_config
from evomerge.core import ConfigError
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task


def test_a_missing_chat_template_is_reported_before_anything_is_loaded(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        write_tiny_llama(tmp_path / name, seed=seed)
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    settings = {
        "models": {"base": "base", "experts": {"a": "a"}},
        "tasks": ["toy.yaml"],
        "evaluation": {"apply_chat_template": True},
        "budget": {"evaluations": 10},
    }
    config = parse_config(settings, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"base has no chat template; add one to this folder as chat_template.jinja"):
        make_problem(config)
    with pytest.raises(ConfigError, match=r"/a has no chat template; add one to this folder"):
        evaluate_model(config, tmp_path / "a")

    tokenizer = tmp_path / "base" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"chat_template": "{{ messages }}"}))
    make_problem(config)
