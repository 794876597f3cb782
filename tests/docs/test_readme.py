"""The README's own example, run unchanged: its configuration, its commands in order, its Python."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")

SMALLER = {"400": "14", "800": "16"}
"""budgets in the README -> budgets small enough for a test"""

QUICK = "engine: {kind: transformers}\ncluster: {kind: local, workers: 1}\nfinals: {finalists: 2}\n"
"""added to the README's configuration, so that no test of the README has to wait for vLLM"""


def block(language: str, containing: str) -> str:
    """The only fenced block in `language` that contains `containing`, with small budgets."""
    found = [
        text
        for text in re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if containing in text
    ]
    assert len(found) == 1, f"{len(found)} blocks with {containing!r}"
    for large, small in SMALLER.items():
        found[0] = found[0].replace(large, small)
    return found[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything the README assumes to exist: three models, two task files, and its search.yaml."""
    config = block("yaml", "# search.yaml")
    for seed, name in enumerate(("base", "math", "code")):
        write_tiny_llama(tmp_path / name, seed=seed)
    for path in yaml.safe_load(config)["tasks"]:
        write_toy_task(tmp_path / path, n_items=6)
    (tmp_path / "search.yaml").write_text(config + QUICK)
    return tmp_path


def test_the_readmes_commands_run(folder: Path) -> None:
    lines = [line.split("#")[0].split() for line in block("sh", "evomerge validate").splitlines() if line.strip()]
    wanted = ["validate", "search", "resume", "front", "report", "export", "merge", "eval"]
    assert [words[1] for words in lines] == wanted
    for words in lines:
        assert words[0] == "evomerge"
        command = [sys.executable, "-c", "from evomerge.cli import main; main()", *words[1:]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (words, done.stderr)
    summary = json.loads((folder / "runs" / "mine" / "summary.json").read_text())
    assert summary["evaluations"] == int(SMALLER["800"])
    assert (folder / "runs" / "mine" / "report.html").exists()
    assert (folder / "merged" / "model.safetensors").exists()


def test_the_readmes_python_runs(folder: Path) -> None:
    code = block("python", "import evomerge")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "runs" / "mine" / "summary.json").read_text())["evaluations"] == int(SMALLER["400"])
