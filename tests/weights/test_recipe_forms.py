"""Adapters, several documents, chat templates, modules: how `evomerge merge` handles them, compared with plain torch."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_recipes import LINEAR, merge, three_models

from evomerge.build import merge_recipe
from evomerge.core import CheckpointError, ConfigError, RecipeError
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights.checkpoint.chat_templates import BUILT_IN

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def models(tmp_path):
    return three_models(tmp_path)


def adapter(folder, rank=2, tensors=None, **config):
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    factors = {
        f"base_model.model.{Q}.lora_A.weight": torch.randn(rank, 32, generator=generator),
        f"base_model.model.{Q}.lora_B.weight": torch.randn(32, rank, generator=generator),
    }
    save_file({**factors, **(tensors or {})}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return factors[f"base_model.model.{Q}.lora_A.weight"], factors[f"base_model.model.{Q}.lora_B.weight"]


ADAPTED = "merge_method: passthrough\nmodels: [{model: a+lora}]\n"


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 1.5),
        ({"init_lora_weights": "gaussian"}, 1.5),
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 8}}, 4.0),
        # the first pattern that matches the end of the name after a dot, as in PEFT
        ({"alpha_pattern": {"proj": 2, "q_pro": 4, "self_attn.q_proj": 6, "q_proj": 8}}, 3.0),
    ],
)
def test_adapter_adds_scaled_b_a_to_the_weight(models, config, scale):
    a, b = adapter(models / "lora", **config)
    merged, plain = merge(models, ADAPTED), load_file(models / "a" / "model.safetensors")
    for name, tensor in plain.items():
        wanted = tensor + scale * (b @ a) if name == f"{Q}.weight" else tensor
        torch.testing.assert_close(merged[name], wanted, rtol=1e-6, atol=1e-6, msg=name)


def test_dora_adapter_gives_the_learned_row_norms(models):
    norms = torch.rand(32) + 0.5
    adapter(models / "lora", tensors={f"base_model.model.{Q}.lora_magnitude_vector": norms}, use_dora=True)
    torch.testing.assert_close(merge(models, ADAPTED)[f"{Q}.weight"].norm(dim=1), norms)


def test_adapter_for_a_layer_it_also_stores_changes_the_stored_layer(models):
    """PEFT saves the weights of an embedding or output layer next to the factors for it."""
    embedding = "model.embed_tokens"
    own = load_file(models / "b" / "model.safetensors")[f"{embedding}.weight"]
    a, b = torch.randn(2, len(own)), torch.randn(own.shape[1], 2)
    prefix = f"base_model.model.{embedding}"
    tensors = {f"{prefix}.lora_embedding_A": a, f"{prefix}.lora_embedding_B": b, f"{prefix}.base_layer.weight": own}
    adapter(models / "lora", tensors=tensors)
    torch.testing.assert_close(merge(models, ADAPTED)[f"{embedding}.weight"], own + 1.5 * (b @ a).T)


def test_factors_of_a_transposed_layer_are_applied(models):
    a, b = adapter(models / "lora", fan_in_fan_out=True)
    wanted = load_file(models / "a" / "model.safetensors")[f"{Q}.weight"] + 1.5 * (b @ a).T
    torch.testing.assert_close(merge(models, ADAPTED)[f"{Q}.weight"], wanted)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3'"),
        ({"layer_replication": [[0, 1]]}, {}, "layer replication"),
        ({"lora_alpha": "x"}, {}, "expected a finite number"),
        ({"lora_alpha": 10**400}, {}, "expected a finite number"),
        ({"alpha_pattern": [8]}, {}, r"alpha_pattern in adapter_config.json is \[8\]; expected a mapping"),
        (
            {"alpha_pattern": {"q_proj(": 8}},
            {},
            r"pattern 'q_proj\(' of alpha_pattern .* not a valid regular expression",
        ),
        ({"alpha_pattern": {"q_proj": "x"}}, {}, "expected a finite number"),
        ({"init_lora_weights": "pissa_niter_16"}, {}, "init_lora_weights 'pissa_niter_16'.*save_pretrained"),
        ({"init_lora_weights": "OLoRA"}, {}, "init_lora_weights 'OLoRA'"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 32)}, "no such layer"),
        ({}, {"base_model.model.x.weight": torch.ones(2)}, "neither a LoRA factor nor"),
        (
            {},
            {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)},
            "the output layer of .* is tied to its embedding",
        ),
        ({}, {"base_model.model.lm_head.weight": torch.ones(2)}, "the output layer of .* is tied to its embedding"),
        ({}, {f"base_model.model.{Q.replace('q_', 'k_')}.lora_A.weight": torch.ones(2, 32)}, "lora_B is missing"),
        ({}, {"base_model.model.model.norm.weight": torch.ones(5)}, "has shape"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(models, config, tensors, message):
    adapter(models / "lora", tensors=tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        merge(models, ADAPTED)
    assert not (models / "out").exists()


def test_36_adapters_and_models_are_not_mistaken_for_each_other(models):
    adapter(models / "lora")
    with pytest.raises(CheckpointError, match="is a LoRA adapter, not a model"):
        merge(models, "merge_method: passthrough\nmodels: [{model: lora}]\n")
    with pytest.raises(CheckpointError, match="is a model, not a LoRA adapter"):
        merge(models, "merge_method: passthrough\nmodels: [{model: a+b}]\n")


def test_missing_or_pickled_adapter_is_refused(models):
    adapter(models / "lora")
    (models / "lora" / "adapter_model.safetensors").rename(models / "lora" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        merge(models, ADAPTED)
    (models / "lora" / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        merge(models, ADAPTED)
    save_file({}, models / "lora" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="contains no tensors"):
        merge(models, ADAPTED)
    (models / "lora" / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        merge(models, ADAPTED)


HALF = """
name: half
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: half, parameters: {weight: 1}}, {model: c, parameters: {weight: 3}}]
"""


def test_documents_are_merged_one_after_another(models):
    merged = merge(models, HALF)
    a, b, c = (load_file(models / name / "model.safetensors") for name in "abc")
    for name in a:
        torch.testing.assert_close(merged[name], ((a[name] + b[name]) / 2 + 3 * c[name]) / 4, rtol=1e-6, atol=1e-6)
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "c", "out", "r.yml"]
    again = merge_recipe(models / "out" / "recipe.yaml", models / "again")
    assert (again / "model.safetensors").read_bytes() == (models / "out" / "model.safetensors").read_bytes()


def test_recipe_of_the_result_records_the_options_used_for_all_documents(models):
    text = """
name: half
merge_method: dare_linear
base_model: a
models: [{model: b, parameters: {weight: 1, density: 0.5}}]
---
merge_method: dare_linear
base_model: a
models: [{model: half, parameters: {weight: 1, density: 0.5}}, {model: c, parameters: {weight: 1, density: 0.5}}]
"""
    first = merge(models, text, seed=7, dtype="bfloat16")
    again = load_file(merge_recipe(models / "out" / "recipe.yaml", models / "again") / "model.safetensors")
    other = merge(models, text, seed=8, dtype="bfloat16", overwrite=True)
    for name, tensor in first.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, again[name])
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_model_card_of_several_documents_names_no_local_folder(models):
    merge(models, HALF)
    card = (models / "out" / "README.md").read_text()
    assert "**Beware**: the attention weights of half (" in card
    assert str(models) not in card


def test_models_of_different_depth_are_merged_by_slices(models):
    write_tiny_llama(models / "deep", seed=5, n_layers=4, dtype="float32")
    text = """
merge_method: task_arithmetic
base_model: deep
parameters: {weight: 0.5}
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: deep, layer_range: [2, 4]}]
"""
    merged, a, deep = merge(models, text), *(load_file(models / name / "model.safetensors") for name in ("a", "deep"))
    assert json.loads((models / "out" / "config.json").read_text())["num_hidden_layers"] == 2
    for name in a:
        base = deep[name.replace("layers.1.", "layers.3.").replace("layers.0.", "layers.2.")]
        torch.testing.assert_close(merged[name], (a[name] + base) / 2, rtol=1e-6, atol=1e-6)
    for slices in ("models: [{model: a}]", "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]"):
        with pytest.raises(RecipeError, match="a layer_range for every model, including the base"):
            merge(models, text.partition("slices:")[0] + slices, overwrite=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: lineer\nmodels: [{model: a}]", "unknown merge method 'lineer'"),
        ("merge_method: ties\nbase_model: c\nmodels: [{model: a}]", "parameter 'weight' of .*/a has no value"),
        ("merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [0, 9]}]}]", r"layer_range \(0, 9\)"),
        ("merge_method: karcher\nslices: [{sources: [{model: a, layer_range: [2, 1]}]}]", r"layer_range \[2, 1\]"),
        ("merge_method: karcher\nmodels: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of"),
        ("merge_method: karcher\nmodels: [{model: a}]\ntokenizer_source: nothing", "tokenizer: model 'nothing' is no"),
        ("merge_method: karcher\nmodels: [{model: a}, {model: a+lora}]", r"models\[1\]: model 'lora' is not a folder"),
        (
            "merge_method: linear\nslices: [{base_model: d, sources: [{model: e, layer_range: [0, 1]}]}]",
            r"slices\[0\]\.sources\[0\]: model 'e' is no|slices\[0\]\.base_model: model 'd' is no",
        ),
        ("merge_method: ties\nbase_model: d\nmodels: [{model: a}]", "base_model: model 'd' is not a folder"),
        ("merge_method: karcher\nmodules: {decoderr: {models: [{model: a}]}}", "unknown decoderr"),
    ],
)
def test_recipe_errors_name_the_file(models, text, message):
    with pytest.raises(RecipeError, match=rf"^{models}/r\.yml: .*{message}"):
        merge(models, text)
    named = f"name: part\n{text}\n---\nmerge_method: karcher\nmodels: [{{model: part}}]\n"
    with pytest.raises(RecipeError, match=rf"^{models}/r\.yml(, document .*)?: .*{message}"):
        merge(models, named)


def test_filter_that_matches_no_tensor_is_reported(models, caplog):
    weights = "parameters: {weight: [{filter: self_atn, value: 0.5}, {filter: mlp, value: 0.2}, {value: 1}]}"
    text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: b}}]\n{weights}\n"
    merge(models, text)
    assert "r.yml: filter 'self_atn' matches no tensor name and has no effect; tensor names are model." in caplog.text
    caplog.clear()
    merge(models, text.replace("self_atn", "self_attn"), overwrite=True)
    assert "matches no tensor name" not in caplog.text


def test_chat_template_of_the_recipe_is_written(models):
    merge(models, LINEAR + "chat_template: chatml\n")
    assert "<|im_start|>" in (models / "out" / "chat_template.jinja").read_text()
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    merge(models, LINEAR + f"chat_template: '{marked}'\n", overwrite=True)
    assert (models / "out" / "chat_template.jinja").read_text() == marked
    for template, message in (
        ("nothing", r"r\.yml: .*neither Jinja text nor one of"),
        ("{% if %}", "line 1"),
        ("{% generation %}", "line 1: .*endgeneration"),
        ("{{" + 3000 * "(" + "1" + 3000 * ")" + "}}", "nested too deeply"),
    ):
        with pytest.raises(RecipeError, match=message):
            merge(models, LINEAR + f"chat_template: '{template}'\n", overwrite=True)
    (models / "b" / "chat_template.jinja").write_text("{{ mine }}")
    merge(models, LINEAR + "chat_template: auto\n", overwrite=True)
    assert (models / "out" / "chat_template.jinja").read_text() == "{{ mine }}"


def test_processor_uses_the_chat_template_of_the_recipe(models):
    """Even if the model has chat_template.json, which processors prefer to any other file."""
    from transformers import ProcessorMixin

    for name in "ab":
        (models / name / "chat_template.json").write_text(json.dumps({"chat_template": "{{ theirs }}"}))
    merge(models, LINEAR)
    assert json.loads((models / "out" / "chat_template.json").read_text()) == {"chat_template": "{{ theirs }}"}
    merge(models, LINEAR + "chat_template: auto\n", overwrite=True)
    assert (models / "out" / "chat_template.jinja").read_text() == "{{ theirs }}"
    merge(models, LINEAR + "chat_template: chatml\n", overwrite=True)
    settings, _ = ProcessorMixin.get_processor_dict(str(models / "out"))
    assert "<|im_start|>" in settings["chat_template"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3",
            "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s> [INST] S\n\nQ [/INST]"),
        ("alpaca", "S\n\n### Instruction:\nQ\n\n### Response:\n"),
        ("exaone", "[|system|]S[|endofturn|]\n[|user|]Q\n[|assistant|]"),
    ],
)
def test_built_in_chat_templates_render_as_expected(name, wanted):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    settings = {"chat_template": BUILT_IN[name], "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    (prompt,), _ = render_jinja_template([chat], **settings)
    assert prompt == wanted


def test_37_a_permuted_model_is_reported(models, caplog):
    plain = load_file(models / "a" / "model.safetensors")
    for name in "bc":
        save_file({key: tensor * 1.01 for key, tensor in plain.items()}, models / name / "model.safetensors")
    permuted = {key: tensor.flip(0) if "q_proj" in key else tensor for key, tensor in plain.items()}
    save_file(permuted, models / "c" / "model.safetensors")
    merge(models, LINEAR + "base_model: c\n")
    assert "permuted or rotated" in caplog.text
    assert f"of {models / 'c'} (" in caplog.text
    assert "Beware" in (models / "out" / "README.md").read_text()


def test_memory_limits_and_devices_are_checked(models):
    assert merge(models, LINEAR, max_memory="1MB").keys() == load_file(models / "a" / "model.safetensors").keys()
    with pytest.raises(RecipeError, match=r"max-memory is 1000 bytes, but merging .* needs about"):
        merge(models, LINEAR, max_memory=1000, overwrite=True)
    with pytest.raises(ConfigError, match="expected a size such as"):
        merge(models, LINEAR, max_memory="much", overwrite=True)
    for device in ("cuda:77", "meta", ""):
        with pytest.raises(RecipeError, match="cannot be used here"):
            merge(models, LINEAR, device=device, overwrite=True)


def test_memory_limit_accounts_for_plain_torch(models):
    recipe = (
        "merge_method: {}\nbase_model: a\nmodels: [{{model: b}}, {{model: c}}]\nparameters: {{weight: 1}}\ndtype: {}\n"
    )
    assert merge(models, recipe.format("ties", "float32"), max_memory=100_000)
    assert merge(models, recipe.format("ties", "bfloat16"), max_memory=100_000, overwrite=True)
    without_kernel = "merge_method: model_stock\nbase_model: a\nmodels: [{model: b}, {model: c}]\n"
    with pytest.raises(RecipeError, match="max-memory is 100000 bytes"):
        merge(models, without_kernel, max_memory=100_000, overwrite=True)
