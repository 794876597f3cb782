"""What is known about a model without reading weights: its config and the header of every safetensors file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evomerge.core import Json

BYTES_OF_DTYPE: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
"""safetensors dtype -> bytes per element, for the types supported in checkpoints"""

FLOAT_DTYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors name -> torch name of the types that are merged; tensors of other types are copied"""

DECODER_KEYS = ("num_decoder_layers", "decoder_layers")
"""config keys for the number of decoder layers in encoder-decoder models"""

N_LAYERS_KEYS = (*DECODER_KEYS, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""config keys for the number of layers; the decoder's take precedence"""

_MODULE = r"(?:[A-Za-z_]\w*\.)*"
"""module prefix of a tensor outside the layers"""

_EMBEDDING = re.compile(
    _MODULE + r"(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|token_embedding|embeddings?|shared)\.weight"
)
_HEAD = re.compile(_MODULE + r"(lm_head|embed_out|output_layer)\.(weight|bias)|(output|head)\.weight")
_OTHER_SENSES = re.compile(r"vision|visual|audio|speech")

_DERIVED = re.compile(
    r"(^|\.)(rotary\w*\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(bias|masked_bias)|position_ids)$"
)


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name is a token embedding: one row for each token."""
    return _EMBEDDING.fullmatch(name) is not None and _OTHER_SENSES.search(name) is None


def is_head(name: str) -> bool:
    """Whether a tensor of this name belongs to an output layer: one row (of its bias, one entry) for each token."""
    return _HEAD.fullmatch(name) is not None and _OTHER_SENSES.search(name) is None


def is_derived(name: str) -> bool:
    """Whether a tensor of this name is a mask or position table that some exporters store although every loader computes it."""
    return _DERIVED.search(name) is not None


def language_config(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """The part of a config.json that describes the language model: `text_config` if there is one, else all of it."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def config_value(config: Mapping[str, Json], *names: str) -> Json:
    """The value of the first of `names` that a config.json sets, in `text_config` before the top level; None if there is none."""
    places = (language_config(config), config)
    found = (place[name] for name in names for place in places if place.get(name) is not None)
    return next(found, None)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a checkpoint.

    Attributes:
        name: its name.
        shape: its shape; () is a scalar.
        dtype: safetensors' name of its type, a key of `BYTES_OF_DTYPE`.
        file: name of the safetensors file in the model folder that contains it.
        start, end: its byte range, counted from the beginning of that file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Distinguishes a file from a later version of it."""

    size: int
    modified_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """How an adapter changes one matrix W of its model: W + scale * B A; with DoRA, rows are then scaled to `magnitude`.

    Attributes:
        a, b: the factors, of shapes (rank, in) and (out, rank).
        scale: factor of the product.
        transposed: whether W is stored as (in, out).
        magnitude: L2 norms of the result's rows, of shape (out,); None without DoRA.
    """

    a: TensorHeader
    b: TensorHeader
    scale: float
    transposed: bool
    magnitude: TensorHeader | None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A validated adapter folder.

    Attributes:
        folder: where it is.
        config: its adapter_config.json.
        updates: tensor of the model -> its low-rank change.
        replaced: tensor of the model -> tensor that replaces it, before updates are applied.
        files: safetensors file name -> stamp at the time of reading.
    """

    folder: Path
    config: Mapping[str, Json]
    updates: Mapping[str, LoraUpdate]
    replaced: Mapping[str, TensorHeader]
    files: Mapping[str, FileStamp]


@dataclass(frozen=True, eq=False)
class ModelHeader:
    """A validated model folder. Compared by identity, so that plans can be cached by it.

    Attributes:
        folder: where it is.
        config: its config.json.
        tensors: name -> header, in the order of the files; without derived tensors (`is_derived`) and a `copied_head`.
        files: safetensors file name -> stamp at the time of reading.
        adapter: an adapter that is merged into the weights whenever they are read; None = the weights are used unchanged.
        copied_head: the output layer, if a tied model stores a copy of the embedding as its output layer; else None.
    """

    folder: Path
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, FileStamp]
    adapter: Adapter | None = None
    copied_head: TensorHeader | None = None

    @cached_property
    def n_bytes(self) -> int:
        """Size of all tensors as stored."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @cached_property
    def n_layers(self) -> int:
        """Number of transformer layers according to config.json; 0 if it does not say."""
        value = config_value(self.config, *N_LAYERS_KEYS)
        return value if isinstance(value, int) else 0

    @cached_property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, else its `model_type`, else ""; unprintable names are skipped."""
        names = self.config.get("architectures")
        found = (names[0] if isinstance(names, list) and names else None, self.config.get("model_type"))
        return next((name for name in found if isinstance(name, str) and name.isprintable()), "")

    @cached_property
    def head(self) -> str | None:
        """The name of the output layer's weight; None if it is tied to the embedding."""
        return next((name for name in self.tensors if is_head(name) and name.endswith("weight")), None)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the token embedding; None if unknown."""
        return next((name for name in self.tensors if is_embedding(name)), None)

    @property
    def tied(self) -> bool:
        """Whether the output layer is tied to the embedding."""
        return self.head is None

    @cached_property
    def vocab_size(self) -> int | None:
        """Number of rows of the token embedding; None if unknown."""
        return self.tensors[self.embedding].shape[0] if self.embedding else None

    @cached_property
    def dtype(self) -> str:
        """The torch name of the float type that accounts for most bytes ("float32" if there is none)."""
        bytes_of: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_DTYPES:
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.end - tensor.start
        return FLOAT_DTYPES[max(bytes_of, key=lambda name: bytes_of[name])] if bytes_of else "float32"
