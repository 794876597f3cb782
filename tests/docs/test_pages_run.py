"""Examples from docs/tasks.md and docs/run-directory.md, run unchanged."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import evomerge
from evomerge.testing.tiny_models import write_tiny_llama

DOCS = Path(__file__).resolve().parents[2] / "docs"


def block(page: str, containing: str) -> str:
    """The only fenced block of a page that contains `containing`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = [part for part in re.findall(r"^```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if containing in part]
    assert len(found) == 1, f"{len(found)} blocks with {containing!r}"
    return found[0]


@pytest.mark.parametrize("own_score", [False, True], ids=["exact match", "a score in Python"])
def test_the_example_of_a_users_own_task_runs(tmp_path: Path, own_score: bool) -> None:
    write_tiny_llama(tmp_path / "model", seed=0)
    (tmp_path / "tasks").mkdir()
    lines = [json.dumps({"question": f"{n} + 1 =", "answer": str(n + 1)}) + "\n" for n in range(20)]
    (tmp_path / "tasks" / "questions.jsonl").write_text("".join(lines))
    task = block("tasks.md", "# tasks/mine.yaml")
    if own_score:
        task = re.sub(r"^(filter_list|metric_list):.*\n", "", task, flags=re.MULTILINE)
        task += block("tasks.md", "!function scorer.overlap")
        (tmp_path / "tasks" / "scorer.py").write_text(block("tasks.md", "# tasks/scorer.py"))
    (tmp_path / "tasks" / "mine.yaml").write_text(task)
    settings = {
        "models": {"experts": {"a": "./model", "b": "./model"}},
        "method": "linear",
        "engine": "transformers",
        "evaluation": {"trust_task_code": own_score},
        "budget": {"evaluations": 9},
        **yaml.safe_load(block("tasks.md", "# search.yaml")),
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(settings))
    scored = evomerge.evaluate_model(evomerge.load_config(tmp_path / "search.yaml"), tmp_path / "model", "search")
    assert scored.evaluation.item_scores["mine"].shape == (12,)
    assert 0 <= scored.evaluation.scores["mine"] <= 1


def test_the_example_of_a_run_in_python_runs(tmp_path: Path) -> None:
    for seed, name in enumerate(("mine", "other")):
        settings = {
            "strategy": "random",
            "seed": seed,
            "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 3, "n_items": 5, "item_noise": 0.1},
            "cluster": {"kind": "local"},
            "budget": {"evaluations": 12},
            "finals": {"finalists": 2},
        }
        evomerge.run_search(evomerge.load_config(settings), tmp_path / "runs" / name)
    code = block("run-directory.md", "import evomerge")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == ["f1", "f2"]
    assert (tmp_path / "front.html").exists()
