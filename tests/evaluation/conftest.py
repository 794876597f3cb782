import json
import os
import sys

import pytest
from generation_task import GENERATE, ROWS

from evomerge.core import random_stream
from evomerge.engine import engine_environment

# Set before torch and vLLM start, as a worker's launcher does for either engine.
os.environ.update(engine_environment("transformers") | engine_environment())
if "torch" in sys.modules:
    # More threads than free cores make tiny models ten times slower.
    sys.modules["torch"].set_num_threads(1)

SPLITS = ("search", "select", "report")
N_ITEMS = 30


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Two tiny models with the same tokenizer."""
    from evomerge.testing.tiny_models import write_tiny_llama

    folder = tmp_path_factory.mktemp("models")
    return [
        write_tiny_llama(folder / name, seed=seed, hidden=128, vocab=99, dtype="float32", init_std=0.3)
        for seed, name in enumerate(("a", "b"))
    ]


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """`choices.yaml` (multiple choice), `likely.yaml` (loglikelihood), `write.yaml` (generate_until, two filters), `texts.yaml` (whole texts)."""
    folder = tmp_path_factory.mktemp("tasks")
    for split in SPLITS:
        stream = random_stream(0, "tasks", split)

        def word(stream=stream):
            return "".join(stream.choice(list("abcdefgh"), int(stream.integers(1, 5))))

        rows = [
            {
                "question": f"{word()} {word()}",
                "choices": [word() + str(i) for i in range(4)],
                "answer": int(stream.integers(4)),
                "letter": str(stream.choice(list("abcdefghijklmnopqrstuvwxyz"))),
                "text": " ".join(word() for _ in range(stream.integers(0, 40))),
            }
            for _ in range(N_ITEMS)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "dataset_path: json\ndataset_kwargs:\n  data_files:\n" + "".join(f"    {s}: {s}.jsonl\n" for s in SPLITS)
    (folder / "choices.yaml").write_text(
        "task: choices\n" + data + "output_type: multiple_choice\ntest_split: search\n"
        'doc_to_text: "Q: {{question}} \\nA:"\ndoc_to_choice: choices\ndoc_to_target: answer\n'
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}\n"
    )
    (folder / "likely.yaml").write_text(
        "task: likely\n" + data + "output_type: loglikelihood\ntest_split: search\n"
        'doc_to_text: "{{question}} "\ndoc_to_target: letter\n'
    )
    (folder / "write.yaml").write_text(
        "task: write\n" + data + "output_type: generate_until\ntest_split: search\n"
        'doc_to_text: "Say {{question}}:"\ndoc_to_target: letter\n'
        'generation_kwargs: {until: ["\\n", "z", "Q"], max_gen_toks: 12, do_sample: false}\n'
        "filter_list:\n"
        "  - {name: whole, filter: [{function: take_first}]}\n"
        "  - {name: first-letter, filter: "
        "[{function: regex, regex_pattern: '([a-z])'}, {function: take_first}]}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: chrf, aggregation: chrf, higher_is_better: true}\n"
        "  - {metric: ter, aggregation: ter, higher_is_better: false}\n"
    )
    (folder / "texts.yaml").write_text(
        "task: texts\n" + data + "output_type: loglikelihood_rolling\ntest_split: search\n"
        'doc_to_text: ""\ndoc_to_target: text\n'
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    return folder


@pytest.fixture(scope="session")
def tokenizer(models):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models[0])


@pytest.fixture
def write_task(tmp_path):
    """write(rows of the report split, **changed settings) -> path of the task file (JSON is valid YAML)."""

    def write(report=ROWS[6:], search=ROWS[:6], text=None, **changes):
        for name, rows in (("search", search), ("report", report)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "t.yaml"
        path.write_text(text or json.dumps(GENERATE | changes))
        return str(path)

    return write
