"""Models not built like Llama, and checkpoints as unusual exporters leave them: merged like others, or refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import EMBEDDING, INDEX, UP, WEIGHTS, configure, edit, recipe_of, run_merge
from safetensors.torch import load_file, save_file

from evomerge.plan import read_model_header
from evomerge.testing.tiny_models import write_tiny_llama

HEAD = "lm_head.weight"


def renamed(folder: Path, names: dict[str, str], **more: torch.Tensor) -> None:
    """Renames tensors of a model, and adds some."""
    tensors = {names.get(name, name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors | more, folder / WEIGHTS)


@pytest.mark.parametrize("odd", ["base", "a", "b"])
def test_a_tensor_of_different_shape_is_refused_in_the_base_too(models, refused, odd):
    write_tiny_llama(models / odd, seed=1, dtype="float32", intermediate_size=96)
    refused("mlp", "shape", "96", f"/{odd}", "only tensors of equal shape can be merged")


@pytest.mark.parametrize("odd", ["base", "a", "b"])
def test_integers_are_not_merged_with_weights(models, refused, odd):
    edit(models / odd, lambda tensors: tensors.update({UP: tensors[UP].long()}))
    refused(UP, "I64", "F32", f"/{odd}", "integers cannot be merged with weights")


@pytest.mark.parametrize(
    ("key", "value"), [("quantization", {"bits": 4, "group_size": 64}), ("compression_config", {"format": "int"})]
)
def test_models_quantised_according_to_configs_of_other_tools_are_refused(models, refused, key, value):
    configure(models / "b", **{key: value})
    refused("/b", f"quantised ({key})", "merge the original weights instead")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.uint32])
def test_packed_weights_are_refused_by_name(models, refused, dtype):
    for name in ("base", "a", "b"):
        edit(models / name, lambda tensors: tensors.update({UP: torch.ones(64, 4, dtype=dtype)}))
    refused("/base", UP, "shows that the model is quantised", "merge the original weights instead")


def test_counters_are_copied(models, monkeypatch):
    for number, name in enumerate(("base", "a", "b")):
        edit(models / name, lambda tensors, number=number: tensors.update(count=torch.tensor(number)))
    run_merge(models, monkeypatch, recipe_of("linear"))
    assert load_file(models / "out" / WEIGHTS)["count"].item() == 1


def test_weights_that_an_index_does_not_list_are_refused(models, refused):
    tensors = load_file(models / "a" / WEIGHTS)
    shard = "model-00001-of-00001.safetensors"
    save_file(tensors, models / "a" / shard)
    (models / "a" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
    refused("/a", WEIGHTS, INDEX, "does not list", "delete")
    (models / "a" / WEIGHTS).rename(models / "a" / "consolidated.safetensors")  # a name that no loader reads
    assert set(read_model_header(models / "a").tensors) == set(tensors)
    save_file(tensors, models / "a" / "model-00001-of-00002.safetensors")
    refused("model-00001-of-00002.safetensors", "does not list")


@pytest.mark.parametrize("copied", [("base",), ("a",), ("base", "a", "b")])
def test_a_stored_copy_of_the_tied_output_layer_changes_nothing(models, monkeypatch, copied):
    recipe = recipe_of("dare_ties")
    for source in recipe["models"]:
        source["parameters"]["density"] = 0.5
    run_merge(models, monkeypatch, recipe)
    expected = load_file(models / "out" / WEIGHTS)
    shutil.rmtree(models / "out")
    for name in copied:
        edit(models / name, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    run_merge(models, monkeypatch, recipe)
    merged = load_file(models / "out" / WEIGHTS)
    assert set(merged) == set(expected)
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_a_stored_copy_is_recognised_without_the_setting_too(models, monkeypatch):
    """transformers 4 omits settings that have their default, and tied is the default."""
    for name in ("base", "a", "b"):
        configure(models / name, tie_word_embeddings=None)
        edit(models / name, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    run_merge(models, monkeypatch, recipe_of())
    assert HEAD not in load_file(models / "out" / WEIGHTS)
    assert json.loads((models / "out" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize(("row", "reads_weights"), [(0, False), (127, True)])
def test_a_tied_output_layer_that_differs_from_the_embedding_is_refused(models, refused, row, reads_weights):
    for name in ("base", "a", "b"):
        write_tiny_llama(models / name, seed=1, dtype="float32", hidden=256)

    def change(tensors):
        tensors[HEAD] = tensors[EMBEDDING].clone()
        tensors[HEAD][row] += 1

    edit(models / "a", change)
    refused("/a", HEAD, "tie_word_embeddings: false", reads_weights=reads_weights)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.0.attn.bias",
        "h.0.attn.masked_bias",
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ],
)
@pytest.mark.parametrize("stored", [("base",), ("a",), ("base", "a", "b")])
def test_masks_of_old_checkpoints_are_ignored(models, monkeypatch, name, stored):
    for model in stored:
        edit(models / model, lambda tensors: tensors.update({name: torch.full((1, 1, 4, 4), -1e9)}))
    run_merge(models, monkeypatch, recipe_of(out_dtype="float16"))
    assert name not in load_file(models / "out" / WEIGHTS)


def with_tokens_reversed(folder: Path) -> None:
    """Reverses the order of the ids of a model's ordinary tokens, and of the corresponding rows, so that it stays the same model."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    ordinary = sorted(vocabulary.values())[3:]
    new = dict(zip(ordinary, reversed(ordinary), strict=True))
    content["model"]["vocab"] = {token: new.get(number, number) for token, number in vocabulary.items()}
    path.write_text(json.dumps(content))
    order = [new.get(row, row) for row in range(len(vocabulary))]

    def reorder(tensors):
        for name, tensor in tensors.items():
            if len(tensor) == len(vocabulary):
                tensors[name] = tensor[order]

    edit(folder, reorder)


@pytest.mark.parametrize(
    "names",
    [
        {},
        {EMBEDDING: "gpt_neox.embed_in.weight", HEAD: "embed_out.weight"},
        {EMBEDDING: "transformer.wte.weight"},
        {EMBEDDING: "wte.weight"},
        {EMBEDDING: "transformer.word_embeddings.weight"},
        {EMBEDDING: "model.decoder.embed_tokens.weight"},
        {EMBEDDING: "model.language_model.embed_tokens.weight"},
        {EMBEDDING: "language_model.model.embed_tokens.weight", HEAD: "language_model.lm_head.weight"},
        {EMBEDDING: "transformer.embedding.word_embeddings.weight", HEAD: "transformer.output_layer.weight"},
    ],
    ids=lambda names: names.get(EMBEDDING, "llama"),
)
def test_rows_are_rearranged_whatever_the_name_of_the_embedding(models, monkeypatch, names):
    """b is a with its tokens in a different order, so over one vocabulary their mean is a."""
    n_tokens = 98
    for name in "ab":
        write_tiny_llama(models / name, seed=1, dtype="float32", tied=False, vocab=n_tokens)
        renamed(models / name, names, **{"lm_head.bias": torch.arange(n_tokens) / 7})
    with_tokens_reversed(models / "b")
    assert not torch.equal(*(next(iter(load_file(models / name / WEIGHTS).values())) for name in "ab"))
    run_merge(models, monkeypatch, recipe_of("linear", tokenizer={"source": "union"}))
    merged, expected = load_file(models / "out" / WEIGHTS), load_file(models / "a" / WEIGHTS)
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ({EMBEDDING: "model.lookup.weight"}, "is not known; leave the tokenizer out"),
        ({UP: "model.layers.1.shared_head.head.weight"}, "'model.layers.1.shared_head.head.weight'"),
    ],
)
def test_token_rows_under_unknown_names_are_refused(models, refused, names, part):
    for name in "ab":
        write_tiny_llama(models / name, seed=1, dtype="float32", intermediate_size=128)
        renamed(models / name, names)
    refused(part, "models with the same vocabulary", recipe=recipe_of("linear", tokenizer={"source": "union"}))


def test_tensor_names_of_another_version_are_refused(models, refused):
    """As with GPT-2, whose names may or may not start with `transformer.`."""
    names = load_file(models / "a" / WEIGHTS)
    renamed(models / "a", {name: name.removeprefix("model.") for name in names})
    refused("'embed_tokens.weight'", f"'{EMBEDDING}'", "the same version of transformers")


@pytest.mark.parametrize("query", ["q_proj", "c_attn", "query_key_value"])
def test_unrelated_models_are_reported_whatever_the_names_of_their_queries(models, monkeypatch, caplog, query):
    for name in ("base", "a", "b"):
        names = load_file(models / name / WEIGHTS)
        renamed(models / name, {each: each.replace("q_proj", query) for each in names})
    run_merge(models, monkeypatch, recipe_of())
    assert "as far from those of every other model as if they were unrelated" in caplog.text


def test_a_stack_of_unrelated_models_mixes_no_weights_and_is_not_reported(models, monkeypatch, caplog):
    slices = [{"sources": [{"model": name, "layer_range": [0, 1]}]} for name in "ab"]
    run_merge(models, monkeypatch, {"merge_method": "passthrough", "slices": slices})
    assert "unrelated ones" not in caplog.text
