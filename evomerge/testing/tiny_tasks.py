"""A task with a few yes-or-no questions and the three splits of a search, for tests that run whole searches in seconds."""

import json
from pathlib import Path

import yaml

SPLITS = ("search", "select", "report")


def write_toy_task(path: Path, *, n_items: int) -> None:
    """Write an lm-eval task with the metric `acc`, with its data in the same folder.

    Args:
        path: the task file; its stem is the task's name.
        n_items: number of questions per split; every other one has the answer no.
    """
    files = {split: f"{path.stem}.{split}.jsonl" for split in SPLITS}
    path.parent.mkdir(exist_ok=True)
    for split, file in files.items():
        rows = [
            {"question": f"{split} {item} is", "choices": ["yes", "no"], "answer": item % 2} for item in range(n_items)
        ]
        (path.parent / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "search",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path.write_text(yaml.safe_dump(task))
