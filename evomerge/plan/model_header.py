"""What is known of a model without reading a weight: its config and the header of every safetensors file."""

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
"""safetensors dtype -> bytes per element, for the types that can stand in a checkpoint that is merged"""

FLOAT_DTYPES: Mapping[str, str] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors name -> torch name of what arithmetic is done on; tensors of other types are copied"""

DECODER_KEYS = ("num_decoder_layers", "decoder_layers")
"""what configurations of models with an encoder call the number of the decoder's layers, if they say it"""

N_LAYERS_KEYS = (*DECODER_KEYS, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""what configurations call the number of layers, of the decoder where there is an encoder too"""

_MODULE = r"(?:[A-Za-z_]\w*\.)*"
"""modules around a tensor that belongs to no layer"""

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
    """Whether a tensor of this name is a mask or a table of positions that some exporters store and every loader computes."""
    return _DERIVED.search(name) is not None


def language_config(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """The part of a config.json that describes the language model: `text_config` where there is one, else the whole."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def config_value(config: Mapping[str, Json], *names: str) -> Json:
    """The value of the first of `names` that a config.json gives, of the language model (`text_config`) before the whole; None without one."""
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
        file: the safetensors file that holds it, inside the model folder.
        start, end: its bytes in that file, from the file's beginning.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What tells a file from a later version of it."""

    size: int
    modified_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class LoraUpdate:
    """How an adapter changes one matrix W of its model: W + scale * B A, in DoRA with rows scaled to `magnitude`.

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
        replaced: tensor of the model -> what stands in its place, before it is changed.
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
        tensors: name -> header, in the order of the files; without those that `is_derived` and a `copied_head`.
        files: safetensors file name -> stamp at the time of reading.
        adapter: merged into the weights whenever they are read; None = the weights as they are.
        copied_head: the output layer of a tied model that stores it although it is the embedding; None where it does not.
    """

    folder: Path
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, FileStamp]
    adapter: Adapter | None = None
    copied_head: TensorHeader | None = None

    @cached_property
    def n_bytes(self) -> int:
        """Size of all tensors, as they are stored."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @cached_property
    def n_layers(self) -> int:
        """Transformer layers, as config.json says; 0 where it does not."""
        value = config_value(self.config, *N_LAYERS_KEYS)
        return value if isinstance(value, int) else 0

    @cached_property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, else its `model_type`, else "": the first that can be shown in a line."""
        names = self.config.get("architectures")
        found = (names[0] if isinstance(names, list) and names else None, self.config.get("model_type"))
        return next((name for name in found if isinstance(name, str) and name.isprintable()), "")

    @cached_property
    def head(self) -> str | None:
        """The name of the output layer's weight; None where it is tied to the embedding."""
        return next((name for name in self.tensors if is_head(name) and name.endswith("weight")), None)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the token embedding; None where it is not known."""
        return next((name for name in self.tensors if is_embedding(name)), None)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.head is None

    @cached_property
    def vocab_size(self) -> int | None:
        """Rows of the token embedding; None where it is not known."""
        return self.tensors[self.embedding].shape[0] if self.embedding else None

    @cached_property
    def dtype(self) -> str:
        """The torch name of the float type that most bytes are stored in ("float32" where there is none)."""
        bytes_of: dict[str, int] = {}
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_DTYPES:
                bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.end - tensor.start
        return FLOAT_DTYPES[max(bytes_of, key=lambda name: bytes_of[name])] if bytes_of else "float32"
