"""Stacks of different depths in one running engine of each kind, compared with engines started from the exported checkpoints."""

import random
from pathlib import Path

import pytest

from evomerge.core import CheckpointError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest, make_engine
from evomerge.plan import folding_of, make_plan, padded, read_model_header
from evomerge.recipe import StackLayer, stack_recipe
from evomerge.testing.engines import cannot_start
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool, merge_to_folder, write_slots_folder

MAX_SLOTS = 5


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_one_engine_serves_every_depth(kind: str, tmp_path: Path) -> None:
    if cannot_start(kind):
        pytest.skip(cannot_start(kind))
    folders = [
        str(write_tiny_llama(tmp_path / name, seed=seed, hidden=128, vocab=99, dtype="float32", init_std=0.2))
        for seed, name in enumerate("ab")
    ]
    headers = {folder: read_model_header(folder) for folder in folders}
    first = headers[folders[0]]
    folding = folding_of(first)
    merger = Merger(WeightPool(headers))
    (tmp_path / "slots").mkdir()
    write_slots_folder(tmp_path / "slots", first, MAX_SLOTS)
    settings = {"dtype": "float32", "max_model_len": 64}
    options = {"kv_cache_memory_bytes": 16 << 20} if kind == "vllm" else {}
    engine = make_engine(kind, tmp_path / "slots", options=options, **settings)
    generate = [GenerateRequest(tuple(range(5, 5 + n)), 8) for n in (3, 9)]
    score = [LogLikelihoodRequest((7, 8, 9, 10), (token, 11)) for token in (12, 13)]
    draw = random.Random(2)
    for index, depth in enumerate((5, 1, 3)):
        layers = [
            StackLayer(draw.randrange(2), ((draw.choice(folders), 1.0),), draw.uniform(0.5, 1.6)) for _ in range(depth)
        ]
        recipe = stack_recipe(layers, ends=[(folders[0], 1.0)], folding=folding, out_dtype="float32")
        plan = padded(make_plan(recipe, headers), MAX_SLOTS, folding.silenced)
        engine.update(lambda target, plan=plan: merger.write(plan, target))
        merge_to_folder(recipe, tmp_path / f"exported-{index}")
        fresh = make_engine(kind, tmp_path / f"exported-{index}", options=options, **settings)
        assert engine.generate(generate) == fresh.generate(generate)
        for ours, theirs in zip(engine.loglikelihood(score), fresh.loglikelihood(score), strict=True):
            assert ours.log_probability == pytest.approx(theirs.log_probability, abs=1e-4)
        fresh.close()
    engine.close()


def test_stack_that_overflows_leaves_nothing_in_idle_layers(tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "a", seed=0, n_layers=2, dtype="float32"))
    header = read_model_header(model)
    folding, merger = folding_of(header), Merger(WeightPool({model: header}))
    (tmp_path / "slots").mkdir()
    write_slots_folder(tmp_path / "slots", header, MAX_SLOTS)
    engine = make_engine("transformers", tmp_path / "slots", dtype="float32", max_model_len=64)
    question = [LogLikelihoodRequest((7, 8, 9, 10), (12, 11))]

    def put(layers: list[StackLayer]) -> None:
        recipe = stack_recipe(layers, ends=[(model, 1.0)], folding=folding, out_dtype="float32")
        plan = padded(make_plan(recipe, {model: header}), MAX_SLOTS, folding.silenced)
        engine.update(lambda target: merger.write(plan, target))

    shallow = [StackLayer(0, ((model, 1.0),))]
    put(shallow)
    before = engine.loglikelihood(question)
    with pytest.raises(CheckpointError, match="outside the range"):
        put([*shallow * 3, StackLayer(1, ((model, 1e39),))])
    put(shallow)
    assert engine.loglikelihood(question) == before
    engine.close()
