"""Scores must equal lm-eval's own on the same model, to the last bit."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from evomerge.core import EvaluationRequest, Split, Status
from evomerge.engine import make_engine
from evomerge.evaluation import LmEvalEvaluator, TaskSet, TaskSpec
from evomerge.plan import read_model_header
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.engines import cannot_start
from evomerge.weights import Merger, WeightPool, merge_to_folder


def half_way(models):
    weight = {"weight": (Setting(0.5),)}
    return Recipe(
        method="linear",
        slices=(Slice(tuple(Source(str(model), parameters=weight) for model in models)),),
        out_dtype="float32",
    )


WINDOW = 33
"""shorter than most of the texts"""

NO_MEANS = {
    "correlated": ("choices", "mcc"), "perplexity": ("likely", "perplexity"),
    "chrf": ("write", "chrf,whole"), "ter": ("write", "ter,first-letter"),
    "words": ("texts", "word_perplexity"), "bytes": ("texts", "byte_perplexity"), "bits": ("texts", "bits_per_byte"),
}  # fmt: skip
"""name of a score -> (task, metric), of those that lm-eval aggregates otherwise than by a mean"""


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def evaluator(request, models, task_folder):
    if cannot_start(request.param):
        pytest.skip(cannot_start(request.param))
    headers = {str(model): read_model_header(model) for model in models}
    engine = make_engine(request.param, models[0], dtype="float32")
    specs = [
        TaskSpec(str(task_folder / "choices.yaml")),
        TaskSpec(str(task_folder / "choices.yaml"), metric="acc_norm", name="normed", limit=17),
        TaskSpec(str(task_folder / "likely.yaml"), metric="acc"),
        TaskSpec(str(task_folder / "write.yaml"), metric="exact_match,first-letter"),
        *(
            TaskSpec(str(task_folder / f"{task}.yaml"), metric=metric, name=name, window=WINDOW)
            for name, (task, metric) in NO_MEANS.items()
        ),
    ]
    evaluator = LmEvalEvaluator(engine, Merger(WeightPool(headers)), headers, TaskSet(specs, models[0]))
    yield evaluator
    evaluator.close()


@pytest.fixture(scope="module")
def lm_eval_scores(models, task_folder, tmp_path_factory):
    """The scores of lm-eval's own Hugging Face model on the merged checkpoint, per task file."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    merged = tmp_path_factory.mktemp("merged") / "model"
    merge_to_folder(half_way(models), merged)
    model = HFLM(pretrained=str(merged), dtype="float32", device="cpu", batch_size=8, max_length=512)
    in_windows = HFLM(pretrained=str(merged), dtype="float32", device="cpu", batch_size=8, max_length=WINDOW - 1)
    here = TaskManager(include_path=str(task_folder), include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(task_folder)  # lm-eval reads data files relative to the working directory
        found = {
            limit: simple_evaluate(
                model,
                tasks=["choices", "likely", "write"],
                task_manager=here,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
            for limit in (None, 17)
        }
        texts = simple_evaluate(in_windows, tasks=["texts"], task_manager=here, bootstrap_iters=0)
    found[None]["results"] |= texts["results"]
    return found


def test_scores_equal_lm_evals(evaluator, lm_eval_scores, models):
    recipe = half_way(models).to_json()
    result = evaluator.evaluate(EvaluationRequest("c1", Split.SEARCH, recipe=recipe))
    assert result.status is Status.OK, result.error
    whole, limited = lm_eval_scores[None]["results"], lm_eval_scores[17]["results"]
    assert {name: score for name, score in result.scores.items() if name not in NO_MEANS} == {
        "choices": whole["choices"]["acc,none"],
        "normed": limited["choices"]["acc_norm,none"],
        "likely": whole["likely"]["acc,none"],
        "write": whole["write"]["exact_match,first-letter"],
    }
    for name, (task, metric) in NO_MEANS.items():
        theirs = whole[task][metric if "," in metric else f"{metric},none"]
        assert result.scores[name] == pytest.approx(theirs, rel=1e-5), name  # sums of float32 logarithms
        assert result.scores[name] != 0, name
        assert result.item_scores[name].mean() == pytest.approx(theirs, rel=1e-5), name
    # The comparison is meaningful: at least three scores are not trivial.
    assert sum(0 < score < 1 for score in result.scores.values()) >= 3
    samples = lm_eval_scores[None]["samples"]
    assert result.item_scores["choices"].tolist() == [sample["acc"] for sample in samples["choices"]]
    filtered = [sample for sample in samples["write"] if sample["filter"] == "first-letter"]
    assert result.item_scores["write"].tolist() == [sample["exact_match"] for sample in filtered]


def test_evaluation_record_is_complete(evaluator, models):
    recipe = half_way(models).to_json()
    result = evaluator.evaluate(EvaluationRequest("c1", Split.SELECT, recipe=recipe))
    assert result.candidate_id == "c1"
    assert result.split is Split.SELECT
    assert list(result.scores) == ["choices", "normed", "likely", "write", *NO_MEANS] == list(evaluator.task_names)
    for name, scores in result.item_scores.items():
        assert scores.dtype == np.float32
        assert result.scores[name] == pytest.approx(scores.mean())
        assert result.stderr[name] == pytest.approx(scores.std(ddof=1) / np.sqrt(len(scores)), rel=1e-5, abs=1e-7)
    assert result.cost["items"] == 30 + 17 + 30 + 30 + 30 * len(NO_MEANS)
    assert 3 * 30 <= result.cost["generated_tokens"] <= 3 * 30 * 12
    assert result.cost["layers"] == 2
    assert result.cost["tokens_per_second"] > 0
    assert set(result.cost) == {
        "layers",
        "active_parameters",
        "tokens_per_second",
        *("items", "prompt_tokens", "generated_tokens"),
        *("plan_s", "merge_s", "request_s", "engine_s", "score_s", "total_s"),
    }
    again = evaluator.evaluate(EvaluationRequest("c2", Split.SELECT, recipe=recipe))
    assert again.scores == result.scores
    assert again.cost["merge_s"] == 0


def test_splits_have_different_items(evaluator, models):
    recipe = half_way(models).to_json()
    items = [evaluator.evaluate(EvaluationRequest("c", split, recipe=recipe)).item_scores["choices"] for split in Split]
    assert not np.array_equal(items[0], items[1])
    assert not np.array_equal(items[1], items[2])


def test_failure_is_recorded_and_does_not_affect_the_next_candidate(evaluator, models):
    good = half_way(models).to_json()
    before = evaluator.evaluate(EvaluationRequest("good", Split.SEARCH, recipe=good))
    nonsense = evaluator.evaluate(EvaluationRequest("bad", Split.SEARCH, recipe={"method": "linear"}, attempt=1))
    assert (nonsense.status, nonsense.candidate_id) == (Status.FAILED, "bad")
    assert nonsense.error
    huge = {"weight": (Setting(1e38),), "normalize": (Setting(False),)}
    overflow = Recipe("linear", (Slice(tuple(Source(str(m), parameters=huge) for m in models)),), out_dtype="float32")
    failed = evaluator.evaluate(EvaluationRequest("huge", Split.SEARCH, recipe=overflow.to_json()))
    assert failed.status is Status.FAILED
    assert failed.error
    assert not failed.scores
    assert evaluator.evaluate(EvaluationRequest("none", Split.SEARCH)).status is Status.FAILED
    after = evaluator.evaluate(EvaluationRequest("good", Split.SEARCH, recipe=good))
    assert after.scores == before.scores
    assert after.cost["merge_s"] > 0


def test_encoding_equals_lm_evals(models):
    from lm_eval.models.huggingface import HFLM

    from evomerge.evaluation.encoding import Encoder

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    theirs = HFLM(pretrained=str(models[0]), dtype="float32", device="cpu", max_length=512)
    ours = Encoder(tokenizer)
    for context, continuation in [("ab c", " d"), ("ab  ", "d"), ("x\n", "y"), (" ", "z"), ("<eos>q ", "r")]:
        before, after = theirs._encode_pair(context, continuation)
        assert ours.pair(context, continuation) == (tuple(before), tuple(after))
    assert ours.pair("", "ab") == ((tokenizer.eos_token_id,), tuple(tokenizer.encode("ab")))
