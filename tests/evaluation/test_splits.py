"""Different splits must have different items; shared items are reported, or dropped on request."""

import numpy as np
import pytest
from generation_task import ROWS

from evomerge.core import EvaluationError, Split
from evomerge.engine import Generation
from evomerge.evaluation import TaskSpec, load_task
from evomerge.evaluation.task_files import check_task


@pytest.mark.parametrize(
    "report",
    [
        pytest.param([*ROWS[6:], ROWS[0], ROWS[3]], id="same documents"),
        pytest.param([*ROWS[6:], ROWS[0] | {"id": 1}, ROWS[3] | {"id": 2}], id="same questions"),
    ],
)
def test_splits_must_be_disjoint(write_task, tokenizer, report):
    search = [row | {"id": 0} for row in ROWS[:6]] if "id" in report[-1] else ROWS[:6]
    report = [{"id": 0} | row for row in report] if "id" in report[-1] else report
    with pytest.raises(EvaluationError, match="2 of the 8 report items are also search items"):
        load_task(TaskSpec(write_task(report=report, search=search)), tokenizer)


def test_items_that_differ_only_in_a_fraction_are_different(write_task, tokenizer):
    search, report = ([{"q": float(i), "a": "yes"} for i in np.arange(6) / 10 + start] for start in (0.0, 0.05))
    task = load_task(TaskSpec(write_task(report=report, search=search)), tokenizer)
    assert [len(task.items(split)) for split in (Split.SEARCH, Split.REPORT)] == [6, 6]


def test_shared_items_are_dropped_from_the_earlier_split_on_request(write_task, tokenizer):
    """The report split stays unchanged, so that its score is comparable with other people's."""
    path = write_task(report=[*ROWS[6:], ROWS[0], ROWS[3] | {"a": "else"}], search=ROWS[:6])
    task = load_task(TaskSpec(path, drop_shared=True), tokenizer)
    assert [len(task.items(split)) for split in (Split.SEARCH, Split.REPORT)] == [5, 8]
    assert [task.items(split).n_dropped for split in (Split.SEARCH, Split.REPORT)] == [1, 0]
    assert task.items(Split.SEARCH).target(0) == "answer 1"
    answers = [Generation(f"answer {i}", 3) for i in range(1, 6)]
    assert task.items(Split.SEARCH).score([], answers).tolist() == [1] * 5
    with pytest.raises(EvaluationError, match="drop_shared leaves none of its 6 items"):
        load_task(TaskSpec(write_task(report=ROWS), drop_shared=True), tokenizer)


def test_suggested_splits_do_not_search_on_the_report_split(write_task):
    with pytest.raises(EvaluationError, match=r"no split 'train' for search; .* splits: {search: 'search\[:60%\]'"):
        check_task(TaskSpec(write_task(), splits={Split.SEARCH: "train"}), [Split.SEARCH])
