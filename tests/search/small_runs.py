"""A search that takes seconds on a test function, started in this process or as a command."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from evomerge.build import parse_config, start_search

SETTINGS: dict[str, Any] = {
    "seed": 3,
    "strategy": "random",
    "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 4, "n_items": 10},
    "cluster": {"kind": "local", "workers": 2},
    "budget": {"evaluations": 30},
    "finals": {"finalists": 2},
    "deterministic": True,
}


def start(folder: Path, **changes: Any) -> Any:
    settings = {**SETTINGS, **changes}
    config = parse_config(dict(settings), folder=Path("/"))
    return start_search(config, folder, config_text=yaml.safe_dump(settings))


def write_config(folder: Path) -> Path:
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


def command(*arguments: object, before: Any = None) -> subprocess.Popen[str]:
    """Starts the command with stdout and stderr in one stream; `before` is called in the child process first."""
    line = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=before)
