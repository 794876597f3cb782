"""`WeightPool`: the weights of all sources, read and checked once per process for thousands of merges.

Knows nothing of recipes or merge methods.
"""

import mmap
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from evomerge.core import CheckpointError
from evomerge.plan import ModelHeader, TensorKey, check_unchanged, read_model_header
from evomerge.weights.mapping import MappedModel
from evomerge.weights.scan import first_bad_element


class WeightPool:
    """Resident, read-only weights of several models.

    Args:
        headers: model key (`Recipe.models`) -> header.

    Raises:
        CheckpointError: a tensor contains NaN or infinities (named), or a file changed since its header was read.
    """

    def __init__(self, headers: Mapping[str, ModelHeader]) -> None:
        self.headers = dict(headers)
        maps: dict[Path, mmap.mmap] = {}
        models = {key: MappedModel(header, maps) for key, header in self.headers.items()}
        self._tensors: dict[TensorKey, torch.Tensor] = {}
        to_check: dict[int, TensorKey] = {}  # by address: models that differ by adapters share unchanged tensors
        for key, model in models.items():
            for name in model.header.tensors:
                self._tensors[key, name] = model.tensor(name)
                to_check.setdefault(self._tensors[key, name].data_ptr(), (key, name))
        # the scan releases the interpreter lock; threads also overlap reading from disk
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for _ in threads.map(lambda entry: check_finite(self._tensors[entry], *entry), to_check.values()):
                pass

    @classmethod
    def holding(cls, tensors: Mapping[TensorKey, torch.Tensor]) -> "WeightPool":
        """A pool of tensors that are already in memory and checked, by (model, name)."""
        pool = cls({})
        pool._tensors = dict(tensors)
        return pool

    @classmethod
    def from_folders(cls, folders: Iterable[str]) -> "WeightPool":
        """A pool of the models in `folders`, with their paths as keys.

        Raises:
            CheckpointError: as for `read_model_header` and the constructor.
        """
        return cls({folder: read_model_header(folder) for folder in folders})

    def check_unchanged(self) -> None:
        """Refuse weights whose files have changed, because the mapped tensors may have changed with them.

        Raises:
            CheckpointError: names the file.
        """
        for header in self.headers.values():
            check_unchanged(header)

    def tensor(self, source: str, name: str) -> torch.Tensor:
        """Tensor `name` of model `source`, in the file's dtype and shape. Must not be written to.

        Raises:
            CheckpointError: there is no such tensor.
        """
        try:
            return self._tensors[source, name]
        except KeyError:
            known = ", ".join(dict.fromkeys(key for key, _ in self._tensors))
            if source not in {key for key, _ in self._tensors}:
                raise CheckpointError(f"the pool has no model {source!r}; it has: {known}") from None
            raise CheckpointError(f"{source} has no tensor {name!r}") from None


def check_finite(tensor: torch.Tensor, key: str, name: str, first: int = 0) -> None:
    """Refuse a tensor `name` of model `key` (or a part of it that starts at flat index `first`) with NaN or infinities.

    Raises:
        CheckpointError: names the element.
    """
    if not tensor.is_floating_point():
        return
    index = first_bad_element(tensor)
    if index is not None:
        value = tensor.reshape(-1)[index].item()
        raise CheckpointError(
            f"{key}: tensor {name!r} contains {value} at flat index {first + index}; the model is damaged, download it again or leave it out"
        )
