import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from evomerge.core import CheckpointError
from evomerge.testing.tiny_models import EOS_ID, write_tiny_llama


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_equal_arguments_give_equal_bytes_and_another_seed_changes_only_the_weights(tmp_path: Path) -> None:
    one, again, other = (
        digest(write_tiny_llama(tmp_path / name, seed=seed)) for name, seed in [("a", 0), ("b", 0), ("c", 1)]
    )
    assert one == again
    assert {name for name in one if one[name] != other[name]} == {"model.safetensors"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_transformers_loads_every_tensor(tmp_path: Path, tied: bool, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_tiny_llama(tmp_path, seed=3, tied=tied, dtype=dtype, n_layers=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype is getattr(torch, dtype)
    state = model.state_dict()
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert ("lm_head.weight" in stored.keys()) is not tied  # noqa: SIM118
        assert set(state) - set(stored.keys()) == ({"lm_head.weight"} if tied else set())
        for name in stored.keys():  # noqa: SIM118
            assert torch.equal(state[name], stored.get_tensor(name))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Ab 1+2\n = ok?"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == EOS_ID
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_config_keys_determine_the_shapes_and_invalid_ones_are_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path, seed=0, hidden=48, num_attention_heads=6, num_key_value_heads=3, intermediate_size=40)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        assert stored.get_slice("model.layers.1.self_attn.k_proj.weight").get_shape() == [24, 48]
        assert stored.get_slice("model.layers.0.mlp.up_proj.weight").get_shape() == [40, 48]
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        write_tiny_llama(tmp_path, seed=0, hidden=30)
    with pytest.raises(CheckpointError, match="dtype"):
        write_tiny_llama(tmp_path, seed=0, dtype="int8")
    with pytest.raises(CheckpointError, match="vocab"):
        write_tiny_llama(tmp_path, seed=0, vocab=3)
