"""The part of a plan that depends only on the models and the slices: which tensors go into which output tensor.

A search makes thousands of plans that differ only in numbers, so structures are cached; nothing here reads a parameter's value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan.compatibility import check_compatible
from evomerge.plan.layer_kinds import kinds_by_place, kinds_of_model
from evomerge.plan.layers import is_before_layers, layer_name, main_stack, stack_sizes
from evomerge.plan.model_header import BYTES_OF_DTYPE, FLOAT_DTYPES, ModelHeader
from evomerge.plan.modules import split_into_modules


@dataclass(frozen=True, slots=True)
class SourceLayers:
    """A model and its range of layers, without parameters."""

    key: str
    layer_range: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class StructureKey:
    """Everything that a structure depends on; `headers` are compared by identity.

    Attributes:
        slices: the sources of each slice.
        modules: the module of each slice.
        bases: the base of each slice, None if it needs none.
        reference: key of the model whose tensor names the result has.
        filters: the filters of all parameters.
        headers: key and header of every model.
    """

    slices: tuple[tuple[SourceLayers, ...], ...]
    modules: tuple[str | None, ...]
    bases: tuple[str | None, ...]
    reference: str
    filters: tuple[str, ...]
    headers: tuple[tuple[str, ModelHeader], ...]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output tensor before parameters are known.

    Attributes:
        name, shape: of the output.
        slice_index: the slice whose parameters apply.
        depth: position t in [0, 1] for gradients.
        names: for each source of the slice, the input's name as seen by filters.
        tensors: for each source, the name under which it is stored (a tied output layer is stored as the embedding).
        base_tensor: the name of the base's tensor, if the base is needed.
        group: tensors with the same group have the same parameters.
        is_float: False for integer buffers, which are copied.
        n_elements: of the output.
        n_bytes: of a copied buffer; 0 for floats, whose size depends on the output dtype.
    """

    name: str
    shape: tuple[int, ...]
    slice_index: int
    depth: float
    names: tuple[str, ...]
    tensors: tuple[str, ...]
    base_tensor: str | None
    group: int
    is_float: bool
    n_elements: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Structure:
    """All output tensors in order, and the number of layers of the result."""

    outputs: tuple[OutputTensor, ...]
    n_layers: int


@lru_cache(maxsize=64)
def build_structure(key: StructureKey) -> Structure:
    """List the output tensors of a merge and check that the models fit each other.

    Raises:
        RecipeError: shapes, layers, vocabularies or tied embeddings do not match.
        CheckpointError: a model lacks a tensor that the others have, or has one that they lack.
    """
    headers = dict(key.headers)
    reference = headers[key.reference]
    check_compatible(
        reference,
        {name: header for name, header in key.headers if name != key.reference},
        any_depth=_says_all_layers(key),
        layers_only=_in_the_middle(key),
    )
    return _Builder(key, headers, reference).build()


def _says_all_layers(key: StructureKey) -> bool:
    """Whether every slice has a layer range for each of its models, including the base if it needs one."""
    models = [{source.key for source in part if source.layer_range} for part in key.slices]
    return all(
        len(found) == len(part) and (base is None or base in found)
        for found, part, base in zip(models, key.slices, key.bases, strict=True)
    )


def _in_the_middle(key: StructureKey) -> set[str]:
    """The models that contribute only layers: tensors outside the layers come from the first and the last slice."""
    if any(source.layer_range is None for part in key.slices for source in part) or set(key.modules) != {None}:
        return set()
    ends = {source.key for part in (key.slices[0], key.slices[-1]) for source in part}
    return {name for name, _ in key.headers} - ends - {key.bases[0], key.bases[-1], key.reference}


class _Builder:
    def __init__(self, key: StructureKey, headers: Mapping[str, ModelHeader], reference: ModelHeader) -> None:
        self._key = key
        self._headers = headers
        self._reference = reference
        self._names = tuple(reference.tensors)
        self._sizes = stack_sizes(self._names)
        self._stack = main_stack(reference, self._sizes)
        self._groups: dict[object, int] = {}
        self._within: dict[str, Mapping[int, list[str]]] = {}
        self._kinds = {name: (kinds_of_model(header), kinds_by_place(header)) for name, header in headers.items()}
        self._outputs: list[OutputTensor] = []

    def build(self) -> Structure:
        n_layers = 0 if self._stack is None else self._reference.n_layers or self._sizes[self._stack]
        tensors = split_into_modules(self._names, self._key.modules)
        for module, names in tensors.items():
            indices = [index for index, name in enumerate(self._key.modules) if name == module]
            outside = [name for name in names if layer_name(name) is None]
            for name in outside:
                if is_before_layers(name):
                    self._add(name, indices[0], 0.0)
            if self._key.slices[indices[0]][0].layer_range is None:
                self._whole(names, indices[0])
            else:
                n_layers = self._sliced(names, indices)
            for name in outside:
                if not is_before_layers(name):
                    self._add(name, indices[-1], 0.0)
        return Structure(tuple(self._outputs), n_layers)

    def _whole(self, tensors: Sequence[str], slice_index: int) -> None:
        """Add every layer of every stack once; the depth t runs from 0 to 1 over each stack."""
        by_layer: dict[tuple[str, int], list[str]] = {}
        for name in tensors:
            layer = layer_name(name)
            if layer is not None:
                by_layer.setdefault((layer.stack, layer.index), []).append(name)
        for (stack, index), names in sorted(by_layer.items()):
            depth = index / (self._sizes[stack] - 1) if self._sizes[stack] > 1 else 1.0
            for name in names:
                self._add(name, slice_index, depth)

    def _sliced(self, tensors: Sequence[str], slice_indices: Sequence[int]) -> int:
        """Add the slices of a stack one after the other; return their total number of layers."""
        sizes = stack_sizes(tensors)
        if self._stack is None or list(sizes) != [self._stack]:
            stacks = ", ".join(sizes) or "none"
            raise RecipeError(
                f"slices need a single stack of layers, the language model's ({self._stack}); {self._reference.folder} has: {stacks}. "
                "For a model of several modules use `modules:`, with `models:` for the others; in a search, leave space.layer_groups at 1 or set space.smooth"
            )
        n_out = 0
        for slice_index in slice_indices:
            sources = self._key.slices[slice_index]
            ranges = [self._range(source) for source in sources]
            listed = [source.key for source in sources]
            base = self._key.bases[slice_index]
            base_range = ranges[listed.index(base)] if base in listed else ranges[0]
            length = ranges[0][1] - ranges[0][0]
            for offset in range(length):
                depth = offset / (length - 1) if length > 1 else 1.0
                places = [(key, first + offset) for key, (first, _) in zip(listed, ranges, strict=True)]
                if base is not None:
                    places.append((base, base_range[0] + offset))
                self._check_one_kind(places, n_out)
                for rest in self._layer(*places[0]):
                    inputs = [f"{self._stack}.{first + offset}.{rest}" for first, _ in ranges]
                    of_base = f"{self._stack}.{base_range[0] + offset}.{rest}"
                    self._add(f"{self._stack}.{n_out}.{rest}", slice_index, depth, inputs, of_base)
                n_out += 1
        return n_out

    def _layer(self, key: str, index: int) -> list[str]:
        """Names of the tensors of a model's layer, relative to the layer.

        Raises:
            CheckpointError: there are none.
        """
        if key not in self._within:
            layers: dict[int, list[str]] = {}
            for name in self._headers[key].tensors:
                layer = layer_name(name)
                if layer is not None and layer.stack == self._stack:
                    layers.setdefault(layer.index, []).append(layer.rest)
            self._within[key] = layers
        if index not in self._within[key]:
            raise CheckpointError(f"{key} has no tensors of layer {index}; is its download complete?")
        return self._within[key][index]

    def _check_one_kind(self, places: Sequence[tuple[str, int]], output: int) -> None:
        """Refuse to merge layers (given as model, index) of different kinds, or layers that would be of a different kind as layer `output`.

        Raises:
            RecipeError: names both layers and what differs.
        """
        (key, index), *others = places
        kinds, _ = self._kinds[key]
        for other_key, other_index in others:
            where = f"layer {index} of {key} and layer {other_index} of {other_key}"
            only_one = sorted(set(self._layer(key, index)) ^ set(self._layer(other_key, other_index)))
            if only_one:
                raise RecipeError(
                    f"{where} are of different kinds (only one has {only_one[0]!r}); merge layers of one kind"
                )
            for setting, theirs in self._kinds[other_key][0].items():
                if setting in kinds and kinds[setting][index] != theirs[other_index]:
                    raise RecipeError(
                        f"{where} are of different kinds ({setting}: {kinds[setting][index]!r} and {theirs[other_index]!r}); merge layers of one kind"
                    )
        for each, place in places:
            _, by_place = self._kinds[each]
            if place != output and by_place:
                raise RecipeError(
                    f"slices move layer {place} of {each} to layer {output}, but its config.json distinguishes layers by position "
                    f"({', '.join(by_place)}); keep every layer in its position"
                )

    def _range(self, source: SourceLayers) -> tuple[int, int]:
        header = self._headers[source.key]
        n_stack = header.n_layers or stack_sizes(header.tensors)[str(self._stack)]
        if source.layer_range is None or source.layer_range[1] > n_stack:
            raise RecipeError(f"layer_range {source.layer_range} of {source.key}: the model has {n_stack} layers")
        return source.layer_range

    def _add(
        self, name: str, slice_index: int, depth: float, inputs: Sequence[str] = (), of_base: str | None = None
    ) -> None:
        sources, base = self._key.slices[slice_index], self._key.bases[slice_index]
        names = tuple(inputs) or (name,) * len(sources)
        tensors = tuple(self._stored_name(source.key, tensor) for source, tensor in zip(sources, names, strict=True))
        stored = [(source.key, tensor) for source, tensor in zip(sources, tensors, strict=True)]
        base_tensor = None
        if base is not None:
            base_tensor = self._stored_name(base, of_base or name)
            stored.append((base, base_tensor))
        self._check_alike(name, stored)
        first = self._headers[sources[0].key].tensors[tensors[0]]
        shape = first.shape
        is_float = first.dtype in FLOAT_DTYPES
        hits = tuple(tuple(text in tensor for text in self._key.filters) for tensor in (name, *names))
        group = self._groups.setdefault((slice_index, depth, hits), len(self._groups))
        n_elements = math.prod(shape)
        n_bytes = 0 if is_float else n_elements * BYTES_OF_DTYPE[first.dtype]
        self._outputs.append(
            OutputTensor(
                name, shape, slice_index, depth, names, tensors, base_tensor, group, is_float, n_elements, n_bytes
            )
        )

    def _check_alike(self, name: str, inputs: Sequence[tuple[str, str]]) -> None:
        """Refuse (model, tensor) pairs that cannot be merged into one tensor `name`: all must have the same shape, and all or none must be floats."""
        (first_key, first_name), *others = inputs
        first = self._headers[first_key].tensors[first_name]
        for key, tensor in others:
            found = self._headers[key].tensors[tensor]
            if found.shape != first.shape:
                raise RecipeError(
                    f"tensor {name!r}: shape {list(first.shape)} in {first_key}, {list(found.shape)} in {key}; "
                    "only tensors of equal shape can be merged"
                )
            if (found.dtype in FLOAT_DTYPES) != (first.dtype in FLOAT_DTYPES):
                raise RecipeError(
                    f"tensor {name!r}: {first.dtype} in {first_key}, {found.dtype} in {key}; integers cannot be merged with weights"
                )

    def _stored_name(self, key: str, tensor: str) -> str:
        """The name under which a model stores `tensor`: a tied output layer is stored as the embedding."""
        header = self._headers[key]
        if tensor not in header.tensors and tensor == self._reference.head and header.embedding is not None:
            return header.embedding
        return tensor
