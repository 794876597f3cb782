"""Groups of tasks as one score: lm-eval's own groups, from its own files; unusable groups are named before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.build import describe, make_problem, open_run, parse_config, resume_search, start_search
from evomerge.build.tasks import task_specs
from evomerge.core import ConfigError, EvaluationRequest, Split, Status, random_stream
from evomerge.engine import LogLikelihood, make_engine
from evomerge.evaluation import LmEvalEvaluator, TaskSet
from evomerge.evaluation.task_files import named_tasks
from evomerge.evaluation.task_groups import find_group, lm_evals_index
from evomerge.plan import read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.weights import Merger, WeightPool

SIZES = {"few": 5, "some": 11, "many": 30, "letters": 14, "bare": 8}
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
GROUPS: dict[str, dict[str, Any]] = {
    "by_size": {"task": ["few", "many", "letters"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]},
    "all_the_same": {"task": ["few", "many"], "aggregate_metric_list": {"metric": "acc", "weight_by_size": False}},
    "by_tag": {
        "task": ["by_size", {"group": "inside", "task": [{"task": "some", "num_fewshot": 2}]}],
        "group_alias": "everything",
        "aggregate_metric_list": [{"metric": "acc", "filter_list": "none"}, {"metric": "acc_norm"}],
    },
    "only_tagged": {"task": ["short"], "aggregate_metric_list": [{"metric": "acc_norm", "weight_by_size": False}]},
    "no_score": {"task": ["few", "many"]},
    "overriding": {"task": ["few", {"task": "bare", "num_fewshot": 2}], "aggregate_metric_list": {"metric": "acc"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tasks of different sizes, two of them tagged `short`, and the groups."""
    folder = tmp_path_factory.mktemp("groups")
    for name, size in SIZES.items():
        files = {}
        for split in Split:
            stream = random_stream(0, name, split.value)
            words = ["".join(stream.choice(list("abcdefgh"), 3)) for _ in range(6 * size)]
            rows = [
                {
                    "question": f"{split.value} {words[6 * item]}",
                    "choices": [words[6 * item + 1], words[6 * item + 2] + words[6 * item + 3], words[6 * item + 4]],
                    "answer": int(stream.integers(3)),
                    "letter": str(stream.choice(list("abcdefghijklmnopqrstuvwxyz"))),
                }
                for item in range(size)
            ]
            files[split.value] = f"{name}.{split.value}.jsonl"
            (folder / files[split.value]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "search",
            "fewshot_split": "select",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}:",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [ACC, ACC | {"metric": "acc_norm"}],
        }
        if name == "letters":
            settings |= {"output_type": "loglikelihood", "doc_to_target": "letter", "metric_list": [ACC]}
            del settings["doc_to_choice"]
        if name == "bare":
            settings["num_fewshot"] = 0
        if name in ("few", "some"):
            settings["tag"] = ["short"]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    for name, settings in GROUPS.items():
        (folder / f"_{name}.yaml").write_text(yaml.safe_dump({"group": name, **settings}))
    return folder


def configured(folder: Path, models: list[Path], *tasks: Any, **changes: Any) -> Any:
    settings = {
        "models": {"experts": {"a": str(models[0]), "b": str(models[1])}},
        "method": "linear",
        "tasks": list(tasks),
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 6},
        **changes,
    }
    return parse_config(settings, folder=folder)


def test_items_of_a_group_are_those_of_its_tasks(folder: Path, models: list[Path]) -> None:
    group = TaskSet(task_specs(configured(folder, models, "_by_size.yaml")), models[0]).items(Split.SEARCH)["by_size"]
    assert len(group.parts) > 1
    assert len(group) == sum(map(len, group.parts))
    assert group.longest == max(part.longest for part in group.parts)
    targets = [part.target(number) for part in group.parts for number in range(len(part))]
    assert [group.target(number) for number in range(len(group))] == targets


@pytest.mark.parametrize(
    ("group", "wanted", "sizes", "weights"),
    [
        # tasks with 5, 30 and 14 items: 2 of each represent all of its items
        ("by_size", 6, [2, 2, 2], [5 / 49 * 3, 30 / 49 * 3, 14 / 49 * 3]),
        ("by_size", 30, [5, 10, 10], [5 / 49 * 5, 30 / 49 * 2.5, 14 / 49 * 2.5]),
        ("by_size", 2, [2, 2, 2], [5 / 49 * 3, 30 / 49 * 3, 14 / 49 * 3]),
        ("all_the_same", 12, [5, 6], [11 / 10, 11 / 12]),
        ("by_size", 1000, [5, 30, 14], [1, 1, 1]),
    ],
)
def test_sampled_items_of_a_group_are_weighted(
    folder: Path, models: list[Path], group: str, wanted: int, sizes: list[int], weights: list[float]
) -> None:
    config = configured(folder, models, f"_{group}.yaml", evaluation={"search_items": wanted})
    items = TaskSet(task_specs(config), models[0]).items(Split.SEARCH)[group]
    assert [len(part) for part in items.parts] == sizes
    right = [LogLikelihood(0.0, is_greedy=True)] * len(items.likelihoods)
    each = [part.score(right[: len(part.likelihoods)], []) for part in items.parts]
    expected = np.concatenate([weight * scores for weight, scores in zip(weights, each, strict=True)])
    assert items.score(right, []) == pytest.approx(expected, rel=1e-12)


def test_score_of_a_group_equals_lm_evals(folder: Path, models: list[Path], tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = [
        "_by_size.yaml",
        "_all_the_same.yaml",
        "_by_tag.yaml",
        {"task": "_only_tagged.yaml", "name": "tagged"},
        {"task": "_by_tag.yaml", "metric": "acc", "num_fewshot": 1, "name": "one example", "limit": 6},
        "_no_score.yaml",
        "_overriding.yaml",
        {"task": "_overriding.yaml", "num_fewshot": 1, "name": "one for all"},
        "bare.yaml",
    ]
    config = configured(folder, models, *tasks)
    headers = {str(model): read_model_header(model) for model in models}
    engine = make_engine("transformers", models[0], dtype="float32")
    evaluator = LmEvalEvaluator(engine, Merger(WeightPool(headers)), headers, TaskSet(task_specs(config), models[0]))
    alone = {"weight": (Setting(1.0),)}
    recipe = Recipe("linear", (Slice((Source(str(models[0]), parameters=alone),)),), out_dtype="float32")
    ours = evaluator.evaluate(EvaluationRequest("c", Split.SEARCH, recipe=recipe.to_json()))
    evaluator.close()
    assert ours.status is Status.OK, ours.error

    model = HFLM(pretrained=str(models[0]), dtype="float32", device="cpu", batch_size=8, max_length=512)
    here = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval reads data files relative to the working directory

        def scores(names: list[str], **options: Any) -> dict[str, Any]:
            return simple_evaluate(model, tasks=names, task_manager=here, bootstrap_iters=2, **options)

        whole = [scores([name]) for name in (*GROUPS, "bare")]
        short = scores(["by_tag"], num_fewshot=1, limit=6)
        one = scores(["overriding"], num_fewshot=1)
    wanted = {
        "by_size": whole[0]["groups"]["by_size"]["acc,none"],
        "all_the_same": whole[1]["groups"]["all_the_same"]["acc,none"],
        "by_tag": whole[2]["groups"]["by_tag"]["acc,none"],
        "tagged": whole[3]["groups"]["only_tagged"]["acc_norm,none"],
        "one example": short["groups"]["by_tag"]["acc,none"],
        "few": whole[4]["results"]["few"]["acc,none"],
        "many": whole[4]["results"]["many"]["acc,none"],
        "overriding": whole[5]["groups"]["overriding"]["acc,none"],
        "one for all": one["groups"]["overriding"]["acc,none"],
        "bare": whole[6]["results"]["bare"]["acc,none"],
    }
    assert list(ours.scores) == list(wanted)
    assert ours.scores == pytest.approx(wanted, abs=1e-12)
    theirs = {
        number: whole[number]["groups"][name]["acc_stderr,none"]
        for number, name in ((0, "by_size"), (1, "all_the_same"))
    }
    assert ours.stderr["all_the_same"] == pytest.approx(theirs[1], abs=1e-12)
    assert ours.stderr["by_size"] == pytest.approx(theirs[0], rel=0.05), "lm-eval pools the variances"
    assert ours.stderr["few"] == pytest.approx(whole[4]["results"]["few"]["acc_stderr,none"], abs=1e-12)
    assert 0 < ours.scores["all_the_same"] != ours.scores["by_size"] < 1
    counts = {name: len(values) for name, values in ours.item_scores.items()}
    assert counts == {
        "by_size": 49,
        "all_the_same": 35,
        "by_tag": 60,
        "tagged": 16,
        "one example": 23,
        "few": 5,
        "many": 30,
        "overriding": 13,
        "one for all": 13,
        "bare": 8,
    }
    likely = {name: ours.item_scores[name][-8:].tolist() for name in ("overriding", "one for all", "bare")}
    assert len({*map(tuple, likely.values())}) > 1, "the examples have no effect"
    few = ours.item_scores["few"]
    assert ours.item_scores["all_the_same"][:5] == pytest.approx(few * 35 / 2 / 5)
    for name, values in ours.item_scores.items():
        assert np.mean(values, dtype=np.float64) == pytest.approx(ours.scores[name], abs=1e-7)


def test_search_over_groups_runs_and_notices_changed_data(folder: Path, models: list[Path], tmp_path: Path) -> None:
    config = configured(folder, models, "_by_size.yaml", "_all_the_same.yaml", finals={"finalists": 1})
    lines = describe(make_problem(config))
    assert "group       by_size: mean of 3 tasks, by size" in lines
    assert "group       all_the_same: mean of 2 tasks, each the same" in lines
    state = start_search(config, tmp_path / "run")
    assert state.finished
    assert [item.name for item in state.objectives] == ["by_size", "all_the_same"]
    assert dict(state.layouts[Split.REPORT]) == {"by_size": 49, "all_the_same": 35}
    assert state.sample_sizes[Split.REPORT] == {"by_size": (5, 30, 14), "all_the_same": (5, 30)}
    with open_run(tmp_path / "run") as run:
        assert run.evaluation("uniform", Split.REPORT).sample_sizes == state.sample_sizes[Split.REPORT]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["comparisons"]) >= {"uniform", "source:a", "source:b"} - {summary["best_id"]}

    data = folder / "letters.report.jsonl"
    before = data.read_text()
    data.write_text(before.replace("report", "other"))
    try:
        with pytest.raises(ConfigError, match=r"changed since the run was started: tasks .*_by_size\.yaml"):
            resume_search(tmp_path / "run")
    finally:
        data.write_text(before)


@pytest.mark.parametrize(
    ("settings", "task", "message"),
    [
        ({"task": ["few", "fewer"]}, {}, "group 'g': 'fewer' is not a task, group or tag"),
        ({"task": "few"}, {}, "group 'g': 'task' must be a list"),
        ({"task": []}, {}, "group 'g': contains no tasks"),
        ({"task": ["few", "short"]}, {}, "few.yaml twice"),
        ({"task": ["g"]}, {}, "group 'g': contains itself"),
        ({"task": ["few"], "num_fewshot": 3}, {}, "group 'g': overrides num_fewshot of its tasks"),
        ({"task": [{"task": "few", "description": "x"}]}, {}, "group 'g': overrides description of few"),
        ({"task": [{"task": "few", "num_fewshot": "two"}]}, {}, "group 'g': few: num_fewshot: expected a number of solved examples, got 'two'"),
        ({"task": [{"group": "by_size", "num_fewshot": 1}]}, {}, "group 'g': overrides num_fewshot of by_size"),
        ({"task": [{"dataset_path": "x"}]}, {}, "group 'g': an entry of 'task' does not name a task or group"),
        ({"task": ["few"], "aggregate_metric_list": [{"metric": "acc", "aggregation": "median"}]}, {}, "must be a mean over its tasks, but its aggregation is median"),
        ({"task": ["few"], "aggregate_metric_list": [{"weight_by_size": True}]}, {}, "a list of mappings with the key 'metric'"),
        ({"task": ["few"]}, {"metric": "f1"}, "group 'g': no score 'f1'. It has: acc"),
        ({"task": ["few"]}, {"metric": "acc,first"}, "group 'g': no filter 'first'; it has: none"),
        ({"task": ["few", "letters"], "aggregate_metric_list": [{"metric": "acc_norm"}]}, {}, "letters.yaml': no metric 'acc_norm'. It has: acc"),
        ({"task": ["few", "many"]}, {"splits": {"search": "train"}}, "task 'few': the data set has no split 'train' for search"),
        ({"task": ["few", "gsm8k"]}, {"splits": {"search": "test"}}, "'gsm8k': splits.search is test, which the public benchmark is scored on"),
        ({"task": ["few"], "aggregate_metric_list": None}, {"name": "mine"}, "stands for 1 tasks and has no score of its own, so it cannot be named 'mine'"),
        ({"task": ["few", "errors"]}, {}, "errors.yaml', higher for that of"),
        ({"task": ["errors"]}, {}, "this one as {name: g, direction: minimize}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_unusable_groups_are_named(
    folder: Path, models: list[Path], settings: dict[str, Any], task: dict[str, Any], message: str
) -> None:
    errors = yaml.safe_load((folder / "some.yaml").read_text()) | {"task": "errors", "tag": None}
    errors["metric_list"] = [ACC | {"higher_is_better": False}]
    rows = {"aggregate_metric_list": [{"metric": "acc", "filter_list": ["none"]}]}
    files = {"g": {"group": "g", **rows, **settings}, "errors": errors}
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    try:
        with pytest.raises(ConfigError) as caught:
            make_problem(configured(folder, models, {"task": "g.yaml", **task}))
        assert message in str(caught.value)
    finally:
        for name in files:
            (folder / f"{name}.yaml").unlink()


def test_groups_and_tags_of_lm_evals_collection_are_found() -> None:
    mmlu = find_group("mmlu")
    assert mmlu is not None
    assert len(mmlu.members) == 57
    assert mmlu.score(None) == ("acc", True)
    arc = find_group("ai2_arc")
    assert arc is not None
    assert [member.task for member in arc.members] == ["arc_challenge", "arc_easy"]
    assert not arc.scores
    tag_in_an_included_file = find_group("mlqa")
    assert tag_in_an_included_file is not None
    assert len(tag_in_an_included_file.members) == 49
    assert find_group("gsm8k") is None
    assert find_group("gsm8kk") is None


def test_task_names_match_lm_evals_own_index() -> None:
    """That index takes ten times as long to build, and is needed only for groups that our YAML reader refuses."""
    find_group("mmlu")
    assert lm_evals_index.cache_info().currsize == 0
    names, index = named_tasks(), lm_evals_index()
    kinds = {name: entry.kind.name for name, entry in index.items()}
    groups = {name for name, kind in kinds.items() if kind == "GROUP"}
    tags = {name: sorted(entry.tags) for name, entry in index.items() if kinds[name] == "TAG"}
    assert names.groups.keys() == groups
    assert {tag: members for tag, members in names.tags.items() if tag in tags} == tags
    assert names.tags.keys() - tags.keys() <= kinds.keys()
    assert names.tasks.keys() == kinds.keys() - groups - tags.keys()
    refused = find_group("turblimp_core")
    assert refused is not None
    assert len(refused.members) == len(index["turblimp_core"].cfg["task"])


def test_lm_eval_tasks_where_lower_is_better_need_a_direction(models: list[Path], tmp_path: Path) -> None:
    splits = {"search": "dev", "select": "validation", "report": "test"}
    task = {"task": "crows_pairs_english", "splits": splits, "name": "bias"}
    with pytest.raises(ConfigError, match=r"lower is better for task 'bias' .*\{name: bias, direction: minimize\}"):
        make_problem(configured(tmp_path, models, task))
    (goal,) = make_problem(
        configured(tmp_path, models, task, objectives=[{"name": "bias", "direction": "minimize"}])
    ).objectives
    assert goal.direction == "minimize"
    make_problem(configured(tmp_path, models, {"task": "lambada_openai", "splits": splits, "metric": "acc"}))
