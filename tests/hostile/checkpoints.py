"""Small models to be damaged, and the merge that is run on them."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.cli import main

UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes a model's tensors."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def run_merge(models: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], *options: str) -> None:
    (models / "recipe.yml").write_text(yaml.safe_dump(recipe))
    command = ["evomerge", "merge", str(models / "recipe.yml"), str(models / "out"), *options]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.setattr(
        sys.modules[main.__module__], "_exit", sys.exit
    )  # if another test's evaluation were still running, it would end this process
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def recipe_of(method: str = "task_arithmetic", weight: float = 0.5, **more: object) -> dict[str, Any]:
    experts = [{"model": name, "parameters": {"weight": weight}} for name in "ab"]
    base = {} if method == "linear" else {"base_model": "base"}
    return {"merge_method": method, "models": experts, **base, **more}
