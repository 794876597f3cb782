"""Both engines cut and decode answers in the same way as lm-eval's Hugging Face backend."""

import json
import string
from typing import ClassVar

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evomerge.engine import make_engine
from evomerge.engine.answers import AnswerDecoder
from evomerge.evaluation.encoding import Encoder
from evomerge.evaluation.task_items import _generate_request
from evomerge.testing.tiny_models import write_tiny_llama

TEXTS = ("alpha", "three", "<|end|>", "beta", "gamma", " DONE")
"""of the first tokens that the model generates; the third is special, the last ends a text and is not"""


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model folder, and a prompt that the model continues with `TEXTS`."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("talker"), seed=0, hidden=128, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    names = {number: token for token, number in content["model"]["vocab"].items()}
    for letter in string.ascii_letters:
        prompt = torch.tensor([tokenizer.encode(f"{letter}: ")])
        said = model.generate(prompt, max_new_tokens=len(TEXTS), do_sample=False)[0, prompt.shape[1] :].tolist()
        if (
            len({*said, *prompt[0].tolist()}) == len(TEXTS) + prompt.shape[1]
            and min(said) > 2
            and names.keys() >= {*said}
        ):
            break
    else:
        pytest.fail("no prompt is followed by different tokens")
    for number, text in zip(said, TEXTS, strict=True):
        content["model"]["vocab"][text] = content["model"]["vocab"].pop(names[number])
    special = dict(content["added_tokens"][0]) | {"id": said[2], "content": TEXTS[2], "special": True}
    content["added_tokens"] = sorted([*content["added_tokens"], special], key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, said[-1]]}))
    return folder, f"{letter}: "


STOPS = (
    [], ["<|end|>beta"], ["ree", "e"], ["e", "ree"], ["", "beta"], ["three<|end|>b"], [">beta"], ["e<|end"], ["<|end|>"], ["threebeta"],
    ["end"], ["ga"], [" DO"], ["beta", "three"],
)  # fmt: skip


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_answers_equal_those_of_lm_eval(talker, kind):
    folder, prompt = talker
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    encoder = Encoder(AutoTokenizer.from_pretrained(folder))
    questions = [Instance("generate_until", {}, (prompt, {"until": stop, "max_gen_toks": 9}), 0) for stop in STOPS]
    wanted = [theirs.generate_until([question], disable_tqdm=True)[0] for question in questions]
    assert wanted[0] == "alphathreebetagamma DONE"
    # as in vLLM's own text, the token that ends a text is left out, special or not
    wanted = [answer.removesuffix(" DONE") for answer in wanted]
    assert wanted[1:3] == ["alphathreebeta", "alphath"]
    engine = make_engine(kind, folder, dtype="float32", max_model_len=64)
    answers = engine.generate([_generate_request("t", question, encoder) for question in questions])
    engine.close()
    assert dict(zip(map(tuple, STOPS), [answer.text for answer in answers], strict=True)) == dict(
        zip(map(tuple, STOPS), wanted, strict=True)
    )


def test_text_keeps_a_leading_space_and_drops_incomplete_characters():
    class Metaspace:
        """Drops the space at the start of a text, as sentencepiece tokenizers do; byte tokens may end within a character."""

        added_tokens_decoder: ClassVar = {}

        def decode(self, tokens, skip_special_tokens):
            pieces = {1: "▁a", 2: "▁b", 3: "\ufffd"}
            return "".join(pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    text_of = AnswerDecoder(Metaspace(), 4).after([1])
    assert text_of([2]) == " b"
    assert text_of([2, 3]) == " b"


def test_character_that_began_in_the_prompt_stays_incomplete():
    """An incomplete character inside an answer is kept."""
    alphabet = sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    space, *rest = tokenizer.encode(" é")
    text_of = AnswerDecoder(tokenizer, 256).after([space, rest[0]])
    letters = tokenizer.encode("ab")
    assert text_of([*rest[1:], *letters]) == "\ufffdab"
    assert text_of([letters[0], rest[0], letters[1], rest[0]]) == "a\ufffdb"


def test_only_special_tokens_of_the_model_stop_a_text(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_tiny_llama(tmp_path, seed=0))
    tokenizer.add_tokens(["<|plain|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    one, two = tokenizer.convert_tokens_to_ids(["<|one|>", "<|two|>"])
    assert AnswerDecoder(tokenizer, two + 1).stop_tokens(("|>",)) == [one, two]
    assert AnswerDecoder(tokenizer, two).stop_tokens(("|>",)) == [one]


def test_tokenizers_without_added_tokens_have_no_stop_tokens():
    assert AnswerDecoder(object(), 4).stop_tokens(("a",)) == []
