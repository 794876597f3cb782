"""Runs in mergekit's own environment: merges every `[recipe file, output folder]` pair of a JSON list read from a file."""

import json
import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

_sort, _topk = torch.sort, torch.topk


def _first_is_largest(values: torch.Tensor, descending: bool = False) -> torch.return_types.sort:
    """`torch.sort`, except that among equal values the first counts as the largest; unequal values are ordered as usual.

    mergekit leaves the order of equal magnitudes to the machine's sort. With that order fixed, results can be compared to the last bit: any
    remaining difference is not a tie.
    """
    order = _sort(values, descending=True, stable=True)
    ordered = order if descending else torch.return_types.sort([part.flip(-1) for part in order])
    if not torch.equal(ordered[0], _sort(values, descending=descending)[0]):
        raise RuntimeError("the order of unequal values was changed")
    return ordered


def _argsort(values: torch.Tensor, descending: bool = False) -> torch.Tensor:
    return _first_is_largest(values, descending)[1]


def _largest(values: torch.Tensor, k: int, largest: bool) -> torch.return_types.topk:
    if not largest:
        raise NotImplementedError
    top = [part[:k] for part in _first_is_largest(values, True)]
    if not torch.equal(top[0], _topk(values, k)[0]):
        raise RuntimeError("other values than torch's top k")
    return torch.return_types.topk(top)


def main() -> None:
    torch.argsort, torch.sort, torch.topk = _argsort, _first_is_largest, _largest
    torch.manual_seed(0)
    for recipe, out in json.loads(Path(sys.argv[1]).read_text()):
        config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
        # adapters are first merged into copies of their models, which mergekit keeps in a folder
        adapted = {"lora_merge_cache": f"{out}.adapted"}
        run_merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, **adapted))


if __name__ == "__main__":
    main()
