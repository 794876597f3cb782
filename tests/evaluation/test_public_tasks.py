"""Tasks of lm-eval's collection under their usual names: prompts and scores equal lm-eval's item by item, or `validate` refuses the task.

The data are generated here with the columns of the public data sets; one table of answers stands in for the model on both sides.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer

from evomerge.build import describe, make_problem, parse_config
from evomerge.build.tasks import task_specs
from evomerge.core import ConfigError, Split, random_stream
from evomerge.engine import Generation, LogLikelihood
from evomerge.evaluation import TaskSpec, load_task
from evomerge.evaluation.grouped_task import GroupedTask

STREAM = random_stream(0, "public tasks")


def words(count: int) -> str:
    return " ".join("".join(STREAM.choice(list("abcdefgh"), 5)) for _ in range(count))


def pick(count: int) -> int:
    return int(STREAM.integers(count))


def hellaswag(_: int) -> dict[str, Any]:
    endings = [words(1 + i) for i in range(4)]
    return {"ctx_a": words(3), "ctx_b": words(2), "activity_label": words(1), "endings": endings, "label": str(pick(4))}


def winogrande(_: int) -> dict[str, Any]:
    return {
        "sentence": f"{words(2)} _ {words(2)}",
        "option1": words(1),
        "option2": words(1),
        "answer": str(1 + pick(2)),
    }


def truthful(_: int) -> dict[str, Any]:
    choices = [words(2) for _ in range(2 + pick(4))]
    targets = {"choices": choices, "labels": [1, *(pick(2) for _ in choices[1:])]}
    return {"question": words(3), "mc1_targets": targets, "mc2_targets": targets}


def gsm8k(number: int) -> dict[str, Any]:
    return {"question": words(4), "answer": f"{words(3)}\n#### {number},000"}


def gpqa(_: int) -> dict[str, Any]:
    wrong = {f"Incorrect Answer {i}": words(1) for i in (1, 2, 3)}
    return {"Question": words(3), "Correct Answer": words(2), **wrong}


def drop(number: int) -> dict[str, Any]:
    nothing = {"number": [], "date": [], "spans": []}
    answer = {"number": str(number), "date": {"day": "", "month": "", "year": ""}, "spans": []}
    return {
        "query_id": words(1),
        "passage": words(6),
        "question": words(2),
        "answer": answer,
        "validated_answers": nothing,
    }


def trivia(_: int) -> dict[str, Any]:
    return {"question": words(3), "answer": {"aliases": [words(1), words(2).title()], "value": ""}}


def mmlu(_: int) -> dict[str, Any]:
    return {"question": words(4), "choices": [words(1) for _ in range(4)], "answer": pick(4)}


def made(row: Any, **sizes: int) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list([row(i) for i in range(size)]) for split, size in sizes.items()}
    )


DATA = {
    "Rowan/hellaswag": made(hellaswag, train=30, validation=12),
    "allenai/winogrande": made(winogrande, train=30, validation=12),
    "truthfulqa/truthful_qa": made(truthful, validation=12),
    "openai/gsm8k": made(gsm8k, train=12, test=10),
    "Idavidrein/gpqa": made(gpqa, train=14),
    "EleutherAI/drop": made(drop, train=8, validation=10),
    "mandarjoshi/trivia_qa": made(trivia, train=20, validation=12),
    "EleutherAI/lambada_openai": made(lambda _: {"text": words(7)}, test=12),
    "cais/mmlu": made(mmlu, dev=5, validation=6, test=11),
    "nyu-mll/glue": made(lambda _: {"sentence": words(4), "label": pick(2)}, train=8, validation=30),
    "wmt/wmt16": made(lambda _: {"translation": {"en": words(9), "ro": words(9)}}, validation=5, test=50),
    "EleutherAI/wikitext_document_level": made(lambda i: {"page": f"{words(3 + i)} , {words(2)} ."}, train=2, test=30),
}
"""of every data set all subsets"""

RIGHT = {
    "gsm8k": lambda doc: doc["answer"].replace("####", "So #### " if doc["question"] < "d" else "####"),
    "drop": lambda doc: doc["answers"][0][0],
    "wmt16-en-ro": lambda doc: doc["translation"]["ro"],
    "triviaqa": lambda doc: doc["answer"]["aliases"][-1],
}


class Answers:
    """A model as a function of texts, for lm-eval and for us; its generated answers come from lm-eval's documents."""

    def __init__(self) -> None:
        self.generated: dict[str, str] = {}

    @staticmethod
    def likelihood(text: str) -> tuple[float, bool]:
        number = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
        return -(number % 1000) / 100, number % 3 == 0

    def ours(self, items: Any, decode: Any) -> list[float]:
        pairs = [self.likelihood(decode(one.context + one.continuation)) for one in items.likelihoods]
        texts = [self.generated[decode(one.prompt)] for one in items.generations]
        return items.score([LogLikelihood(*pair) for pair in pairs], [Generation(text, 1) for text in texts]).tolist()


def lm_evals(answers: Answers, task: str, num_fewshot: int | None) -> Any:
    """The result of `simple_evaluate` with these answers."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from evomerge.evaluation.task_files import named_tasks

    class Model(LM):
        def loglikelihood(self, requests: Any) -> Any:
            return [answers.likelihood((one.args[0] or "<eos>") + one.args[1]) for one in requests]

        def loglikelihood_rolling(self, requests: Any) -> Any:
            return [answers.likelihood("<eos>" + one.args[0])[0] for one in requests]

        def generate_until(self, requests: Any) -> Any:
            for one in requests:
                right = RIGHT[one.task_name](one.doc)
                answers.generated[one.args[0]] = right if one.doc_id % 3 else "no 12 idea"
            return [answers.generated[one.args[0]] for one in requests]

    names = named_tasks()
    folder = (names.tasks.get(task) or names.groups[task]).parent
    return lm_eval.simple_evaluate(
        Model(),
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        num_fewshot=num_fewshot,
        bootstrap_iters=0,
        log_samples=True,
    )


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets as on a machine that has not used them before: `map` saves its results next to the data set's files."""

    def load(path: str, name: str | None = None, **_: Any) -> Any:
        place = tmp_path_factory.mktemp("data")
        DATA[path].save_to_disk(str(place))
        return datasets.load_from_disk(str(place))

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("task", "split", "num_fewshot", "metric"),
    [
        ("hellaswag", "validation", 3, "acc_norm,none"),
        ("winogrande", "validation", 3, "acc,none"),
        ("truthfulqa_mc2", "validation", None, "acc,none"),
        ("gsm8k", "test", None, "exact_match,strict-match"),
        ("gsm8k", "test", 0, "exact_match,flexible-extract"),
        ("gpqa_main_zeroshot", "train", None, "acc,none"),
        ("drop", "validation", 1, "f1,none"),
        ("triviaqa", "validation", 2, "exact_match,remove_whitespace"),
        ("lambada_openai", "test", 1, "acc,none"),
        ("mmlu_anatomy", "test", 5, "acc,none"),
    ],
)
def test_prompts_and_scores_equal_lm_evals(
    models: list[Path], task: str, split: str, num_fewshot: int | None, metric: str
) -> None:
    answers, tokenizer = Answers(), AutoTokenizer.from_pretrained(models[0])
    theirs = lm_evals(answers, task, num_fewshot)
    spec = TaskSpec(task, metric=metric, splits={Split.SEARCH: split}, num_fewshot=num_fewshot)
    items = load_task(spec, tokenizer).items(Split.SEARCH)
    name, _, filter_name = metric.partition(",")
    samples = [sample for sample in theirs["samples"][task] if sample["filter"] == filter_name]
    asked = [
        "".join(part for part in one if isinstance(part, str)) for sample in samples for one in sample["arguments"]
    ]
    prompts = [one.context + one.continuation for one in items.likelihoods] or [one.prompt for one in items.generations]
    assert [tokenizer.decode(prompt).removeprefix("<eos>") for prompt in prompts] == asked
    scores = answers.ours(items, tokenizer.decode)
    assert scores == [float(sample[name]) for sample in samples]
    # sum() in Python 3.12 and later rounds differently from numpy's sum
    assert sum(scores) / len(scores) == pytest.approx(theirs["results"][task][metric], rel=1e-15)
    assert 0 < sum(scores) < len(scores)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("task", "split", "num_fewshot", "metric"),
    [
        ("cola", "validation", 2, "mcc,none"),
        ("wmt16-en-ro", "test", 1, "bleu,none"),
        ("wmt16-en-ro", "test", 0, "chrf,none"),
        ("lambada_openai", "test", 0, "perplexity,none"),
        ("wikitext", "test", None, "word_perplexity,none"),
        ("wikitext", "test", None, "bits_per_byte,none"),
    ],
)
def test_metrics_that_are_not_means_equal_lm_evals(
    models: list[Path], task: str, split: str, num_fewshot: int | None, metric: str
) -> None:
    answers, tokenizer = Answers(), AutoTokenizer.from_pretrained(models[0])
    theirs = lm_evals(answers, task, num_fewshot)["results"][task][metric]
    spec = TaskSpec(task, metric=metric, splits={Split.SEARCH: split}, num_fewshot=num_fewshot, window=512)
    scores = answers.ours(load_task(spec, tokenizer).items(Split.SEARCH), tokenizer.decode)
    assert sum(scores) / len(scores) == pytest.approx(theirs, rel=1e-12)
    assert len(set(scores)) > 1


@pytest.mark.usefixtures("no_hub")
def test_num_fewshot_of_zero_in_a_group_member_is_kept(models: list[Path], tmp_path: Path) -> None:
    """If a task itself says `num_fewshot: 0`, lm-eval does not change it, even in a group with other tasks."""
    (tmp_path / "g.yaml").write_text(
        "group: g\ntask: [truthfulqa_mc1, hellaswag]\naggregate_metric_list: [{metric: acc, weight_by_size: false}]\n"
    )
    task = {"task": "g.yaml", "num_fewshot": 2, "splits": {"search": "validation"}}
    (spec,) = task_specs(configured(tmp_path, models, task))
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    group = GroupedTask("g", [load_task(member, tokenizer) for member in spec.members], weight_by_size=False)
    answers, scores = Answers(), []
    for member, part in zip(spec.members, group.items(Split.SEARCH).parts, strict=True):
        theirs = lm_evals(answers, member.task, 2)["results"][member.task]["acc,none"]
        ours = answers.ours(part, tokenizer.decode)
        assert sum(ours) / len(ours) == theirs
        scores.append(theirs)
    whole = answers.ours(group.items(Split.SEARCH), tokenizer.decode)
    assert sum(whole) / len(whole) == pytest.approx(sum(scores) / 2)


def test_item_is_never_its_own_example_if_another_split_is_evaluated(models: list[Path], no_hub: None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    splits = {Split.SEARCH: "test[:50%]", Split.REPORT: "test[50%:]"}
    task = load_task(TaskSpec("lambada_openai", splits=splits, num_fewshot=5), tokenizer)
    texts = [tokenizer.decode(one.context + one.continuation) for one in task.items(Split.SEARCH).likelihoods]
    for text in texts:
        *examples, item = text.removeprefix("<eos>").replace("  ", " ").split("\n\n")
        assert len(examples) == 5
        assert item not in examples


def configured(folder: Path, models: list[Path], task: Any, **changes: Any) -> Any:
    settings = {
        "models": {"experts": {"a": str(models[0]), "b": str(models[1])}},
        "method": "linear",
        "tasks": [task],
        "engine": {"kind": "transformers"},
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 60},
        **changes,
    }
    return parse_config(settings, folder=folder)


def of(task: str, **settings: Any) -> dict[str, Any]:
    return {"task": task, "splits": {"search": "train", "select": "validation", "report": "test"}, **settings}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("gsm8k", r"task 'gsm8k': set splits to choose .* for search, select, report \(lm-eval uses train, test\), e\.g\. "
                  r"splits: {search: 'train\[:80%\]', select: 'train\[80%:\]', report: test}"),
        ("arc_easy", "{search: train, select: validation, report: test}"),
        ("race", r"{search: 'test\[:60%\]', .*}, search_on_test: true, or finals"),
        ({"task": "mmlu", "splits": {"search": "dev", "report": "test"}}, "splits for select "),
        (of("wikitext"), r"task 'wikitext' scores whole texts in pieces of engine\.max_model_len tokens"),
        (of("squadv2"), "'squadv2' is a Python class"),
        (of("gsm8k_cot_self_consistency"), "repeats: 64"),
        (of("non_greedy_robustness_agieval_aqua_rat"), "asks for sampling"),
        (of("mmmu_val"), "doc_to_image: only text tasks"),
        (of("lambada_openai", metric="perplexity"), "direction: minimize"),
        (of("gsm8k", metric="flexible-extract"), "did you mean 'exact_match,flexible-extract'"),
        (of("gsm8k", metric="exact_match,strict"), r"no filter 'strict'; did you mean 'strict-match'\?"),
        (of("truthfulqa_mc2", num_fewshot=5), "num_fewshot: 5 has no effect on a task whose own file sets num_fewshot: 0"),
        (of("leaderboard_musr"), "murder_mysteries and leaderboard_musr_object_placements are different splits of one data set"),
        (of("anli"), "anli_r1 and anli_r2 are different splits of one data set, test_r1 and test_r2"),
        (of("GSM8K"), "did you mean 'gsm8k'"),
    ],
    ids=lambda value: value["task"] if isinstance(value, dict) else value if value.isidentifier() else "",
)  # fmt: skip
def test_validate_reports_tasks_that_cannot_be_scored(
    models: list[Path], tmp_path: Path, task: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        make_problem(configured(tmp_path, models, task))


@pytest.mark.parametrize(
    ("others", "noted"), [(["gsm8k"], True), ([{**of("wmt16-ro-en"), "name": "back"}], False), ([], False)]
)
def test_scores_on_different_scales_are_noted(models, tmp_path, others, noted):
    tasks = [of("wmt16-en-ro"), *(of(task) if isinstance(task, str) else task for task in others)]
    lines = describe(make_problem(configured(tmp_path, models, tasks[0], tasks=tasks)))
    note = "objectives: wmt16-en-ro (bleu) may outweigh scores from 0 to 1 in the mean"
    assert any(note in line for line in lines) == noted


def test_task_code_that_exits_is_reported_as_an_error(models, tmp_path, monkeypatch):
    """lm-eval's own task calls `sys.exit` if Prolog is not installed."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"the code of lm-eval task 'slr_bench_all' cannot be loaded: .*swipl"):
        make_problem(configured(tmp_path, models, of("slr_bench_all")))


def searched_on(task: str, search: str, **settings: Any) -> dict[str, Any]:
    return {"task": task, "splits": {"search": search, "select": "x", "report": "y"}, **settings}


@pytest.mark.parametrize(
    "task",
    [
        searched_on("gsm8k", "test"),
        searched_on("gsm8k", "test[:60%]"),
        searched_on("boolq", "test"),
        searched_on("boolq", "validation[:60%]"),
        searched_on("anli_r2", "test_r2"),
        searched_on("aime", "train"),
    ],
    ids=lambda task: f"{task['task']}-{task['splits']['search']}",
)
def test_searching_on_the_split_a_benchmark_is_scored_on_requires_consent(
    models: list[Path], tmp_path: Path, task: Any
) -> None:
    """Whatever the task file calls that split."""
    with pytest.raises(ConfigError, match=r"which the public benchmark is scored on.*search_on_test: true"):
        make_problem(configured(tmp_path, models, task))
    make_problem(configured(tmp_path, models, {**task, "search_on_test": True}))
    make_problem(configured(tmp_path, models, task), begun=True)


def test_searching_on_other_splits_of_a_benchmark_is_allowed(models: list[Path], tmp_path: Path) -> None:
    for task in (searched_on("boolq", "train"), searched_on("anli_r2", "dev_r2"), searched_on("mmlu", "dev")):
        make_problem(configured(tmp_path, models, task))


def test_group_whose_tasks_lack_a_common_score_is_refused(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("group: g\ntask: [arc_easy, drop]\naggregate_metric_list: [{metric: acc_norm}]\n")
    with pytest.raises(
        ConfigError, match=r"group 'g': not all of its tasks have the score 'acc_norm' \(.*'drop'.*\); list its tasks"
    ):
        make_problem(configured(tmp_path, models, of("g.yaml")))


def test_missing_package_is_named(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        ConfigError, match=r"'ifeval' needs a package that is not installed: .*; pip install langdetect"
    ):
        make_problem(configured(tmp_path, models, of("ifeval", search_on_test=True)))


def test_validate_reports_the_metric(models: list[Path], tmp_path: Path) -> None:
    lines = describe(make_problem(configured(tmp_path, models, of("gsm8k"))))
    assert "objectives  gsm8k (maximize exact_match,strict-match)" in lines
