"""What is known of a model without reading a weight: its config and the header of every safetensors file."""

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

HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight", "output.weight")
"""names of an output layer that is not tied to the embedding"""

EMBEDDING_NAMES = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "gpt_neox.embed_in.weight",
    "transformer.wte.weight",
    "model.tok_embeddings.weight",
)
"""names of the token embedding"""


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
        replaced: tensor of the model -> what stands in its place.
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
        tensors: name -> header, in the order of the files.
        files: safetensors file name -> stamp at the time of reading.
        adapter: merged into the weights whenever they are read; None = the weights as they are.
    """

    folder: Path
    config: Mapping[str, Json]
    tensors: Mapping[str, TensorHeader]
    files: Mapping[str, FileStamp]
    adapter: Adapter | None = None

    @cached_property
    def n_bytes(self) -> int:
        """Size of all tensors, as they are stored."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    @cached_property
    def n_layers(self) -> int:
        """Transformer layers, as config.json says; 0 where it does not."""
        for config in (self.config, self.config.get("text_config")):
            if isinstance(config, Mapping):
                for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
                    value = config.get(key)
                    if isinstance(value, int) and not isinstance(value, bool):
                        return value
        return 0

    @cached_property
    def architecture(self) -> str:
        """The first of config.json's `architectures`, else its `model_type`, else ""."""
        names = self.config.get("architectures")
        if isinstance(names, list) and names and isinstance(names[0], str):
            return names[0]
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else ""

    @cached_property
    def head(self) -> str | None:
        """The name of the output layer's weight; None where it is tied to the embedding."""
        return next((name for name in HEAD_NAMES if name in self.tensors), None)

    @cached_property
    def embedding(self) -> str | None:
        """The name of the token embedding; None where it is not known."""
        return next((name for name in EMBEDDING_NAMES if name in self.tensors), None)

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
