"""Prompts with solved examples, chat templates and system instructions equal those of lm-eval."""

import json
import logging

import pytest
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from evomerge.core import EvaluationError, EvaluationRequest, Split, Status
from evomerge.engine import make_engine
from evomerge.evaluation import LmEvalEvaluator, PromptFormat, TaskSet, TaskSpec, load_task
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.task_items import _generate_request
from evomerge.plan import read_model_header
from evomerge.recipe import Recipe, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool

TEMPLATE = (
    "{% for message in messages %}({{ message['role'] }}){{ message['content'] }}{% if not loop.last or add_generation_prompt %}"
    "(end){% endif %}{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
TASKS = ("choices", "likely", "write")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    folder = write_tiny_llama(
        tmp_path_factory.mktemp("chat") / "model", seed=0, hidden=128, vocab=99, dtype="float32", init_std=0.3
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def described_task(task_folder, tmp_path):
    """A task with a description, which becomes a system message."""
    rows = {split: (task_folder / f"{split}.jsonl").read_text() for split in ("search", "report")}
    for split, text in rows.items():
        (tmp_path / f"{split}.jsonl").write_text(text)
    path = tmp_path / "described.yaml"
    path.write_text(
        (task_folder / "choices.yaml").read_text().replace("    select: select.jsonl\n", "") + "description: D\n"
    )
    return str(path)


@pytest.mark.parametrize(
    ("num_fewshot", "prompt"),
    [
        (2, PromptFormat()),
        (0, PromptFormat(apply_chat_template=True)),
        (2, PromptFormat(apply_chat_template=True, system_instruction="Be brief.")),
        (2, PromptFormat(apply_chat_template=True, fewshot_as_multiturn=False)),
    ],
)
def test_scores_equal_lm_evals(chat_model, task_folder, num_fewshot, prompt):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    headers = {str(chat_model): read_model_header(chat_model)}
    specs = [TaskSpec(str(task_folder / f"{name}.yaml"), num_fewshot=num_fewshot, prompt=prompt) for name in TASKS]
    tasks = TaskSet(specs, chat_model)
    evaluator = LmEvalEvaluator(
        make_engine("transformers", chat_model, dtype="float32"),
        Merger(WeightPool(headers)),
        headers,
        tasks,
    )
    alone = Recipe("passthrough", (Slice((Source(str(chat_model)),)),), out_dtype="float32")
    result = evaluator.evaluate(EvaluationRequest("c", Split.SEARCH, recipe=alone.to_json()))
    evaluator.close()
    assert result.status is Status.OK, result.error

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(task_folder)
        theirs = simple_evaluate(
            HFLM(pretrained=str(chat_model), dtype="float32", device="cpu", batch_size=8, max_length=512),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
            num_fewshot=num_fewshot,
            apply_chat_template=prompt.apply_chat_template,
            system_instruction=prompt.system_instruction,
            fewshot_as_multiturn=prompt.apply_chat_template and prompt.fewshot_as_multiturn,
            bootstrap_iters=0,
            log_samples=True,
        )
    items, tokenizer = tasks.items(Split.SEARCH), AutoTokenizer.from_pretrained(chat_model)
    asked = [sample["arguments"][0][0] for sample in theirs["samples"]["write"] if sample["filter"] == "whole"]
    assert [tokenizer.decode(request.prompt) for request in items["write"].generations] == asked
    asked = ["".join(pair) for sample in theirs["samples"]["choices"] for pair in sample["arguments"]]
    assert [tokenizer.decode(one.context + one.continuation) for one in items["choices"].likelihoods] == asked
    theirs = theirs["results"]
    assert result.scores == {
        "choices": theirs["choices"]["acc,none"],
        "likely": theirs["likely"]["acc,none"],
        "write": theirs["write"]["exact_match,whole"],
    }
    assert 0 < result.scores["choices"] < 1


def test_conversation_follows_the_chat_template(chat_model, task_folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    prompt = PromptFormat(apply_chat_template=True, system_instruction="Be brief.")
    spec = TaskSpec(str(task_folder / "write.yaml"), num_fewshot=1, prompt=prompt)
    text = tokenizer.decode(load_task(spec, tokenizer).items(Split.SEARCH).generations[0].prompt)
    rows = [json.loads(line) for line in (task_folder / "search.jsonl").read_text().splitlines()]
    example = next(row for row in rows[1:] if f"(user)Say {row['question']}:(end)(assistant)" in text)
    assert text == (
        f"(system)Be brief.(end)(user)Say {example['question']}:(end)(assistant){example['letter']}(end)"
        f"(user)Say {rows[0]['question']}:(end)(assistant)"
    )


def test_description_is_dropped_if_the_template_rejects_system_messages(chat_model, described_task, caplog):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = NO_SYSTEM
    spec = TaskSpec(described_task, prompt=PromptFormat(apply_chat_template=True))
    with caplog.at_level(logging.WARNING):
        requests = load_task(spec, tokenizer).items(Split.SEARCH).likelihoods
    assert tokenizer.decode(requests[0].context).startswith("(user)Q: ")
    assert [record.message for record in caplog.records if "rejects system messages" in record.message] != []

    asked_for = TaskSpec(described_task, prompt=PromptFormat(apply_chat_template=True, system_instruction="Be brief."))
    with pytest.raises(EvaluationError, match="no system here"):
        load_task(asked_for, tokenizer)


def test_tokenizer_without_chat_template_is_refused(models, task_folder):
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    spec = TaskSpec(str(task_folder / "write.yaml"), prompt=PromptFormat(apply_chat_template=True))
    with pytest.raises(EvaluationError, match="chat template"):
        load_task(spec, tokenizer)


def test_negative_number_of_examples_is_refused():
    with pytest.raises(EvaluationError, match="num_fewshot must be at least 0"):
        TaskSpec("t.yaml", num_fewshot=-1)


def test_generation_prompt_keeps_its_own_end_of_text_token(tmp_path):
    """If the tokenizer has no beginning-of-text token and puts the end-of-text token there, as in `HFLM.tok_batch_encode`."""
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_llama(tmp_path, seed=0))
    ends = tokenizer.eos_token_id
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", ends)])
    encoder = Encoder(tokenizer)
    letter = tokenizer.convert_tokens_to_ids("a")
    asked = Instance("generate_until", {}, ("<eos>a", {"until": ["."], "max_gen_toks": 4}), 0)
    assert _generate_request("t", asked, encoder).prompt == (ends, ends, letter)
    assert encoder.prompt("<eos>a") == (ends, letter)
    tokenizer.bos_token = tokenizer.eos_token
    assert Encoder(tokenizer).generation_prompt("<eos>a") == (ends, letter)
