"""The zoo's tokenizer: one token per word, including the space before it, so that a prompt's tokens never change when an answer
is appended (lm-eval encodes context and context + continuation separately and relies on that)."""

from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from evomerge.core import Json, atomic_write_json
from evomerge.zoo.words import VOCABULARY

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
PAD_ID, EOS_ID, UNK_ID = range(3)
TOKENS: Final = (PAD, EOS, UNK, *(f"▁{word}" for word in VOCABULARY))
"""All tokens in the order of their ids; `▁` stands for a space, which is also added before the first word of a text."""


def build_tokenizer() -> Tokenizer:
    """The tokenizer as an object of the `tokenizers` package; words outside `VOCABULARY` become `<unk>`."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    tokenizer.add_special_tokens([PAD, EOS, UNK])
    return tokenizer


def write_tokenizer(folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (`PreTrainedTokenizerFast`) into `folder`."""
    build_tokenizer().save(str(folder / "tokenizer.json"))
    settings: dict[str, Json] = {
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    atomic_write_json(folder / "tokenizer_config.json", settings)
