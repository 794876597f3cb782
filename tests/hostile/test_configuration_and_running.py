"""Bad input of every class from 40 to 63: each has a test here, or one elsewhere that `ELSEWHERE` names and that must exist.

The classes: 40 to 52 are configurations and recipes, 53 to 63 are events during a run. 1 to 39 are checkpoints.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from bad_classes import check_classes

from evomerge.build import load_config, make_problem, parse_config
from evomerge.core import ConfigError, EngineError, EvaluationRequest, JournalError, RecipeError, Split, Status
from evomerge.engine import GenerateRequest, Generation, LogLikelihood, LogLikelihoodRequest
from evomerge.evaluation import LmEvalEvaluator, TaskSet, TaskSpec
from evomerge.recipe import Recipe, Setting, Slice, Source, check_recipe
from evomerge.recipe.mergekit_reader import recipe_from_mergekit
from evomerge.search import Journal, RunState, event, read_journal
from evomerge.testing.tiny_models import write_tiny_llama

ELSEWHERE = {
    53: "search/test_faults.py::test_a_disk_that_fills_up_loses_nothing",
    54: "search/test_faults.py::test_a_read_only_run_directory_gives_one_clear_message",
    56: "search/test_run_lock.py::test_a_second_process_is_refused_and_told_who_holds_the_lock",
    57: "search/test_run_signals.py::test_signals_save_progress_and_say_how_to_continue",
    58: "search/test_chaos.py::test_a_short_chaos",
    61: "search/test_faults.py::test_clocks_that_go_backwards_change_nothing",
    62: "search/test_journal.py::test_flipped_bits_are_never_silently_wrong",
    63: "search/test_faults.py::test_an_edited_configuration_is_refused_with_the_difference",
}
"""class -> the test that covers it, if it needs more than this file provides"""

SYNTHETIC: dict[str, Any] = {"evaluation": {"kind": "synthetic"}, "budget": {"evaluations": 10}}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models and a task."""
    folder = tmp_path_factory.mktemp("hostile")
    for index, name in enumerate(("base", "a", "b")):
        write_tiny_llama(folder / name, seed=index, dtype="float32")
    files = {"search": "item.jsonl", "select": "other.jsonl", "report": "third.jsonl"}
    for file in files.values():
        kind = file.removesuffix(".jsonl")
        (folder / file).write_text("".join(json.dumps({"q": f"{kind} {n}", "a": "x"}) + "\n" for n in range(4)))
    task = {
        "task": "toy", "dataset_path": "json", "dataset_kwargs": {"data_files": files},
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "a",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(task))
    return folder


def refused(folder: Path, message: str, base: dict[str, Any] | None = None, **changes: Any) -> None:
    """Checks how `evomerge validate` refuses a configuration; only headers are loaded."""
    models = {"base": "base", "experts": {"a": "a", "b": "b"}}
    usual = {"models": models, "method": "ties", "tasks": ["toy.yaml"], "budget": {"evaluations": 10}}
    settings = {**(usual if base is None else base), **changes}
    if "space" in changes:
        settings.pop("method")
    with pytest.raises(ConfigError) as caught:
        make_problem(parse_config(json.loads(json.dumps(settings)), folder=folder))
    assert message in str(caught.value)


def test_every_class_has_a_test() -> None:
    check_classes(range(40, 64), [Path(__file__)], ELSEWHERE)


def test_40_a_yaml_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bomb\.yaml.*alias"):
        load_config(tmp_path / "bomb.yaml")


def test_41_yaml_tags_that_create_objects(tmp_path: Path) -> None:
    (tmp_path / "tag.yaml").write_text(f"seed: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    with pytest.raises(ConfigError, match=r"tag\.yaml, line 1"):
        load_config(tmp_path / "tag.yaml")
    assert not (tmp_path / "made").exists()


def test_42_unknown_keys(project: Path) -> None:
    refused(project, "bugdet: unknown key; did you mean 'budget'?", bugdet={"evaluations": 3})
    refused(project, "budget.evaluation: unknown key; did you mean 'evaluations'?", budget={"evaluation": 3})


@pytest.mark.parametrize("value", [True, 1.5, -3, 0, "ten", [10], None, float("nan"), float("inf")])
def test_43_wrong_types_and_invalid_numbers(project: Path, value: object) -> None:
    refused(project, "budget", base=SYNTHETIC, budget={"evaluations": value})


def test_43_numbers_written_as_text_are_accepted() -> None:
    """YAML 1.1 reads 1e3 as text, so text that holds a number must count as one; other text is refused."""
    config = parse_config({**SYNTHETIC, "budget": {"hours": "1e-3"}}, folder=Path("/"))
    assert config.budget.hours == 0.001


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (1.0, 1.0)])
def test_44_reversed_or_empty_bounds(project: Path, low: float, high: float) -> None:
    space = {"method": "ties", "parameters": {"weight": {"low": low, "high": high}}, "fixed": {"density": 0.5}}
    refused(project, "must be finite with low < high", space=space)


def test_45_unknown_names(project: Path) -> None:
    refused(project, "did you mean 'ties'?", method="tise")
    refused(project, "did you mean 'nsga2'?", strategy="nsga22")
    refused(project, "no such task file", tasks=["toi.yaml"])


def test_45_task_files_that_run_code_are_refused_with_the_configuration(project: Path) -> None:
    task = yaml.safe_load((project / "toy.yaml").read_text())
    (project / "code.yaml").write_text(yaml.safe_dump(task) + "process_results: !function score.py.f\n")
    (project / "class.yaml").write_text(yaml.safe_dump(task | {"class": "score.Task"}))
    (project / "group.yaml").write_text(yaml.safe_dump({"group": "g", "task": ["toy2"]}))
    (project / "toy2.yaml").write_text(yaml.safe_dump(task | {"task": "toy2", "unsafe_code": True}))
    refused(project, "runs Python code; set evaluation.trust_task_code: true", tasks=["code.yaml"])
    refused(project, "class: runs code; set evaluation.trust_task_code: true", tasks=["class.yaml"])
    refused(project, "unsafe_code: runs code; set evaluation.trust_task_code: true", tasks=["group.yaml"])
    refused(
        project,
        "'humaneval' runs code that the model writes; set evaluation.trust_task_code: true",
        tasks=["humaneval"],
    )


def test_45_missing_models(project: Path) -> None:
    def models(path: str) -> dict[str, Any]:
        return {"base": "base", "experts": {"a": "a", "b": path}}

    refused(project, "no such model folder; did you mean 'base'?", models=models("bas"))
    refused(project, "`hf download ORG/NAME` downloads", models=models("meta-llama/Llama-3.1-8B"))
    refused(project, "environment variables are not expanded here", models=models("$HOME/b"))
    refused(project, "no such model folder: it is a file", models=models("toy.yaml"))


def test_45_a_model_given_as_two_experts(project: Path) -> None:
    models = {"base": "base", "experts": {"a": "a", "b": "b", "c": "a"}}
    refused(
        project,
        f"models.experts.c: {project / 'a'} is also models.experts.a; remove one of them",
        models=models,
    )


def test_45_a_base_without_a_tokenizer(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project / "base", tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    refused(
        project,
        "base: has no tokenizer (tokenizer.json, ...)",
        models={"base": str(tmp_path / "base"), "experts": {"a": "a"}},
    )


def test_46_an_objective_that_no_task_produces(project: Path) -> None:
    refused(project, "no task produces 'toi'; known: toy", objectives=["toi"])
    refused(project, "objectives: 'toy' appears twice", objectives=["toy", "cost.layers", "toy"])


def test_46_a_score_for_which_lower_is_better(project: Path) -> None:
    """Nobody wants to search for the worst model."""
    task = yaml.safe_load((project / "toy.yaml").read_text())
    task["metric_list"][0]["higher_is_better"] = False
    (project / "errors.yaml").write_text(yaml.safe_dump(task | {"task": "errors"}))
    refused(project, "this one as {name: errors, direction: minimize}", tasks=["toy.yaml", "errors.yaml"])
    refused(project, "lower is better", tasks=["errors.yaml"], objectives=["errors", "cost.layers"])
    models = {"base": "base", "experts": {"a": "a", "b": "b"}}
    for direction in ("minimize", "maximize"):
        goals = [{"name": "errors", "direction": direction}]
        settings = {"models": models, "tasks": ["errors.yaml"], "objectives": goals, "budget": {"evaluations": 20}}
        (goal,) = make_problem(parse_config(settings, folder=project)).objectives
        assert goal.direction == direction


@pytest.mark.parametrize("name", ["nsga2", "cma_es"])
def test_47_a_population_larger_than_the_budget(project: Path, name: str) -> None:
    strategy = {"name": name, "population_size": 11}
    function = {"kind": "synthetic", "function": "zdt1"}
    message = "strategy.population_size: 11 is more than budget.evaluations, 10"
    refused(project, message, base=SYNTHETIC, strategy=strategy, evaluation=function)


def test_48_no_parameters_and_100000_parameters(project: Path) -> None:
    refused(project, "no parameters", space={"method": "ties", "fixed": {"weight": 1.0, "density": 0.5}})
    huge = {"kind": "synthetic", "dimension": 100_000}
    refused(project, "has 100000 parameters; the limit is 20000", base=SYNTHETIC, evaluation=huge)


class ScriptedEngine:
    """An engine that handles requests as the test specifies."""

    max_length = 64

    def __init__(self, generate: Callable[[Sequence[GenerateRequest]], list[Generation]]) -> None:
        self._generate = generate

    def update(self, write: object) -> None:
        """The weights do not matter here."""

    def loglikelihood(self, requests: Sequence[LogLikelihoodRequest]) -> list[LogLikelihood]:
        raise EngineError("not asked for")

    def generate(self, requests: Sequence[GenerateRequest]) -> list[Generation]:
        return self._generate(requests)

    def close(self) -> None:
        """There is nothing to release."""


def evaluate(
    project: Path, generate: Callable[[Sequence[GenerateRequest]], list[Generation]], model: str = "base"
) -> Any:
    return make_evaluator(project, generate, model).evaluate(EvaluationRequest("c1", Split.SEARCH, {}))


def make_evaluator(
    project: Path, generate: Callable[[Sequence[GenerateRequest]], list[Generation]], model: str = "base"
) -> LmEvalEvaluator:
    engine: Any = ScriptedEngine(generate)
    tasks = TaskSet([TaskSpec(str(project / "toy.yaml"))], project / model)
    evaluator = LmEvalEvaluator(engine, None, {}, tasks)  # type: ignore[arg-type]
    evaluator._load = lambda request, clock: None  # type: ignore[method-assign]  (no weights are loaded: only answers matter here)
    return evaluator


def test_49_a_chat_template_that_tries_to_escape(project: Path, tmp_path: Path) -> None:
    """Prompts come from the task alone, so a model's chat template is never rendered."""
    shutil.copytree(project / "base", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    escape = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('"
        + str(tmp_path / "made")
        + "') }}"
    )
    path.write_text(json.dumps({**content, "chat_template": escape}))
    texts = []

    def generate(requests: Sequence[GenerateRequest]) -> list[Generation]:
        texts.extend(requests)
        return [Generation("x", 1)] * len(requests)

    evaluation = evaluate(project, generate, str(tmp_path / "model"))
    assert (evaluation.status, evaluation.scores) == (Status.OK, {"toy": 1.0})
    assert [len(request.prompt) for request in texts] == [len("item 0")] * 4
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", "a\nb", "a\x00b", "", " ", ".hidden", "a\u202eb"])
def test_50_invalid_run_names(project: Path, name: str) -> None:
    refused(project, "must be printable, without path separators", base=SYNTHETIC, name=name)


def test_51_recipes_of_other_versions() -> None:
    recipe = Recipe("slerp", (Slice((Source("/a"),)),), "/b", {"t": (Setting(0.5),)}).to_json()
    oldest = {key: value for key, value in recipe.items() if key != "version"}
    assert Recipe.from_json(oldest) == Recipe.from_json(recipe), (
        "a recipe without a version should be read as the oldest"
    )
    for version in (0, 2, "1", None):
        with pytest.raises(RecipeError, match="version"):
            Recipe.from_json({**recipe, "version": version})


@pytest.mark.parametrize("option", ["modules", "chat_template", "tokenizer_source", "tokenizer"])
def test_52_unsupported_mergekit_options_are_named(option: str) -> None:
    document = {"models": [{"model": "a", "parameters": {"weight": 1.0}}], "merge_method": "linear", option: {"x": 1}}
    with pytest.raises(RecipeError, match=option):
        check_recipe(recipe_from_mergekit(document, "file.yml"))


def test_55_no_space_in_shared_memory(tmp_path: Path) -> None:
    """Ray's object store does without it, and nothing of ours needs it."""
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*isolated, "true"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no namespaces here, so /dev/shm cannot be made small")
    config = {**SYNTHETIC, "strategy": "random", "cluster": {"workers": 1}, "finals": {"finalists": 0}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(config))
    script = 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"'
    main = [sys.executable, "-c", "from evomerge.cli import main; main()"]
    result = subprocess.run(
        [*isolated, "sh", "-c", script, "sh", *main, "search", str(tmp_path / "search.yaml"), "--run-dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum(record["event"] == "evaluated" for record in read_journal(tmp_path / "run" / "journal.jsonl")) == 10


def _raise(error: Exception) -> Callable[[Sequence[GenerateRequest]], list[Generation]]:
    def generate(requests: Sequence[GenerateRequest]) -> list[Generation]:
        raise error

    return generate


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("CUDA out of memory"), EngineError("NaN log-probability")]
)
def test_59_a_failing_engine_fails_the_candidate(project: Path, error: Exception) -> None:
    """Covers out of memory and NaN; engines that hang are tested in tests/cluster, NaN weights in real engines in tests/engine."""
    evaluation = evaluate(project, _raise(error))
    assert evaluation.status is Status.FAILED
    assert str(error) in evaluation.error


def test_59_an_engine_that_stays_broken_is_returned_to_the_pool(project: Path) -> None:
    """If a GPU or a process of the engine is gone, each candidate would fail within a millisecond. Faults of a candidate itself do not count."""
    answers: list[Exception | None] = []

    def generate(requests: Sequence[GenerateRequest]) -> list[Generation]:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        return [Generation("", 0)] * len(requests)

    evaluator = make_evaluator(project, generate)
    gone = EngineError("a batch failed")
    gone.__cause__ = RuntimeError("Executor failed.")
    request = EvaluationRequest("c1", Split.SEARCH, {})
    own = [EngineError("NaN log-probability")] * 5
    answers += [gone, gone, None, RuntimeError("CUDA error"), *own, gone]
    statuses = [evaluator.evaluate(request).status for _ in range(len(answers))]
    assert statuses == [Status.FAILED, Status.FAILED, Status.OK] + [Status.FAILED] * 7
    answers += [*own[:1], gone]
    assert evaluator.evaluate(request).status is Status.FAILED
    with pytest.raises(EngineError, match="a batch failed"):
        evaluator.evaluate(request)


def test_59_empty_text_is_a_wrong_answer(project: Path) -> None:
    evaluation = evaluate(project, lambda requests: [Generation("", 0)] * len(requests))
    assert (evaluation.status, evaluation.scores) == (Status.OK, {"toy": 0.0})
    assert np.array_equal(evaluation.item_scores["toy"], np.zeros(4, np.float32))


def test_60_a_scorer_that_raises_on_one_item(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    usual = ConfigurableTask.process_results

    def process_results(self: Any, document: Any, results: Any) -> Any:
        if document["q"] == "item 2":
            raise ZeroDivisionError("no gold")
        return usual(self, document, results)

    monkeypatch.setattr(ConfigurableTask, "process_results", process_results)
    evaluation = evaluate(project, lambda requests: [Generation("x", 1)] * len(requests))
    assert evaluation.status is Status.FAILED
    assert "item 2: the scorer fails: ZeroDivisionError('no gold')" in evaluation.error


def test_62_records_of_a_newer_version(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(event("run", version=1, objectives=[]), event("teleported", id="c1"))
    journal.close()
    with pytest.raises(JournalError, match="unknown event 'teleported'; the journal is from a newer evomerge"):
        RunState.of(read_journal(tmp_path / "journal.jsonl"))
