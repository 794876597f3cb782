"""Llama checkpoints of a few kilobytes with random weights, written in milliseconds, for all tests that read models.

The weights come from NumPy streams, so the same arguments give the same bytes on every machine. Nothing is trained, and
transformers is not imported; `from_pretrained` and vLLM can read the folders.
"""

import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

from evomerge.core import CheckpointError, Json, atomic_write_json, random_stream

SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
PAD_ID, EOS_ID, UNK_ID = range(3)
CHARACTERS = "\n" + string.digits + string.ascii_letters + string.punctuation + " "
"""The tokenizer's characters, one token each, in the order of their ids (from `len(SPECIAL_TOKENS)` on)."""
DEFAULT_VOCAB = 128


def write_tiny_llama(
    folder: Path,
    *,
    seed: int,
    tied: bool = True,
    n_layers: int = 2,
    hidden: int = 32,
    vocab: int = DEFAULT_VOCAB,
    dtype: str = "bfloat16",
    init_std: float = 0.2,
    **config: Json,
) -> Path:
    """Write a Llama checkpoint with random weights and a character-level tokenizer.

    The weights are large enough (`init_std`, and norms around 1 with standard deviation 0.1) for greedy continuations to depend on
    every tensor. Models that differ only in `seed` have the same config and tokenizer, so they can be merged.

    Args:
        folder: created if missing; files in it are replaced.
        seed: of the weights.
        tied: whether the output layer is tied to the embedding; an untied model also stores `lm_head.weight`.
        n_layers: transformer blocks.
        hidden: width; a multiple of `num_attention_heads` (default 4).
        vocab: rows of the embedding. Below `len(SPECIAL_TOKENS) + len(CHARACTERS)` the last characters become `<unk>`;
            rows beyond it are never produced by the tokenizer.
        dtype: `bfloat16`, `float16` or `float32`.
        init_std: standard deviation of the matrices.
        **config: further keys of `config.json`, replacing the defaults (`num_attention_heads`, `num_key_value_heads`,
            `intermediate_size`, `max_position_embeddings`, ...).

    Returns:
        `folder`.

    Raises:
        CheckpointError: an unknown `dtype`, too small a vocabulary, or heads that do not divide the width.
    """
    torch_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(dtype)
    if torch_dtype is None:
        raise CheckpointError(f"tiny llama: dtype must be bfloat16, float16 or float32, got {dtype!r}")
    if vocab <= len(SPECIAL_TOKENS):
        raise CheckpointError(f"tiny llama: vocab must exceed the {len(SPECIAL_TOKENS)} special tokens, got {vocab}")
    full_config = _config(tied=tied, n_layers=n_layers, hidden=hidden, vocab=vocab, dtype=dtype) | config
    shapes = llama_shapes(full_config)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = random_stream(seed, "tiny_llama", name).standard_normal(shape)
        values = 1.0 + 0.1 * noise if name.endswith("norm.weight") else init_std * noise
        tensors[name] = torch.from_numpy(values).to(torch_dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    atomic_write_json(folder / "config.json", full_config)
    atomic_write_json(folder / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": PAD_ID})
    _write_tokenizer(folder, vocab)
    return folder


def llama_shapes(config: dict[str, Json]) -> dict[str, tuple[int, ...]]:
    """The tensor names and shapes of a Llama checkpoint with this `config.json`, in layer order.

    Raises:
        CheckpointError: the heads do not divide the width, or a size is not a positive integer.
    """

    def size(key: str) -> int:
        value = config[key]
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"tiny llama: config {key} must be a positive integer, got {value!r}")
        return value

    hidden, inner = size("hidden_size"), size("intermediate_size")
    heads, kv_heads = size("num_attention_heads"), size("num_key_value_heads")
    if hidden % heads or heads % kv_heads:
        raise CheckpointError(
            f"tiny llama: num_attention_heads ({heads}) must divide hidden_size ({hidden}) "
            f"and be a multiple of num_key_value_heads ({kv_heads})"
        )
    head = size("head_dim") if "head_dim" in config else hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size("vocab_size"), hidden)}
    for layer in range(size("num_hidden_layers")):
        block = f"model.layers.{layer}."
        shapes |= {
            f"{block}input_layernorm.weight": (hidden,),
            f"{block}self_attn.q_proj.weight": (heads * head, hidden),
            f"{block}self_attn.k_proj.weight": (kv_heads * head, hidden),
            f"{block}self_attn.v_proj.weight": (kv_heads * head, hidden),
            f"{block}self_attn.o_proj.weight": (hidden, heads * head),
            f"{block}post_attention_layernorm.weight": (hidden,),
            f"{block}mlp.gate_proj.weight": (inner, hidden),
            f"{block}mlp.up_proj.weight": (inner, hidden),
            f"{block}mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (size("vocab_size"), hidden)
    return shapes


def _config(*, tied: bool, n_layers: int, hidden: int, vocab: int, dtype: str) -> dict[str, Json]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": dtype,
        "eos_token_id": EOS_ID,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": n_layers,
        "num_key_value_heads": 2,
        "pad_token_id": PAD_ID,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": vocab,
    }


def _write_tokenizer(folder: Path, vocab: int) -> None:
    tokens = [*SPECIAL_TOKENS, *CHARACTERS][:vocab]
    # A byte-pair model without merges is a character-level tokenizer whose decoder needs no special handling of spaces.
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))  # noqa: S106
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings: dict[str, Json] = {
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    atomic_write_json(folder / "tokenizer_config.json", settings)
