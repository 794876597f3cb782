"""Scorers and metrics defined by a task itself."""

import json

import pytest
from generation_task import GENERATE, ROWS

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation
from evomerge.evaluation import TaskSpec, load_task


def test_function_tags_run_only_when_trusted(write_task, tokenizer, tmp_path):
    (tmp_path / "helpers.py").write_text(
        "from pathlib import Path\n"
        "(Path(__file__).parent / 'ran').touch()\n\n\n"
        "def score(document, results):\n"
        "    if document['q'] == 'question 8':\n"
        "        raise KeyError('no gold')\n"
        "    return {'exact_match': len(results[0]) / 4}\n"
    )
    text = json.dumps(GENERATE)[:-1] + ', "process_results": !function helpers.score}'
    path = write_task(text=text)
    with pytest.raises(EvaluationError, match="!function"):
        load_task(TaskSpec(path), tokenizer)
    assert not (tmp_path / "ran").exists()
    task = load_task(TaskSpec(path), tokenizer, trust_code=True)
    assert task.items(Split.SEARCH).score([], [Generation("ab", 1)] * 6).tolist() == [0.5] * 6
    with pytest.raises(EvaluationError, match=r"split 'report', item 2: the scorer fails: KeyError\('no gold'\)"):
        task.items(Split.REPORT).score([], [Generation("ab", 1)] * 6)


def test_side_effects_of_a_scorer_do_not_reach_the_next_candidate(write_task, tokenizer, tmp_path):
    """It may change the document and draw from the global random generators."""
    (tmp_path / "helpers4.py").write_text(
        "import random\n\nimport numpy as np\n\n\n"
        "def score(document, results):\n"
        "    draws = random.random() + np.random.random()\n"
        "    return {'exact_match': len(document.pop('q', '')) + draws}\n"
    )
    path = write_task(text=json.dumps(GENERATE)[:-1] + ', "process_results": !function helpers4.score}')
    items = load_task(TaskSpec(path), tokenizer, trust_code=True).items(Split.SEARCH)
    first, second = (items.score([], [Generation("ab", 1)] * 6).tolist() for _ in range(2))
    assert first == second
    assert min(first) > len("question 0")
    assert len(set(first)) == len(first), "some items got the same random draw"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import no_such_package", "ModuleNotFoundError"),
        ("return {'exact_match': next(iter(()))}", "StopIteration"),
        ("import re\n    re.compile('(')", "missing \\)"),
        ("return None", "TypeError"),
    ],
)
def test_failing_scorer_names_the_item(write_task, tokenizer, tmp_path, body, reason):
    name = f"fails_{reason[:4].strip().lower()}"
    (tmp_path / f"{name}.py").write_text(f"def score(document, results):\n    {body}\n")
    path = write_task(text=json.dumps(GENERATE)[:-1] + f', "process_results": !function {name}.score}}')
    items = load_task(TaskSpec(path), tokenizer, trust_code=True).items(Split.SEARCH)
    with pytest.raises(EvaluationError, match=f"split 'search', item 0: the scorer fails: .*{reason}"):
        items.score([], [Generation("ab", 1)] * 6)


def test_score_must_be_a_finite_number(write_task, tokenizer, tmp_path):
    (tmp_path / "helpers2.py").write_text("def score(document, results):\n    return {'exact_match': float('nan')}\n")
    path = write_task(text=json.dumps(GENERATE)[:-1] + ', "process_results": !function helpers2.score}')
    task = load_task(TaskSpec(path), tokenizer, trust_code=True)
    with pytest.raises(EvaluationError, match="item 0: metric 'exact_match' must be one finite number"):
        task.items(Split.SEARCH).score([], [Generation("ab", 1)] * 6)


def test_numpy_bool_is_a_valid_score(write_task, tokenizer, tmp_path):
    """lm-eval's own `mutual` returns one: `np.argmax(results) == gold`."""
    (tmp_path / "helpers3.py").write_text(
        "import numpy as np\n\n\ndef score(document, results):\n    return {'exact_match': np.float64(1) == 1}\n"
    )
    path = write_task(text=json.dumps(GENERATE)[:-1] + ', "process_results": !function helpers3.score}')
    task = load_task(TaskSpec(path), tokenizer, trust_code=True)
    assert task.items(Split.SEARCH).score([], [Generation("ab", 1)] * 6).tolist() == [1.0] * 6


@pytest.mark.parametrize("rates", ["{'pass@1': 0.5}", "{'pass@1': 0.5, 'pass@2': 1.0}"])
def test_metric_may_return_one_value_under_another_name(write_task, tokenizer, tmp_path, rates):
    """lm-eval's own `humaneval` does this: its `pass_at_k` is reported as `pass@1`."""
    name = "one_rate" if rates.count("pass") == 1 else "two_rates"
    (tmp_path / f"{name}.py").write_text(f"def pass_at_k(references, predictions):\n    return {rates}\n")
    settings = {key: value for key, value in GENERATE.items() if key != "metric_list"}
    metric = f', "metric_list": [{{"metric": !function {name}.pass_at_k, "aggregation": "mean"}}]}}'
    path = write_task(text=json.dumps(settings)[:-1] + metric)
    items = load_task(TaskSpec(path), tokenizer, trust_code=True).items(Split.SEARCH)
    if name == "one_rate":
        assert items.score([], [Generation("ab", 1)] * 6).tolist() == [0.5] * 6
        return
    with pytest.raises(EvaluationError, match=r"does not return 'pass_at_k', only pass@1, pass@2"):
        items.score([], [Generation("ab", 1)] * 6)


def test_remaining_items_keep_their_filter_after_a_drop(write_task, tokenizer):
    first = {"function": "take_first"}
    filters = [{"name": "plain", "filter": [first]}, {"name": "upper", "filter": [{"function": "uppercase"}, first]}]
    path = write_task(search=ROWS[:7], filter_list=filters)
    task = load_task(TaskSpec(path, metric="exact_match,upper", drop_shared=True), tokenizer)
    items = task.items(Split.SEARCH)
    assert (task.filter, len(items), items.n_dropped) == ("upper", 6, 1)
    assert items.score([], [Generation(f"answer {i}", 3) for i in range(6)]).tolist() == [0] * 6
