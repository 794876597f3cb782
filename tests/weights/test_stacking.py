"""Folded layer stacks compared with models whose hidden states are multiplied by hand, for every architecture that can be stacked."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from evomerge.core import RecipeError
from evomerge.plan import FOLDINGS, active_parameters, folding_of, make_plan, padded, read_model_header
from evomerge.recipe import (
    Folding,
    Recipe,
    Setting,
    Slice,
    Source,
    StackLayer,
    recipe_file_from_yaml,
    recipe_to_yaml,
    stack_recipe,
)
from evomerge.recipe.scale_range import GROWTH_BITS
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool, merge_to_folder, write_slots_folder

N_LAYERS = 3
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
}
PLAIN = {"layer_types": ["full_attention"] * N_LAYERS, "head_dim": 8}
ARCHITECTURES = {
    "GemmaForCausalLM": ("gemma", {"head_dim": 8}),
    "Gemma2ForCausalLM": ("gemma2", PLAIN),
    "Gemma3ForCausalLM": ("gemma3_text", PLAIN),
    "LlamaForCausalLM": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": ("mistral", {"head_dim": 8, "sliding_window": 8}),
    "Qwen2ForCausalLM": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", MOE),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "Qwen3MoeForCausalLM": ("qwen3_moe", {**MOE, "head_dim": 8}),
    "MixtralForCausalLM": ("mixtral", MOE),
}


def write_model(folder: Path, architecture: str, seed: int, **changes: object) -> str:
    """A tiny random float32 model of a real transformers class, with biases and norms that differ from their initial values."""
    kind, settings = ARCHITECTURES[architecture]
    settings = {**COMMON, **settings, **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.mul_(5)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    return write_model(folder / "a", request.param, 0), write_model(folder / "b", request.param, 1)


def random_path(models: tuple[str, str], seed: int, depth: int) -> list[StackLayer]:
    """A path with repeats, skips, both models, and scales from 0.3 to 2."""
    draw = random.Random(seed)
    return [
        StackLayer(
            draw.randrange(N_LAYERS),
            ((draw.choice(models), 1.0),),
            math.exp(draw.uniform(math.log(0.3), math.log(2.0))),
        )
        for _ in range(depth)
    ]


def stacked(models: tuple[str, str], layers: list[StackLayer], **settings: object) -> Recipe:
    folding = folding_of(read_model_header(models[0]))
    return stack_recipe(layers, ends=[(models[0], 1.0)], folding=folding, out_dtype="float32", **settings)


def logits(folder: Path, tokens: torch.Tensor, scales: list[float] | None = None) -> torch.Tensor:
    """The logits of a checkpoint; with `scales`, the hidden state is multiplied at the entrance of every layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for layer, scale in zip(model.model.layers, scales or [], strict=False):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, scale=scale: (
                (args[0] * scale, *args[1:]) if args else (),
                kwargs if args else {**kwargs, "hidden_states": kwargs["hidden_states"] * scale},
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        return model(tokens).logits


def test_folded_stack_equals_hidden_states_multiplied_by_hand(models: tuple[str, str], tmp_path: Path) -> None:
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(5))
    for seed, depth in enumerate((2, 6)):
        layers = random_path(models, seed, depth)
        unscaled = [StackLayer(layer.index, layer.weights) for layer in layers]
        merge_to_folder(stacked(models, layers), tmp_path / f"folded-{seed}")
        merge_to_folder(stacked(models, unscaled), tmp_path / f"plain-{seed}")
        by_hand = logits(tmp_path / f"plain-{seed}", tokens, [layer.scale for layer in layers])
        folded = logits(tmp_path / f"folded-{seed}", tokens)
        assert float((folded - by_hand).norm() / by_hand.norm()) < 1e-4
        assert torch.equal(folded.argmax(-1), by_hand.argmax(-1))
        without = logits(tmp_path / f"plain-{seed}", tokens)
        assert float((without - by_hand).norm() / by_hand.norm()) > 1e-2, (
            "the scales matter, so the comparison can fail"
        )


def test_idle_layers_change_nothing(models: tuple[str, str], tmp_path: Path) -> None:
    """A shallow stack in a deeper model, whose unused layers still hold the previous candidate's weights."""
    headers = {folder: read_model_header(folder) for folder in models}
    merger = Merger(WeightPool(headers))
    before, after = (make_plan(stacked(models, random_path(models, 3, depth)), headers) for depth in (6, 2))
    weights = dict(merger.tensors(before))
    weights |= dict(merger.tensors(padded(after, 6, folding_of(headers[models[0]]).silenced)))
    write_slots_folder(tmp_path, headers[models[0]], 6)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    merge_to_folder(stacked(models, random_path(models, 3, 2)), tmp_path / "alone")
    tokens = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(6))
    assert torch.equal(logits(tmp_path, tokens), logits(tmp_path / "alone", tokens))


def test_active_parameters_count_only_the_experts_used_per_token(models: tuple[str, str], tmp_path: Path) -> None:
    header = read_model_header(models[0])
    recipe = stacked(models, random_path(models, 4, 5))
    plan = make_plan(recipe, {folder: read_model_header(folder) for folder in models})
    merge_to_folder(recipe, tmp_path / "merged")
    stored = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "merged").parameters())
    config = header.config
    idle = MOE["num_experts"] - MOE["num_experts_per_tok"] if "num_experts_per_tok" in config else 0
    width = config["intermediate_size" if config["model_type"] == "mixtral" else "moe_intermediate_size"] if idle else 0
    assert active_parameters(plan, config) == stored - 5 * idle * 3 * config["hidden_size"] * width


def test_slots_folder_takes_no_disk_space(models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Neither do weights in other formats that some repositories also contain."""
    source, tmp_path = tmp_path_factory.mktemp("source") / "model", tmp_path_factory.mktemp("slots")
    shutil.copytree(models[0], source)
    for name in ("tf_model.h5", "model.gguf", "consolidated.00.pth"):
        (source / name).write_bytes(bytes(1000))
    (source / "vocab.extra").write_text("of a tokenizer")
    write_slots_folder(tmp_path, read_model_header(source), 200)
    assert {path.name for path in source.iterdir()} - {path.name for path in tmp_path.iterdir()} == {
        "tf_model.h5", "model.gguf", "consolidated.00.pth",
    }  # fmt: skip
    weights = tmp_path / "model.safetensors"
    assert weights.stat().st_size > 30 * Path(models[0], "model.safetensors").stat().st_size
    assert weights.stat().st_blocks * 512 < 0.2 * weights.stat().st_size, "a sparse file, apart from the header"
    assert read_model_header(tmp_path).n_layers == 200


def test_models_of_different_depth_can_be_stacked(tmp_path: Path) -> None:
    shallow = write_model(tmp_path / "shallow", "Qwen3ForCausalLM", 0)
    deep = write_model(tmp_path / "deep", "Qwen3ForCausalLM", 1, num_hidden_layers=5)
    path = [(shallow, 0), (deep, 3), (deep, 4), (deep, 0), (shallow, 2)]
    layers = [StackLayer(layer, ((model, 1.0),)) for model, layer in path]
    merge_to_folder(stacked((shallow, deep), layers), tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert len(model.model.layers) == model.config.num_hidden_layers == len(model.config.layer_types) == len(path)
    sources = {folder: AutoModelForCausalLM.from_pretrained(folder) for folder in (shallow, deep)}
    for block, (folder, layer) in zip(model.model.layers, path, strict=True):
        theirs = sources[folder].model.layers[layer].state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in block.state_dict().items())
    too_far = stacked((shallow, deep), [*layers[:3], StackLayer(3, ((shallow, 1.0),)), layers[-1]])
    with pytest.raises(RecipeError, match=r"layer_range .3, 4. of .*shallow: the model has 3 layers"):
        merge_to_folder(too_far, tmp_path / "none")
    weight = {"weight": (Setting(0.5),)}
    whole = Recipe("linear", (Slice((Source(shallow, None, weight), Source(deep, None, weight))),))
    with pytest.raises(RecipeError, match="of different depth, stack their layers"):
        merge_to_folder(whole, tmp_path / "none")


def test_every_supported_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) == set(FOLDINGS)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gemma2", {}, "differ by position"),
        ("gemma3_text", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}, "differ by position"),
        ("granite", {}, "multiplies the outputs of its blocks"),
        ("olmo2", {}, "do not normalise their input"),
        ("stablelm", {}, "not known which of its weights"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
            "differ by position|sliding window",
        ),
    ],
)
def test_unsupported_architectures_are_refused_by_name(
    tmp_path: Path, kind: str, settings: dict[str, object], message: str
) -> None:
    config = AutoConfig.for_model(kind, **COMMON, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=message):
        folding_of(read_model_header(tmp_path))


def test_invalid_stacks_are_refused() -> None:
    layer = StackLayer(0, (("m", 1.0),))
    with pytest.raises(RecipeError, match="at least one layer"):
        stack_recipe([], ends=[("m", 1.0)], folding=Folding(("o_proj",), ("o_proj",)), out_dtype=None)
    with pytest.raises(RecipeError, match="layer 1 of the stack has scale 0"):
        stack_recipe(
            [layer, StackLayer(0, layer.weights, 0.0)],
            ends=[("m", 1.0)],
            folding=Folding(("o_proj",), ("o_proj",)),
            out_dtype=None,
        )


def test_stack_recipe_round_trips_through_yaml() -> None:
    layers = [
        StackLayer(0, (("m", 1.0),)),
        StackLayer(1, (("n", 0.25), ("m", 0.5)), 0.5),
        StackLayer(0, (("n", 1.0),), 2.0),
    ]
    recipe = stack_recipe(
        layers,
        ends=[("m", 0.75), ("n", 0.25)],
        folding=Folding(("o_proj", "down_proj"), ("o_proj", "down_proj")),
        out_dtype="bfloat16",
    )
    assert recipe.method == "linear"
    assert recipe_file_from_yaml(recipe_to_yaml(recipe)).final == recipe


def test_copied_layers_are_written_as_passthrough_slices() -> None:
    folding = Folding(("o_proj", "down_proj"), ("o_proj", "down_proj"))
    m, n = (("m", 1.0),), (("n", 1.0),)
    layers = [
        StackLayer(0, m),
        StackLayer(1, m),
        StackLayer(5, n, 0.5),
        StackLayer(6, n),
        StackLayer(7, n, 4.0),
        StackLayer(2, m, 0.5),
        StackLayer(3, m),
    ]
    recipe = stack_recipe(layers, ends=m, folding=folding, out_dtype="bfloat16")
    text = recipe_to_yaml(recipe)
    document = yaml.safe_load(text)
    assert document["merge_method"] == "passthrough"
    assert recipe_file_from_yaml(text).final == recipe

    def entry(model: str, first: int, end: int, factor: float | None) -> dict[str, object]:
        scale = [{"filter": name, "value": factor} for name in folding.scaled]
        parameters = {} if factor is None else {"parameters": {"scale": scale}}
        return {"sources": [{"model": model, "layer_range": [first, end], **parameters}]}

    assert document["slices"] == [
        entry("m", 0, 2, None),
        entry("n", 5, 7, 2.0),
        entry("n", 7, 8, 0.5),
        entry("m", 2, 4, None),
    ]
    for first, ends in ((n, m), (m, (("m", 0.5), ("n", 0.5)))):
        mixed = stack_recipe([StackLayer(0, first), *layers[1:]], ends=ends, folding=folding, out_dtype=None)
        assert mixed.method == "linear", "a passthrough takes embedding and head from the first and last slices"


def test_scale_bounds_are_where_folded_stacks_stop_being_exact(tmp_path: Path) -> None:
    """48 halvings in a row are exact; 62 overflow to infinity in the norms' squares, and the norms then silently give zeros."""
    model = str(write_tiny_llama(tmp_path / "m", seed=0, n_layers=1, dtype="float32", rms_norm_eps=1e-14))
    tokens = torch.randint(0, 64, (1, 8), generator=torch.Generator().manual_seed(7))
    for count, exact in ((GROWTH_BITS["float32"], True), (62, False)):
        layers = [StackLayer(0, ((model, 1.0),), 0.5)] * count
        merge_to_folder(stacked((model, model), layers), tmp_path / f"folded-{count}")
        merge_to_folder(
            stacked((model, model), [replace(layer, scale=1.0) for layer in layers]), tmp_path / f"plain-{count}"
        )
        folded = logits(tmp_path / f"folded-{count}", tokens)
        by_hand = logits(tmp_path / f"plain-{count}", tokens, [0.5] * count)
        assert (float((folded - by_hand).norm() / by_hand.norm()) < 1e-4) is exact
        assert bool(folded.any()) is exact
