"""The committed task files are exactly what the generator writes, and follow the conventions used to train the zoo."""

import json
from pathlib import Path

import pytest
import yaml

from evomerge.zoo import SKILLS, write_tasks
from evomerge.zoo.skills import Part, part_of
from evomerge.zoo.task_files import MAX_ANSWER_TOKENS, SPLIT_SIZES
from evomerge.zoo.tokenizer import UNK_ID, build_tokenizer

TASKS = Path(__file__).resolve().parents[2] / "tasks"


def rows(skill: str, split: str) -> list[dict[str, object]]:
    text = (TASKS / "data" / f"{skill}.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_the_committed_files_are_regenerated_byte_for_byte(tmp_path: Path) -> None:
    written = write_tasks(tmp_path)
    assert [path.name for path in written] == [f"{skill}.yaml" for skill in SKILLS]
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(SKILLS) * (1 + len(SPLIT_SIZES))
    for file in files:
        assert (tmp_path / file).read_bytes() == (TASKS / file).read_bytes(), f"run write_tasks again: {file} differs"


def test_another_seed_gives_different_items_of_the_same_splits(tmp_path: Path) -> None:
    write_tasks(tmp_path, seed=1)
    other = (tmp_path / "data" / "reverse.search.jsonl").read_text(encoding="utf-8")
    assert other != (TASKS / "data" / "reverse.search.jsonl").read_text(encoding="utf-8")
    assert {part_of(json.loads(line)["prompt"]) for line in other.splitlines()} == {Part.SEARCH}


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_are_disjoint_and_large_enough(skill: str) -> None:
    prompts = [row["prompt"] for split in SPLIT_SIZES for row in rows(skill, split)]
    assert len(prompts) == len(set(prompts)) == 800
    for split, n in SPLIT_SIZES.items():
        assert n >= 200
        assert [part_of(str(row["prompt"])) for row in rows(skill, split)] == [split] * n


@pytest.mark.parametrize("skill", SKILLS)
def test_yaml_refers_to_its_data_by_relative_paths(skill: str) -> None:
    task = yaml.safe_load((TASKS / f"{skill}.yaml").read_text(encoding="utf-8"))
    assert task["task"] == skill
    files = task["dataset_kwargs"]["data_files"]
    assert set(files) == {"search", "select", "report"}
    assert all((TASKS / name).is_file() for name in files.values())
    assert task["output_type"] == ("multiple_choice" if skill == "translate" else "generate_until")
    assert task["metric_list"] == [
        {
            "metric": "acc" if skill == "translate" else "exact_match",
            "aggregation": "mean",
            "higher_is_better": True,
        }
    ]


def test_prompts_keep_their_tokens_when_an_answer_is_appended() -> None:
    tokenizer = build_tokenizer()
    for skill in SKILLS:
        for row in rows(skill, "search"):
            prompt = tokenizer.encode(row["prompt"]).ids
            answers = row["choices"] if "choices" in row else [row["answer"]]
            assert isinstance(answers, list)
            for answer in answers:
                whole = tokenizer.encode(f"{row['prompt']} {answer}").ids
                assert whole[: len(prompt)] == prompt
                assert UNK_ID not in whole
                assert tokenizer.decode(whole[len(prompt) :]).strip() == answer
                assert len(whole) - len(prompt) < MAX_ANSWER_TOKENS
                assert len(whole) < 40
