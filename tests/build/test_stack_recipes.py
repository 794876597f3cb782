"""Merging the recipe of a stack gives no warnings: it names only tensors that the models have, and mixes no weights of unrelated models."""

import logging
from pathlib import Path

import pytest

from evomerge.build import make_problem, parse_config
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import merge_to_folder

TASK = Path(__file__).resolve().parents[2] / "tasks" / "reverse.yaml"


@pytest.mark.parametrize("tied", [True, False])
def test_a_stack_of_several_models_is_merged_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, tied: bool
) -> None:
    for seed, name in enumerate(("a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=4, tied=tied)
    settings = {
        "models": {"experts": {"a": "./a", "b": "./b"}},
        "space": {"stacking": {"encoding": "swap", "fixed_last": 0}},
        "tasks": [str(TASK)],
        "budget": {"evaluations": 999},
    }
    template = make_problem(parse_config(settings, folder=tmp_path)).template
    assert template is not None
    recipe = template.recipe(template.space.decode([0.7] * template.space.dimension))
    filters = {"embed_tokens", "model.norm.", "o_proj", "down_proj"} | (set() if tied else {"lm_head"})
    assert recipe.method == "linear"
    assert set(recipe.filters()) == filters
    with caplog.at_level(logging.WARNING):
        merge_to_folder(recipe, tmp_path / "out")
    assert not caplog.records
