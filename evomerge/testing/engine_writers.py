"""The writes of the engine suite: tensors from memory, or from a file by a `RemoteWrite` in the engine's own processes."""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from evomerge.core import EngineError, Json
from evomerge.plan import WeightTarget


def write_tensors(target: WeightTarget, tensors: dict[str, torch.Tensor]) -> None:
    """Write checkpoint tensors into the engine's parameters, as a merger would."""
    for name in target.names():
        for region in target.regions(name):
            region.view.copy_(tensors[name][region.index])


def write_file(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Like `write_tensors`, in another process; then checks that the parameters contain the tensors."""
    tensors = load_file(str(settings["file"]))
    write_tensors(target, tensors)
    for name in target.names():
        for region in target.regions(name):
            assert torch.equal(region.view.cpu().nan_to_num(), tensors[name][region.index].nan_to_num())


def write_half(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Fail after the first tensor."""
    target.regions(target.names()[0])[0].view.zero_()
    raise EngineError("halfway")


def check_file(settings: Mapping[str, Json], target: WeightTarget) -> None:
    """Change nothing; fail if the engine's parameters are not the tensors of a file."""
    tensors = load_file(str(settings["file"]))
    for name in target.names():
        for region in target.regions(name):
            if not torch.equal(region.view.cpu(), tensors[name][region.index].to(region.view.dtype)):
                raise EngineError(f"the engine does not hold the file's tensor {name!r}")
