"""Scores that are not means over items, and scores of whole texts."""

import math

import pytest

from evomerge.core import EvaluationError, Split
from evomerge.engine import LogLikelihood
from evomerge.evaluation import TaskSpec, load_task
from evomerge.evaluation.task_checks import check_supported


def test_failing_metric_over_all_items_is_named(write_task, tokenizer):
    """lm-eval's F1 supports two classes only."""
    path = write_task(
        output_type="multiple_choice", doc_to_choice=["a", "b", "c"], doc_to_target=2, metric_list=[{"metric": "f1"}]
    )
    items = load_task(TaskSpec(path), tokenizer).items(Split.SEARCH)
    with pytest.raises(
        EvaluationError, match=r"split 'search': metric 'f1' over its items fails: .*pos_label=1 is not a valid label"
    ):
        items.score([LogLikelihood(-float(n % 3), False) for n in range(18)], [])


TEXTS = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{a}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def test_whole_texts_are_scored_in_windows(write_task, tokenizer):
    rows = [{"q": "", "a": text} for text in ("a b c d e f g h i j", "", "k l")]
    items = load_task(TaskSpec(write_task(report=rows, **TEXTS), window=8), tokenizer).items(Split.REPORT)
    assert items.longest == 8
    assert all(len(one.context) + len(one.continuation) <= 8 for one in items.likelihoods)
    told = [token for one in items.likelihoods for token in one.continuation]
    assert tokenizer.decode(told).replace("<bos>", "").replace(" ", "") == "abcdefghijkl"
    assert items.counts[1] == 0
    scores = items.score([LogLikelihood(-math.log(2), False) for _ in items.likelihoods], [])
    assert scores.mean() == pytest.approx(len(items.likelihoods) / len("a b c d e f g h i jk l"))


def test_whole_texts_need_a_window_and_must_not_be_empty(write_task, tokenizer):
    path = write_task(**TEXTS)
    for check in (check_supported, lambda spec: load_task(spec, tokenizer)):
        with pytest.raises(EvaluationError, match=r"in pieces of engine\.max_model_len tokens, .* set it"):
            check(TaskSpec(path))
        with pytest.raises(EvaluationError, match="num_fewshot: 2 has no effect"):
            check(TaskSpec(path, window=8, num_fewshot=2))
    with pytest.raises(EvaluationError, match="split 'report': its texts are empty"):
        load_task(TaskSpec(write_task(report=[{"q": "", "a": ""}], **TEXTS), window=8), tokenizer)
