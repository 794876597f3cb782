"""Merges of models with different vocabularies: tokens, ids in configs, and embedding rows, compared with plain torch."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from small_recipes import LINEAR, merge, three_models
from tokenizers import Tokenizer

from evomerge.core import CheckpointError, RecipeError
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture
def models(tmp_path):
    return three_models(tmp_path)


def add_token(folder, token):
    """Adds a token of the model's own to its tokenizer, as the next row of its embedding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([token])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.token_to_id(token)


def embeddings(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def merged_vocabulary(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def test_union_tokenizer_contains_tokens_of_both_models(models):
    ours, theirs = add_token(models / "a", "<ours>"), add_token(models / "b", "<theirs>")
    merged = merge(models, LINEAR + "tokenizer: {source: union, pad_to_multiple_of: 64}\n")["model.embed_tokens.weight"]
    ids, a, b = merged_vocabulary(models / "out"), embeddings(models / "a"), embeddings(models / "b")
    assert merged.shape[0] == 128
    assert json.loads((models / "out" / "config.json").read_text())["vocab_size"] == 128
    torch.testing.assert_close(merged[ids["<ours>"]], a[ours])
    torch.testing.assert_close(merged[ids["<theirs>"]], b[theirs])
    torch.testing.assert_close(merged[ids["x"]], (a[ids["x"]] + b[ids["x"]]) / 2)
    torch.testing.assert_close(merged[127], merged[: len(ids)].mean(dim=0))


def test_model_with_zero_weight_provides_rows_for_its_own_tokens(models):
    ours, theirs = add_token(models / "a", "<ours>"), add_token(models / "b", "<theirs>")
    text = LINEAR.replace("model: b, parameters: {weight: 1}", "model: b, parameters: {weight: 0}")
    text += "tokenizer: {source: union}\n"
    merged = merge(models, text)["model.embed_tokens.weight"]
    ids, a, b = merged_vocabulary(models / "out"), embeddings(models / "a"), embeddings(models / "b")
    assert torch.equal(merged[ids["<ours>"]], a[ours])
    assert torch.equal(merged[ids["x"]], a[ids["x"]])
    assert torch.equal(merged[ids["<theirs>"]], b[theirs])
    with pytest.raises(RecipeError, match=r"embed_tokens.* needs about") as refused:
        merge(models, text, max_memory=a.nbytes + 2 * merged.nbytes, overwrite=True)
    needed = int(re.search(r"needs about (\d+)", str(refused.value))[1])
    assert needed >= a.nbytes + b.nbytes + 2 * merged.nbytes, "both as stored, the rearranged rows, and the result"


def test_tokenizer_of_another_folder_can_be_used(models):
    ours = add_token(models / "a", "<ours>")
    (models / "b").rename(models / "tokenizer")
    add_token(models / "tokenizer", "<theirs>")
    add_token(models / "tokenizer", "<ours>")
    text = "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer_source: tokenizer\n"
    merged = merge(models, text)["model.embed_tokens.weight"]
    ids, a = merged_vocabulary(models / "out"), embeddings(models / "a")
    assert ids["<theirs>"] == ours
    torch.testing.assert_close(merged[ids["<ours>"]], a[ours])
    assert not merged[ids["<theirs>"]].any()
    assert str(models) not in (models / "out" / "README.md").read_text()


def test_ids_in_configs_refer_to_the_new_vocabulary(models, caplog):
    content = json.loads((models / "b" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    (models / "tokenizer").mkdir()
    (models / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    lost = add_token(models / "a", "<lost>")
    x, y = vocabulary["y"], vocabulary["x"]
    text = "merge_method: passthrough\nmodels: [{model: a}]\ntokenizer_source: tokenizer\n"
    ids = {"eos_token_id": [x, lost], "forced_eos_token_id": x, "suppress_tokens": [y, lost], "pad_token_id": lost}
    ids |= {"image_token_index": x, "bad_words_ids": [[x, y], [x, lost]]}
    (models / "a" / "generation_config.json").write_text(json.dumps(ids))
    merge(models, text)
    written = json.loads((models / "out" / "generation_config.json").read_text())
    assert written == {
        "eos_token_id": [y],
        "forced_eos_token_id": y,
        "suppress_tokens": [x],
        "pad_token_id": None,
        "image_token_index": y,
        "bad_words_ids": [[y, x]],
    }
    assert "no token that ends" not in caplog.text
    (models / "a" / "generation_config.json").write_text(json.dumps({"eos_token_id": lost, "bad_words_ids": [[lost]]}))
    merge(models, text, overwrite=True)
    assert f"no end-of-text token of {models}/a" in caplog.text
    written = json.loads((models / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": None, "bad_words_ids": None}


def test_token_missing_from_all_embedding_sources_is_reported(models, caplog):
    ids = [add_token(models / name, f"<{name}>") for name in "ab"]
    slices = "slices: [{sources: [{model: b, layer_range: [0, 2]}]}]\n"
    merged = merge(models, "merge_method: passthrough\nbase_model: a\ntokenizer_source: base\n" + slices)
    assert not merged["model.embed_tokens.weight"][ids[0]].any()
    assert (
        "no model that contributes to the embedding has these tokens, so their rows are zeros: 1, '<a>'" in caplog.text
    )
    caplog.clear()
    merge(models, LINEAR + "tokenizer_source: union\n", overwrite=True)
    assert "zeros" not in caplog.text


def test_model_without_tokenizer_has_the_vocabulary_of_the_first(models, caplog):
    (models / "b" / "tokenizer.json").unlink()
    text = LINEAR + "tokenizer: {source: union, tokens: {<new>: {source: {kind: model_token, model: b, token: x}}}}\n"
    merged = merge(models, text)["model.embed_tokens.weight"]
    ids, a, b = merged_vocabulary(models / "out"), embeddings(models / "a"), embeddings(models / "b")
    torch.testing.assert_close(merged[ids["x"]], (a[ids["x"]] + b[ids["x"]]) / 2)
    torch.testing.assert_close(merged[ids["<new>"]], b[ids["x"]])
    assert f"{models / 'b'}: no tokenizer; its vocabulary is assumed to be that of {models / 'a'}" in caplog.text
    (models / "a" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"/a: has no tokenizer \(tokenizer.json, ...\)"):
        merge(models, text, overwrite=True)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", {"eos_token_id": {"a": 1}}, "Validation error for field 'eos_token_id'"),
        ("config.json", {"num_attention_heads": 0}, "division"),
        ("tokenizer_config.json", {"tokenizer_class": 5}, "'int' object"),
        ("tokenizer_config.json", {"chat_template": {"x": 5}}, "must be str"),
    ],
)
def test_tokenizer_that_transformers_cannot_read_is_refused(models, file, change, message):
    for name in "ab":
        settings = json.loads((models / name / file).read_text()) | change
        (models / name / file).write_text(json.dumps(settings))
    with pytest.raises(RecipeError, match=f"/a: its tokenizer cannot be read: .*{message}"):
        merge(models, LINEAR + "tokenizer_source: union\n")


def test_rules_for_single_tokens_are_applied(models):
    rules = """
tokenizer:
  source: base
  tokens:
    <new>: {source: {kind: model_token, model: b, token: y}}
    <zero>: {source: {kind: zero}}
    x: {source: a, force: true}
"""
    merged = merge(models, LINEAR + rules)["model.embed_tokens.weight"]
    ids, a, b = merged_vocabulary(models / "out"), embeddings(models / "a"), embeddings(models / "b")
    torch.testing.assert_close(merged[ids["<new>"]], b[ids["y"]])
    assert not merged[ids["<zero>"]].any()
    torch.testing.assert_close(merged[ids["x"]], a[ids["x"]])
    with pytest.raises(RecipeError, match="has no embedding for 'nothing'"):
        merge(models, LINEAR + rules.replace("token: y", "token: nothing"), overwrite=True)


def test_token_rule_must_name_a_model_of_the_embedding_slice(models):
    rules = "tokenizer: {source: base, tokens: {x: {source: a, force: true}}}\n"
    slices = "slices: [{sources: [{model: a, layer_range: [0, 1]}]}, {sources: [{model: b, layer_range: [0, 1]}]}]\n"
    text = "merge_method: passthrough\n" + slices + rules
    merged = merge(models, text)["model.embed_tokens.weight"]
    torch.testing.assert_close(merged, embeddings(models / "a")[: len(merged)])
    for seed, name in enumerate("ab"):
        write_tiny_llama(models / name, seed=seed, dtype="float32", tied=False)
    with pytest.raises(RecipeError, match=r"must be a source of the embedding .* their sources are .*b$"):
        merge(models, text, overwrite=True)
