"""A small generation task: its rows and the settings of its task file."""

ROWS = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(12)]
GENERATE = {
    "task": "t",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"search": "search.jsonl", "report": "report.jsonl"}},
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "a",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
