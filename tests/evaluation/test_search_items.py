"""`evaluation.search_items`: candidates are scored on a random sample of the search items."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.core import Split
from evomerge.engine import LogLikelihood
from evomerge.evaluation import TaskSpec
from evomerge.evaluation.loaded_task import load_task

N_ITEMS = 30


@pytest.fixture(scope="module")
def load(task_folder: Path, models: list[Path]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    return lambda **options: load_task(TaskSpec(str(task_folder / "choices.yaml"), **options), tokenizer)


def asked(task: Any, split: Split = Split.SEARCH) -> list[tuple[int, ...]]:
    return [request.context for request in task.items(split).likelihoods[::4]]


def test_sample_is_in_data_order_and_depends_on_the_seed(load: Any) -> None:
    everything = asked(load())
    places = {
        (count, seed): [everything.index(one) for one in asked(load(search_items=count, seed=seed))]
        for count, seed in ((7, 0), (12, 0), (7, 1))
    }
    assert [len(drawn) for drawn in places.values()] == [7, 12, 7]
    assert all(drawn == sorted(set(drawn)) for drawn in places.values())
    assert max(places[7, 0]) > 7
    assert set(places[7, 0]) < set(places[12, 0])
    assert places[7, 0] != places[7, 1]
    again = load(search_items=7)
    assert asked(again) == asked(load(search_items=7))
    assert again.items(Split.SEARCH).represents == N_ITEMS / 7
    for split in (Split.SELECT, Split.REPORT):
        assert asked(again, split) == asked(load(), split)
        assert again.items(split).represents == 1.0


@pytest.mark.parametrize("count", [N_ITEMS, 10 * N_ITEMS])
def test_sample_is_limited_to_the_available_items(load: Any, count: int) -> None:
    task = load(search_items=count)
    assert asked(task) == asked(load())
    assert task.items(Split.SEARCH).represents == 1.0


def test_sample_is_drawn_from_the_items_left_by_limit(load: Any) -> None:
    task = load(search_items=5, limit=8)
    assert set(asked(task)) < set(asked(load())[:8])
    assert task.items(Split.SEARCH).represents == 8 / 5
    assert len(task.items(Split.REPORT)) == 8


def test_sampled_items_have_the_same_scores_as_in_the_full_set(load: Any) -> None:
    everything, drawn = load().items(Split.SEARCH), load(search_items=9).items(Split.SEARCH)
    answers = {
        request: LogLikelihood(-float(number * 7919 % 101), is_greedy=False)
        for number, request in enumerate(everything.likelihoods)
    }
    scores = dict(
        zip(
            (request.context for request in everything.likelihoods[::4]),
            everything.score([answers[request] for request in everything.likelihoods], []),
            strict=True,
        )
    )
    wanted = [scores[request.context] for request in drawn.likelihoods[::4]]
    assert 0 < np.mean(wanted) < 1
    assert drawn.score([answers[request] for request in drawn.likelihoods], []).tolist() == wanted


def test_shared_items_are_dropped_from_the_sample(load: Any) -> None:
    spec = {"splits": {Split.SEARCH: "search", Split.REPORT: "search[20:]"}, "drop_shared": True, "search_items": 15}
    items = load(**spec).items(Split.SEARCH)
    assert 0 < items.n_dropped < 15
    assert len(items) == 15 - items.n_dropped
    assert items.represents == N_ITEMS / 15
    assert set(asked(load(**spec))) < set(asked(load())[:20])
