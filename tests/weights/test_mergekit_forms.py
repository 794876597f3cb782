"""Recipes with `modules:`, LoRA sources or different vocabularies merge as in mergekit itself, run in its own environment on the files we export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from both_ways import assert_close, merged_both_ways
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from evomerge.recipe import Recipe, Setting, Slice, Source, TokenizerSpec
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import merge_to_folder

TARGETS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj")


def weight(value):
    return {"weight": (Setting(value),)}


def write_t5(folder, seed, n_decoder_layers=2):
    """An encoder with two layers and a decoder, as written by transformers."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": n_decoder_layers,
        "num_heads": 4,
    }
    sizes["feed_forward_proj"] = "gated-gelu"  # the variant supported by mergekit
    T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("depth", "says"), [(2, True), (3, True), (2, False)])
def test_decoder_with_different_layers_is_loaded_completely(tmp_path, depth, says):
    from transformers import T5ForConditionalGeneration

    model = Path(write_t5(tmp_path / "t5", 0, depth))
    config = json.loads((model / "config.json").read_text())
    if not says:
        del config["num_decoder_layers"]
        (model / "config.json").write_text(json.dumps(config))
    ends = tuple(Slice((Source(str(model)),), {}, module) for module in ("encoder", "shared"))
    layers = tuple(Slice((Source(str(model), part),), {}, "decoder") for part in ((0, depth), (1, depth), (1, depth)))
    out = merge_to_folder(Recipe("passthrough", (*ends, *layers), out_dtype="float32"), tmp_path / "out")
    loaded, found = T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert (len(loaded.encoder.block), len(loaded.decoder.block)) == (2, 3 * depth - 2)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


def write_adapter(folder, model, seed, **config):
    """A rank-4 adapter as written by PEFT."""
    weights, generator, factors = load_file(model / "model.safetensors"), torch.Generator().manual_seed(seed), {}
    for target in TARGETS:
        n_out, n_in = weights[f"{target}.weight"].shape
        factors[f"base_model.model.{target}.lora_A.weight"] = 0.2 * torch.randn(4, n_in, generator=generator)
        factors[f"base_model.model.{target}.lora_B.weight"] = 0.2 * torch.randn(n_out, 4, generator=generator)
        if config.get("use_dora"):
            factors[f"base_model.model.{target}.lora_magnitude_vector"] = torch.rand(n_out, generator=generator) + 0.5
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "r": 4, "lora_alpha": 6,
        "target_modules": sorted({target.split(".")[-1] for target in TARGETS}), "bias": "none", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return str(folder)


def module_recipes(folder):
    base, a, b = (write_t5(folder / f"t5-{seed}", seed) for seed in range(3))
    gradient = {"weight": (Setting((0.1, 0.9)),), "density": (Setting(0.4),)}

    def layers(module, *ranges):
        return tuple(
            Slice((Source(base, part), Source(a, part, weight(0.6)), Source(b, part, weight(0.3))), {}, module)
            for part in ranges
        )

    whole = tuple(Source(model) for model in (a, b))
    ends = tuple(Slice((Source(a, None, weight(1.0)),), {}, module) for module in ("encoder", "shared"))
    yield (
        "whole_modules",
        Recipe(
            "ties",
            (
                Slice(whole, gradient, "encoder"),
                Slice(whole, weight(0.4), "decoder"),
                Slice(whole, weight(0.7), "shared"),
            ),
            base,
            out_dtype="float32",
        ),
    )
    yield "layers_of_a_decoder", Recipe("ties", (*ends, *layers("decoder", (0, 2), (1, 2))), base, out_dtype="float32")
    yield (
        "other_sources_per_module",
        Recipe(
            "linear",
            (
                Slice((Source(a, None, weight(1.0)), Source(b, None, weight(2.0))), {}, "encoder"),
                Slice((Source(base, None, weight(1.0)),), {}, "decoder"),
                Slice((Source(b, None, weight(1.0)),), {}, "shared"),
            ),
            out_dtype="float32",
        ),
    )


def adapter_recipes(folder):
    base = write_tiny_llama(folder / "base", seed=0, dtype="float32", tied=False)
    other = write_tiny_llama(folder / "other", seed=1, dtype="float32", tied=False)
    plain, stable, dora = (
        write_adapter(folder / name, base, seed, **config)
        for seed, (name, config) in enumerate(
            {"plain": {}, "stable": {"use_rslora": True}, "dora": {"use_dora": True}}.items()
        )
    )
    adapted = [Source(str(base), lora=lora) for lora in (plain, stable, dora)]
    density = {"weight": (Setting(0.5),), "density": (Setting(0.3),)}
    for name, source in zip(("plain", "stable", "dora"), adapted, strict=True):
        yield f"adapter_{name}", Recipe("passthrough", (Slice((source,)),), out_dtype="float32")
    yield "adapters_ties", Recipe("ties", (Slice(tuple(adapted)),), str(base), density, out_dtype="float32")
    sliced = (Slice((Source(str(other), (0, 1)),)), Slice((Source(str(base), (0, 2), lora=plain),)))
    yield "adapter_in_slices", Recipe("passthrough", sliced, out_dtype="float32")
    alone = Source(str(base), (0, 2), weight(1.0), lora=plain)
    settings = {"normalize": (Setting(False),)}
    yield (
        "adapter_as_the_base_alone",
        Recipe("task_arithmetic", (Slice((alone,)),), alone.key, settings, *["bfloat16"] * 2),
    )
    yield "base_alone", Recipe("sce", (Slice((Source(str(base)),)),), str(base), out_dtype="float32")
    mixed = (Source(str(other)), Source(str(base), lora=plain))
    yield (
        "adapter_beside_a_model",
        Recipe("task_arithmetic", (Slice(mixed),), str(base), weight(0.6), out_dtype="float32"),
    )


def vocabulary_recipes(folder):
    """Slices in which the base's own tokens are provided by one of the models, by the slice's own base, or not at all."""
    models = []
    for seed, (name, tokens) in enumerate({"p": ("<p>", "<pq>"), "q": ("<pq>", "<q>"), "r": ("<q>",)}.items()):
        models.append(str(write_tiny_llama(folder / name, seed=seed, dtype="float32", tied=False)))
        tokenizer = Tokenizer.from_file(f"{models[-1]}/tokenizer.json")
        tokenizer.add_special_tokens(list(tokens))
        tokenizer.save(f"{models[-1]}/tokenizer.json")
    p, q, r = models

    def slices(*sources, bases=(None, None)):
        ranges = ((0, 1), (1, 2))
        return tuple(
            Slice(tuple(Source(model, layers, weight(0.4)) for model in models), base=base)
            for models, layers, base in zip(sources, ranges, bases, strict=True)
        )

    def recipe(method, *args, **bases):
        return Recipe(method, slices(*args, **bases), p, out_dtype="float32", tokenizer=TokenizerSpec("base"))

    yield "vocabulary_of_a_base_that_is_no_source", recipe("linear", (q, r), (r, q))
    yield "vocabulary_of_bases_of_slices", recipe("ties", (p, q, r), (r, q, p), bases=(q, r))
    yield "vocabulary_of_bases_that_only_lend", recipe("linear", (p, q, r), (r, q, p), bases=(q, r))
    copies = tuple(Slice((Source(model, layers),)) for model, layers in ((q, (0, 1)), (r, (1, 2))))
    yield (
        "vocabulary_of_copies",
        Recipe("passthrough", copies, p, out_dtype="float32", tokenizer=TokenizerSpec("base")),
    )


def vocabulary_of_a_module(folder):
    """The embedding belongs to the last module, whose sources differ from those of the first."""
    tokens = write_tiny_llama(folder / "tokens", seed=0, vocab=64)
    a, b, c = (write_t5(folder / f"t5-tokens-{seed}", seed) for seed in range(3))
    for model in (a, b, c):
        for file in tokens.glob("tokenizer*"):
            shutil.copy(file, model)
    slices = (
        Slice((Source(a, None, weight(1.0)),), {}, "encoder"),
        Slice((Source(b, None, weight(1.0)),), {}, "decoder"),
        Slice((Source(b, None, weight(1.0)), Source(c, None, weight(2.0))), {}, "shared"),
    )
    return Recipe("linear", slices, out_dtype="float32", tokenizer=TokenizerSpec("union"))


CASES = (
    "whole_modules", "layers_of_a_decoder", "other_sources_per_module", "adapter_plain", "adapter_stable", "adapter_dora", "adapters_ties",
    "adapter_in_slices", "adapter_as_the_base_alone", "base_alone", "adapter_beside_a_model", "vocabulary_of_a_base_that_is_no_source", "vocabulary_of_bases_of_slices",
    "vocabulary_of_bases_that_only_lend", "vocabulary_of_copies", "vocabulary_of_a_module",
)  # fmt: skip


@pytest.fixture(scope="module")
def merged(tmp_path_factory, mergekit):
    """case -> (our tensors, mergekit's)."""
    folder = tmp_path_factory.mktemp("forms")
    recipes = [*module_recipes(folder), *adapter_recipes(folder), *vocabulary_recipes(folder)]
    recipes.append(("vocabulary_of_a_module", vocabulary_of_a_module(folder)))
    return merged_both_ways(dict(recipes), folder, mergekit)


@pytest.mark.parametrize("name", CASES)
def test_equals_mergekit(merged, name):
    assert set(merged) == set(CASES)
    assert_close(*merged[name])
