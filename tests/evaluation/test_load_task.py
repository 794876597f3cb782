"""What a task file may contain, what it may not, and how errors are reported."""

from pathlib import Path

import numpy as np
import pytest
from generation_task import ROWS

from evomerge.cli.tables import print_items
from evomerge.core import Evaluation, EvaluationError, Split, Status
from evomerge.engine import Generation, LogLikelihood
from evomerge.evaluation import LmEvalEvaluator, TaskSet, TaskSpec, load_task
from evomerge.evaluation.grouped_task import GroupedTask
from evomerge.evaluation.shown_items import show_items
from evomerge.evaluation.split_parts import part_range
from evomerge.evaluation.task_checks import check_supported
from evomerge.evaluation.task_files import check_task, data_files, task_fingerprint


def test_templates_are_compiled_once(write_task, tokenizer):
    from lm_eval.utils import apply_template, env

    task = load_task(TaskSpec(write_task(doc_to_target="{{a}}")), tokenizer)
    compiled = env.from_string.cache_info().misses
    items = task.items(Split.REPORT)
    assert items.score([], [Generation(f"answer {i}", 3) for i in range(6, 12)]).tolist() == [1] * 6
    assert env.from_string.cache_info().misses == compiled
    assert [apply_template("{{a}}-{{b}}", {"a": 1, "b": b}) for b in (2, 3)] == ["1-2", "1-3"]
    assert apply_template("{{a}}+{{b}}", {"a": 1, "b": 2}) == "1+2"


def test_targets_are_computed_once_for_all_candidates(write_task, tokenizer, monkeypatch):
    import lm_eval.utils

    rendered = []
    apply = lm_eval.utils.apply_template
    monkeypatch.setattr(lm_eval.utils, "apply_template", lambda *given: rendered.append(given) or apply(*given))
    items = load_task(TaskSpec(write_task(doc_to_target="{{a}}")), tokenizer).items(Split.REPORT)
    answers = [Generation(f"answer {i}", 3) for i in range(6, 12)]
    assert items.score([], answers).tolist() == [1] * 6
    rendered.clear()
    assert items.score([], answers[::-1]).tolist() == [0] * 6
    assert items.target(2) == "answer 8"
    assert not rendered


def test_requests_and_scores_follow_the_task_file(write_task, tokenizer):
    task = load_task(TaskSpec(write_task(), name="mine"), tokenizer)
    assert (task.name, task.metric, task.filter) == ("mine", "exact_match", "none")
    assert set(task.splits) == {Split.SEARCH, Split.REPORT}
    items = task.items(Split.REPORT)
    assert len(items) == len(items.generations) == 6
    assert items.likelihoods == ()
    assert items.generations[0].stop == (".", "<eos>")
    assert items.generations[0].max_tokens == 4
    assert tokenizer.decode(items.generations[0].prompt) == "question 6"
    assert items.prompt_tokens == sum(len(request.prompt) for request in items.generations)
    answers = [Generation(f"answer {i}" if i % 2 else "?", 3) for i in range(6, 12)]
    assert items.score([], answers).tolist() == [0, 1, 0, 1, 0, 1]
    # No candidate affects the scores of the next.
    assert items.score([], answers[::-1]).tolist() == [0] * 6
    assert items.score([], answers).tolist() == [0, 1, 0, 1, 0, 1]


def test_sampling_settings_without_effect_on_greedy_decoding_are_accepted(write_task, tokenizer):
    settings = {
        "until": ["."],
        "max_new_tokens": 4,
        "do_sample": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "num_beams": 1,
    }
    (request, *_) = (
        load_task(TaskSpec(write_task(generation_kwargs=settings)), tokenizer).items(Split.SEARCH).generations
    )
    assert request.max_tokens == 4


def test_limit_and_split_names_are_applied(write_task, tokenizer):
    spec = TaskSpec(write_task(), splits={Split.SEARCH: "report"}, limit=4)
    task = load_task(spec, tokenizer)
    assert set(task.splits) == {Split.SEARCH}
    with pytest.raises(EvaluationError, match="has no report items"):
        task.items(Split.REPORT)
    assert len(task.items(Split.SEARCH)) == 4


THIRDS = {Split.SEARCH: "train[:50%]", Split.SELECT: "train[50%:9]", Split.REPORT: "train[-25%:]"}


@pytest.mark.parametrize(
    ("part", "rows"),
    [("x", (0, 199)), ("x[0%:50%]", (0, 99)), ("x[:33%]", (0, 65)), ("x[-33%:]", (133, 199)), ("x[:-25%]", (0, 149)), ("x[-500:7]", (0, 7)), ("x[-3:]", (196, 199)), ("x[9:5]", (9, 9))],
)  # fmt: skip
def test_part_of_a_split_selects_a_range_of_rows(part, rows):
    assert part_range(part, 199) == range(*rows)
    for wrong in ("x[:200%]", "x[-101%:]"):
        with pytest.raises(EvaluationError, match=r"a percentage exceeds 100%"):
            part_range(wrong, 199)


def test_one_data_file_can_provide_all_splits(write_task, tokenizer):
    path = write_task(search=ROWS, dataset_kwargs={"data_files": "search.jsonl"}, test_split="train")
    task = load_task(TaskSpec(path, splits=THIRDS), tokenizer)
    asked = {split: [tokenizer.decode(one.prompt) for one in task.items(split).generations] for split in Split}
    assert [question for split in Split for question in asked[split]] == [row["q"] for row in ROWS]
    assert [len(asked[split]) for split in Split] == [6, 3, 3]
    with pytest.raises(EvaluationError, match=r"split 'train\[90:\]': this part is empty; train has 12 rows"):
        load_task(TaskSpec(path, splits=THIRDS | {Split.REPORT: "train[90:]"}), tokenizer)
    with pytest.raises(EvaluationError, match="1 of the 4 report items are also search items"):
        load_task(TaskSpec(path, splits={Split.SEARCH: "train[:9]", Split.REPORT: "train[-4:]"}), tokenizer)
    with pytest.raises(EvaluationError, match=r"no split 'search' .*, e\.g\. splits: {search: 'train\[:60%\]'"):
        load_task(TaskSpec(path), tokenizer)


@pytest.mark.parametrize(
    "source", [{"fewshot_split": "train"}, {"training_split": "train"}, {"fewshot_config": {"split": "train"}}]
)
@pytest.mark.parametrize("splits", [THIRDS, {Split.SEARCH: "train"}])
def test_item_is_never_its_own_example(write_task, tokenizer, source, splits):
    path = write_task(
        search=ROWS, dataset_kwargs={"data_files": "search.jsonl"}, num_fewshot=2, fewshot_delimiter="|", **source
    )
    task = load_task(TaskSpec(path, splits=splits), tokenizer)
    for items in task.splits.values():
        for request in items.generations:
            *examples, question = tokenizer.decode(request.prompt).split("|")
            assert len(examples) == 2
            assert not any(example.startswith(question.strip()) for example in examples)


def test_task_file_may_include_another(write_task, tokenizer, tmp_path):
    write_task(doc_to_text="Please {{q}}")
    (tmp_path / "mine.yaml").write_text(
        "include: t.yaml\ntask: mine\ngeneration_kwargs: {until: ['!'], max_gen_toks: 2}\n"
    )
    before = task_fingerprint(TaskSpec(str(tmp_path / "mine.yaml")))
    task = load_task(TaskSpec(str(tmp_path / "mine.yaml")), tokenizer)
    request = task.items(Split.SEARCH).generations[0]
    assert (task.name, tokenizer.decode(request.prompt), request.stop[0]) == ("mine", "Please question 0", "!")
    write_task(doc_to_text="Kindly {{q}}")
    assert task_fingerprint(TaskSpec(str(tmp_path / "mine.yaml"))) != before
    write_task(process_results="utils.score")
    with pytest.raises(EvaluationError, match="process_results: runs code"):
        load_task(TaskSpec(str(tmp_path / "mine.yaml")), tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        {"fewshot_split": "report"},
        {"fewshot_config": {"split": "report"}},
        {"fewshot_split": "report", "training_split": "search"},
    ],
)
def test_few_shot_examples_come_from_the_configured_split(write_task, tokenizer, source):
    path = write_task(num_fewshot=2, fewshot_delimiter="|", **source)
    for request in load_task(TaskSpec(path), tokenizer).items(Split.SEARCH).generations:
        *shots, _ = tokenizer.decode(request.prompt).split("|")
        assert len(shots) == 2
        assert {"".join(shot.split()) for shot in shots} <= {
            "".join(f"{row['q']}{row['a']}".split()) for row in ROWS[6:]
        }


def test_task_with_zero_examples_keeps_zero(write_task, tokenizer):
    """As in lm-eval: the task file's 0 is not overridden."""
    task = load_task(TaskSpec(write_task(num_fewshot=0), num_fewshot=2), tokenizer)
    assert tokenizer.decode(task.items(Split.SEARCH).generations[0].prompt) == "question 0"


@pytest.mark.parametrize("sampler", ["default", "first_n"])
def test_more_examples_than_available_are_refused(write_task, tokenizer, sampler):
    path = write_task(num_fewshot=6, fewshot_split="search", fewshot_config={"sampler": sampler})
    with pytest.raises(EvaluationError, match="6 solved examples per item, but there are only 6 to choose from"):
        load_task(TaskSpec(path), tokenizer)
    assert load_task(TaskSpec(path, num_fewshot=5), tokenizer)


@pytest.mark.parametrize(("content", "reason"), [("", "a file is empty"), ('{"q": 1}\n{"q": ', "JSON parse error")])
def test_damaged_data_is_reported(write_task, tokenizer, tmp_path, content, reason):
    path = write_task()
    (tmp_path / "search.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match=f"its data cannot be loaded: {reason}"):
        load_task(TaskSpec(path), tokenizer)


def refused(what, **settings):
    return pytest.param(what, settings, id=what)


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        refused("output_type 'loglikelihoods' is not supported", output_type="loglikelihoods"),
        refused("unknown metric 'exact_mach'; did you mean 'exact_match'", metric_list=[{"metric": "exact_mach"}]),
        refused("hf_evaluate downloads code", metric_list=[{"metric": "exact_match", "hf_evaluate": True}]),
        refused("unpickles files", dataset_path="pandas"),
        refused("process_docs: runs code", process_docs="utils.f"),
        refused("class: runs code", **{"class": "x.Y"}),
        refused("unsafe_code: runs code", unsafe_code=True),
        refused("include: no such file", include="other.yaml"),
        refused("t.yaml includes this file", include="t.yaml"),
        refused("repeats: 3", repeats=3),
        refused("only greedy decoding", generation_kwargs={"until": ["."], "do_sample": True, "temperature": 0.7}),
        refused("num_beams: 4 is not supported", generation_kwargs={"until": ["."], "num_beams": 4}),
        refused("repetition_penalty: 1.1", generation_kwargs={"until": ["."], "repetition_penalty": 1.1}),
        refused("max_length: 20", generation_kwargs={"until": ["."], "max_length": 20}),
        refused("repeats: many", repeats="many"),
        refused("generation_kwargs: expected settings by name, got ['x']", generation_kwargs=["x"]),
        refused("temperature: expected a number, got 'hot'", generation_kwargs={"until": ["."], "temperature": "hot"}),
        refused("generation_kwargs cannot be read", generation_kwargs={"until": ["."], "max_gen_toks": "many"}),
        refused("max_gen_toks: 0 allows no output", generation_kwargs={"until": ["."], "max_gen_toks": 0}),
        refused("until: expected texts, got [5]", generation_kwargs={"until": 5}),
        refused("only text tasks", doc_to_image=["x"]),
        refused("data file of split 'search' does not exist", dataset_kwargs={"data_files": {"search": "gone.jsonl"}}),
        refused("leaves the sandbox", doc_to_text="{{ ''.__class__.__mro__ }}"),
        refused("leaves the sandbox", doc_to_target="{{ q | attr('__' ~ 'class__') }}"),
        refused("leaves the sandbox", fewshot_config={"doc_to_text": "{{ q.__init__.__globals__ }}"}),
        refused("cannot build", doc_to_text="{{ no_such_column }}"),
        refused("has no split 'search'", dataset_kwargs={"data_files": {"report": "report.jsonl"}}),
        refused(
            "doc_to_choice: expected a list of answers, as in ['yes', 'no'], or the name of a column of lists, got 'question 0 no list'",
            output_type="multiple_choice",
            doc_to_choice="{{q}} no list",
        ),
        refused("column of lists, got 'question 0'", output_type="multiple_choice", doc_to_choice="q"),
        refused("column of lists, got 5", output_type="multiple_choice", doc_to_choice="{{5}}"),
    ],
)
def test_unsupported_task_settings_are_refused(write_task, tokenizer, what, settings):
    with pytest.raises(EvaluationError) as error:
        load_task(TaskSpec(write_task(**settings)), tokenizer)
    assert what in str(error.value)


@pytest.mark.parametrize(
    ("what", "settings"),
    [
        refused("num_fewshot: expected a number of solved examples, got 'two'", num_fewshot="two"),
        refused("num_fewshot: expected a number of solved examples, got -1", num_fewshot=-1),
        refused("unknown key 'doc_to_txt'; did you mean 'doc_to_text'", doc_to_txt="{{q}}"),
        refused("doc_to_text: is missing", doc_to_text=None),
        refused("doc_to_choice: is missing", output_type="multiple_choice"),
        refused("dataset_path: is missing", dataset_path=None),
        refused("num_fewshot: expected a number of solved examples, got True", num_fewshot=True),
        refused("description: expected a text, got ['Answer.']", description=["Answer."]),
        refused("target_delimiter: expected a text, got 5", target_delimiter=5),
        refused("fewshot_delimiter: expected a text, got None", fewshot_delimiter=None),
        refused("dataset_kwargs: expected settings by name, got 'json'", dataset_kwargs="json"),
        refused("fewshot_config: expected settings by name, got ['a']", fewshot_config=["a"]),
        refused("fewshot_config.samples: expected a list of rows, got 5", fewshot_config={"samples": 5}),
        refused("metric_list: expected metrics as in [{metric: acc,", metric_list="acc"),
        refused("metric_list: expected metrics as in [{metric: acc,", metric_list=["acc"]),
        refused("metric_list: expected metrics as in [{metric: acc,", metric_list=[{"metric": ["acc"]}]),
        refused("filter_list: expected filters as in [{name:", filter_list="regex"),
        refused("filter_list: expected filters as in [{name:", filter_list=[]),
        refused("got {'filter': [{'function': 'regex'}]}", filter_list=[{"filter": [{"function": "regex"}]}]),
        refused("filter_list: a: expected", filter_list=[{"name": "a", "filter": ["regex"]}]),
        refused(
            "filter_list: a: unknown function 'regx'; did you mean 'regex'",
            filter_list=[{"name": "a", "filter": [{"function": "regx"}]}],
        ),
        refused(
            "unexpected keyword argument 'pattern'",
            filter_list=[{"name": "a", "filter": [{"function": "regex", "pattern": "x"}]}],
        ),
        refused(
            "filter_list: a: regex cannot be constructed from",
            filter_list=[{"name": "a", "filter": [{"function": "regex", "regex_pattern": "(x"}]}],
        ),
    ],
)
def test_wrong_task_file_settings_are_found_without_loading_it(write_task, what, settings):
    with pytest.raises(EvaluationError) as error:
        check_supported(TaskSpec(write_task(**settings)))
    assert what in str(error.value)


@pytest.mark.parametrize("files", [5, {"search": [5]}, {"search": None}])
def test_data_file_names_must_be_strings(write_task, files):
    with pytest.raises(EvaluationError, match=r"data_files: (search|train): expected the name of a file, got (5|None)"):
        data_files(Path(write_task(dataset_kwargs={"data_files": files})))


def test_valid_lm_eval_filters_are_accepted(write_task):
    steps = [{"function": "regex", "regex_pattern": "a"}, {"function": "take_first"}]
    check_supported(
        TaskSpec(write_task(filter_list=[{"name": "a", "filter": steps}], num_fewshot=2, description="Go."))
    )


def test_group_of_tasks_with_different_scores_is_refused(write_task, tokenizer):
    plain = load_task(TaskSpec(write_task()), tokenizer)
    filters = [{"name": "strict", "filter": [{"function": "take_first"}]}]
    strict = load_task(TaskSpec(write_task(task="s", filter_list=filters)), tokenizer)
    assert len(GroupedTask("g", [plain, plain], weight_by_size=True).items(Split.SEARCH)) == 12
    with pytest.raises(EvaluationError, match=r"'t' is scored by exact_match,none and 's' by exact_match,strict"):
        GroupedTask("g", [plain, strict], weight_by_size=True)


def test_metric_and_filter_must_exist(write_task, tokenizer):
    path = write_task()
    with pytest.raises(EvaluationError, match=r"no metric 'acc'\. It has: exact_match"):
        load_task(TaskSpec(path, metric="acc"), tokenizer)
    with pytest.raises(EvaluationError, match=r"no filter 'strict'\. It has: none"):
        load_task(TaskSpec(path, metric="exact_match,strict"), tokenizer)


class Echo:
    """Implements the engine's protocol: generates the length of the prompt; the shorter a continuation, the more likely it is."""

    max_length = 512

    def generate(self, requests):
        return [Generation(f" {len(request.prompt)}", 1) for request in requests]

    def loglikelihood(self, requests):
        return [LogLikelihood(-float(len(request.continuation)), False) for request in requests]


def test_items_are_shown_with_the_models_answers(write_task, task_folder, tokenizer, capsys):
    written = load_task(TaskSpec(write_task()), tokenizer).items(Split.REPORT)
    first, second = show_items(written, 2, Echo(), tokenizer.decode)
    assert (first.prompt, first.answers, first.target) == ("question 6", (" 10",), "answer 6")
    assert (second.number, second.prompt) == (1, "question 7")
    assert len(show_items(written, 99, Echo(), tokenizer.decode)) == len(written)
    chosen = load_task(TaskSpec(str(task_folder / "choices.yaml")), tokenizer).items(Split.SEARCH)
    *_, last = show_items(chosen, 3, Echo(), tokenizer.decode)
    assert last.prompt.startswith("Q: ")
    assert len(last.answers) == 4
    assert all(answer.split()[-1].startswith("-") for answer in last.answers)
    evaluation = Evaluation("m", Split.REPORT, Status.OK, item_scores={"t": np.array([0.0, 1.0], np.float32)})
    print_items({"t": [first, second]}, evaluation)
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "t, item 0: score 0", "  prompt  'question 6'", "  answer  ' 10'", "  target  'answer 6'"
    ]  # fmt: skip


def test_items_of_a_group_are_numbered_within_the_group(write_task, models):
    tasks = TaskSet([TaskSpec("g", members=(TaskSpec(write_task()),) * 2)], models[0])
    shown = LmEvalEvaluator(Echo(), None, {}, tasks).show(Split.REPORT, 2)["g"]
    assert [(item.number, item.target) for item in shown] == [
        (number, f"answer {6 + number % 6}") for number in (0, 1, 6, 7)
    ]


def test_group_has_only_splits_that_all_its_tasks_have(write_task, tokenizer):
    path = write_task()
    both, one = (
        load_task(spec, tokenizer) for spec in (TaskSpec(path), TaskSpec(path, splits={Split.SEARCH: "report"}))
    )
    group = GroupedTask("g", [both, one], weight_by_size=True)
    assert set(group.splits) == {Split.SEARCH}
    with pytest.raises(EvaluationError, match="task 't' has no report items"):
        group.items(Split.REPORT)


def test_first_mean_metric_is_the_default(task_folder, tokenizer):
    task = load_task(TaskSpec(str(task_folder / "likely.yaml")), tokenizer)
    assert task.metric == "acc"  # lm-eval's first metric is perplexity, which is not a mean
    answers = [LogLikelihood(-1.0, i % 3 == 0) for i in range(30)]
    assert task.items(Split.SELECT).score(answers, []).sum() == 10


@pytest.mark.parametrize("settings", [{"fewshot_split": "serch"}, {"fewshot_config": {"split": "serch"}}])
def test_examples_must_come_from_an_existing_split(write_task, settings):
    path = write_task(**settings)
    check_task(TaskSpec(path), [Split.SEARCH])
    with pytest.raises(EvaluationError, match=r"fewshot_split: no split 'serch'; did you mean 'search'\?"):
        check_task(TaskSpec(path, num_fewshot=2), [Split.SEARCH])


def test_items_that_are_too_long_are_refused(write_task, tokenizer):
    items = load_task(TaskSpec(write_task()), tokenizer).items(Split.REPORT)
    items.check_lengths(15)
    with pytest.raises(EvaluationError, match=r"item 4: prompt and max_gen_toks take 15 tokens.*room for 14 \(2 of 6"):
        items.check_lengths(14)


def test_unknown_task_names_are_reported():
    with pytest.raises(EvaluationError, match=r"no such task file: .*gone\.yaml"):
        load_task(TaskSpec("gone.yaml"), None)
    with pytest.raises(EvaluationError, match="lm-eval has no task 'gsm8kk'; did you mean"):
        load_task(TaskSpec("gsm8kk"), None)
    with pytest.raises(
        EvaluationError, match=r"questions\.jsonl: is a data file, not a task; name it under data_files"
    ):
        load_task(TaskSpec("questions.jsonl"), None)
    with pytest.raises(EvaluationError, match="lm-eval has no task 'mmlu'"):
        load_task(TaskSpec("mmlu"), None)


def test_named_tasks_have_lm_evals_own_settings():
    from evomerge.evaluation.task_settings import task_settings

    settings = task_settings("gsm8k", trust_code=False)
    assert settings["task"] == "gsm8k"
    assert settings["output_type"] == "generate_until"
    anatomy = task_settings("mmlu_anatomy", trust_code=False)
    assert anatomy["dataset_name"] == "anatomy"
    assert anatomy["output_type"] == "multiple_choice"  # from the included file


def test_task_spec_is_checked():
    with pytest.raises(EvaluationError, match="limit must be at least 1"):
        TaskSpec("t.yaml", limit=0)
    with pytest.raises(EvaluationError, match="test is assigned to both search and report"):
        TaskSpec("t.yaml", splits={Split.SEARCH: "test", Split.REPORT: "test"})
    with pytest.raises(EvaluationError, match=r"x\[:60%\] and x\[50%:\] overlap for search and report"):
        TaskSpec("t.yaml", splits={Split.SEARCH: "x[:60%]", Split.REPORT: "x[50%:]"})
    with pytest.raises(EvaluationError, match=r"x\[:10\] and x overlap for select and report"):
        TaskSpec("t.yaml", splits={Split.SELECT: "x[:10]", Split.REPORT: "x"})
    with pytest.raises(EvaluationError, match=r"'x\[60%\]': expected a split, or a part of one"):
        TaskSpec("t.yaml", splits={Split.SEARCH: "x[60%]"})
    assert TaskSpec("t.yaml", splits={Split.SEARCH: "x[:500]", Split.REPORT: "x[50%:]"})  # that depends on the data
