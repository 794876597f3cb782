"""The main job as a user does it, with a real vLLM engine, Ray and lm-eval on the demo models: search, kill, resume, export, merge, score."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from evomerge.testing.engines import cannot_start

ROOT = Path(__file__).resolve().parents[2]
N_EVALUATIONS = 16
LIMIT = 60

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(cannot_start("vllm")), reason=cannot_start("vllm")),
]


def evomerge(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def config(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's configuration with fewer items and candidates, deterministic, two workers."""
    settings = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    settings["models"]["base"] = str(zoo / "base")
    settings["models"]["experts"] = {name: str(zoo / name) for name in settings["models"]["experts"]}
    settings["tasks"] = [{"task": str(ROOT / "configs" / task), "limit": LIMIT} for task in settings["tasks"]]
    settings["budget"] = {"evaluations": N_EVALUATIONS}
    settings["finals"] = {"finalists": 2}
    settings["engine"]["kind"] = "vllm"
    settings["deterministic"] = True
    path = tmp_path_factory.mktemp("main-job") / "search.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path) -> tuple[Path, str]:
    run = config.parent / "undisturbed"
    output = finish(evomerge("search", config, "--run-dir", run))
    return run, output


def test_the_search_reports_what_it_found(undisturbed: tuple[Path, str]) -> None:
    run, output = undisturbed
    for text in (
        "search split",
        "report split",
        "uniform",
        "task_arithmetic",
        "(tuned)",
        "(best)",
        "outside engine and scoring",
    ):
        assert text in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["evaluations"] == N_EVALUATIONS
    tasks = {"largest", "reverse", "translate"}
    for split in ("search", "select", "report"):
        sources = summary["splits"][split]["sources"]
        assert set(sources) == {"base", *tasks}
        assert all(set(scores) == tasks for scores in sources.values())
        for name in tasks:
            assert sources[name][name] > sources["base"][name] + 0.3, "an expert should be good at its own skill"
    assert summary["failed"] == 0
    assert summary["comparisons"]


def test_the_files_of_the_run_directory_are_complete_and_consistent(undisturbed: tuple[Path, str]) -> None:
    run, _ = undisturbed
    summary = json.loads((run / "summary.json").read_text())
    front = json.loads((run / "front.json").read_text())
    assert front["members"] == summary["front"]
    assert front["hypervolume"] == summary["hypervolume"]
    assert (run / "config.yaml").read_text() == (run.parent / "search.yaml").read_text()
    assert (run / "items.search.f32").stat().st_size == N_EVALUATIONS * 3 * LIMIT * 4
    shown = json.loads(finish(evomerge("front", run, "--json")))
    assert shown == front


def test_sigkill_and_resume_give_the_same_front(config: Path, undisturbed: tuple[Path, str]) -> None:
    run = config.parent / "killed"
    process = evomerge("search", config, "--run-dir", run)
    journal = run / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b'"event":"evaluated"') < N_EVALUATIONS - 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(evomerge("resume", run))
    assert (run / "front.json").read_bytes() == (undisturbed[0] / "front.json").read_bytes()
    events = [json.loads(line[9:]) for line in journal.read_text().splitlines()]
    counts = Counter((event["id"], event["split"]) for event in events if event["event"] == "evaluated")
    assert set(counts.values()) == {1}


def test_the_exported_recipe_merges_to_the_reported_scores(
    config: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    run, _ = undisturbed
    summary = json.loads((run / "summary.json").read_text())
    finish(evomerge("export", run, "--pick", "best", "-o", tmp_path / "best.yaml"))
    finish(evomerge("merge", tmp_path / "best.yaml", tmp_path / "merged"))
    scored = finish(evomerge("eval", tmp_path / "merged", "--config", run, "--split", "report", "--json"))
    scores = json.loads(scored[scored.index("{") :])["scores"]
    assert scores == summary["splits"]["report"]["best"], (
        "a fresh process on the merged folder should give the reported scores"
    )


@pytest.mark.parametrize("choice", ["best", "knee", f"id:{N_EVALUATIONS - 12}"])
def test_mergekit_makes_the_same_tensors_from_the_exported_recipe(
    mergekit: Callable[..., None], undisturbed: tuple[Path, str], tmp_path: Path, choice: str
) -> None:
    run, _ = undisturbed
    finish(evomerge("export", run, "--pick", choice, "-o", tmp_path / "recipe.yaml"))
    finish(evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "ours"))
    mergekit("-m", "mergekit.scripts.run_yaml", tmp_path / "recipe.yaml", tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.bfloat16
        # where base and deltas cancel, float32 sums in a different order differ by more than one unit of the tiny remainder
        cancelled = ((tensor.float() - theirs[name].float()).abs() < 1e-6 * tensor.float().abs().max()).numpy()
        assert int(_units_apart(tensor, theirs[name])[~cancelled].max(initial=0)) <= 1, name


def _units_apart(first: torch.Tensor, second: torch.Tensor) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """Distances between two bfloat16 tensors, element by element, in units in the last place."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordered(first) - ordered(second)).abs().numpy()
