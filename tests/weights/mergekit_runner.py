"""Runs in mergekit's own environment: merges every `[recipe file, output folder]` of a JSON list given as a file."""

import json
import sys
from pathlib import Path

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

_argsort = torch.argsort


def _stable_argsort(*args, **kwargs):
    """mergekit's top-k leaves the order of equal magnitudes to the machine's sort; this fixes it to "first come first"."""
    return _argsort(*args, **{**kwargs, "stable": True})


def main() -> None:
    torch.argsort = _stable_argsort
    torch.manual_seed(0)
    for recipe, out in json.loads(Path(sys.argv[1]).read_text()):
        config = MergeConfiguration.model_validate(yaml.safe_load(Path(recipe).read_text()))
        run_merge(config, out, MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))


if __name__ == "__main__":
    main()
