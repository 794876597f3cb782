"""lm-eval's own MBPP, with its data and metric in the user's caches, as a first run outside the sandbox would leave them there."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation
from evomerge.evaluation import TaskSpec
from evomerge.evaluation.sandbox import SandboxedTask, _show_caches
from evomerge.testing.tiny_models import write_tiny_llama

METRIC = '''
"""Runs a candidate before its tests in this process, which is good enough for a test."""
import os

import datasets
import evaluate


class CodeEval(evaluate.Metric):
    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("string")), "references": datasets.Value("string")}
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=datasets.Features(features))

    def _compute(self, predictions, references, k):
        if os.getenv("HF_ALLOW_CODE_EVAL") != "1":
            raise ValueError("as the metric of this name refuses")

        def right(program):
            try:
                exec(program, {})
            except Exception:
                return 0.0
            return 1.0

        rates = [sum(right(text + "\\n" + tests) for text in texts) / len(texts) for texts, tests in zip(predictions, references)]
        return {"pass@1": sum(rates) / len(rates)}, {}
'''


def write_caches(home: Path) -> None:
    """A prepared data set and a metric, in the format of the Hugging Face libraries."""
    metric = home / "modules" / "evaluate_modules" / "metrics" / "evaluate-metric--code_eval" / ("0" * 64)
    metric.mkdir(parents=True)
    (metric / "code_eval.py").write_text(METRIC)
    for folder in (metric, metric.parent, metric.parents[1], metric.parents[2]):
        (folder / "__init__.py").touch()
    place = home / "datasets" / "google-research-datasets___mbpp" / "full" / "0.0.0" / "abc"
    place.mkdir(parents=True)
    splits = datasets.SplitDict(dataset_name="mbpp")
    for first, split in enumerate(("train", "validation", "test")):
        rows = [
            {
                "text": f"Add {n}.",
                "code": f"def add(x):\n  return x + {n}",
                "test_list": [f"assert add({k}) == {k + n}" for k in range(3)],
            }
            for n in range(10 * first, 10 * first + 4)
        ]
        part = datasets.Dataset.from_list(rows)
        part.save_to_disk(str(home / "arrow" / split))
        (home / "arrow" / split / "data-00000-of-00001.arrow").rename(place / f"mbpp-{split}.arrow")
        splits[split] = datasets.SplitInfo(name=split, num_examples=len(rows), dataset_name="mbpp")
    info = datasets.DatasetInfo(features=part.features, splits=splits, builder_name="mbpp", config_name="full")
    info.version = datasets.Version("0.0.0")
    info.write_to_directory(str(place))
    assert json.loads((place / "dataset_info.json").read_text())["config_name"] == "full"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.split("_")[1].lower()))
    return tmp_path / "home"


@pytest.fixture
def task(home: Path, tmp_path: Path) -> Iterator[SandboxedTask]:
    write_caches(home)
    splits = {Split.SEARCH: "train", Split.SELECT: "validation", Split.REPORT: "test"}
    model = write_tiny_llama(tmp_path / "model", seed=0)
    made = SandboxedTask(TaskSpec("mbpp", splits=splits, num_fewshot=1), model, timeout_s=60, processes=2)
    yield made
    made.close()


def test_mbpp_runs_the_models_code(task: SandboxedTask, home: Path) -> None:
    before = sorted(home.rglob("*"))
    items = task.items(Split.SELECT)
    answers = [Generation(f"def add(x):\n  return x + {n}", 9) for n in (10, 11, 0, 13)]
    assert items.score([], answers).tolist() == [1, 1, 0, 1]
    assert task.metric == "pass_at_1"
    assert sorted(home.rglob("*")) == before


def test_missing_cache_entries_are_reported(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    with pytest.raises(EvaluationError, match=r"(?s)code_eval.*run the task once with lm-eval itself"):
        SandboxedTask(TaskSpec("mbpp"), write_tiny_llama(tmp_path / "model", seed=0), timeout_s=60)


def test_caches_are_shown_without_data_made_from_local_files(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("hub/datasets--a--b", "datasets/a___b", "datasets/json", "modules/m"):
        (home / place).mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", "home/datasets")
    shown = tmp_path / "shown"
    shown.mkdir()
    _show_caches(shown)
    found = {str(link.relative_to(shown)): link.resolve() for link in shown.glob("*/*")}
    assert found == {place: home / place for place in ("hub/datasets--a--b", "datasets/a___b", "modules/m")}
