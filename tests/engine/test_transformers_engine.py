"""The transformers engine against the plainest possible use of transformers."""

import json
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evomerge.core import EngineError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest
from evomerge.engine.greedy import Decoder
from evomerge.engine.stop_tokens import StopTokens
from evomerge.engine.transformers_engine import TransformersEngine
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(
        tmp_path_factory.mktemp("models") / "m", seed=5, tied=True, hidden=64, vocab=99, dtype="float32", init_std=0.3
    )


@pytest.fixture(scope="module")
def plain(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def prompts():
    stream = torch.Generator().manual_seed(0)
    return [
        tuple(torch.randint(3, 99, (int(n),), generator=stream).tolist())
        for n in torch.randint(1, 60, (25,), generator=stream)
    ]


@pytest.mark.parametrize("batch_tokens", [1, 150, 5000])
def test_log_likelihoods_one_by_one(model, plain, batch_tokens, monkeypatch):
    monkeypatch.setattr(
        "evomerge.engine.transformers_engine.BATCH_TOKENS", dict.fromkeys(("cpu", "cuda"), batch_tokens)
    )
    engine = TransformersEngine(model)
    requests = [LogLikelihoodRequest(prompt, prompts()[-1 - i][:7]) for i, prompt in enumerate(prompts())]
    for request, answer in zip(requests, engine.loglikelihood(requests), strict=True):
        tokens = torch.tensor([request.context + request.continuation])
        with torch.no_grad():
            logits = plain(tokens).logits[0, len(request.context) - 1 : -1].double()
        target = tokens[0, len(request.context) :]
        expected = logits.log_softmax(-1).gather(1, target[:, None]).sum().item()
        assert answer.log_probability == pytest.approx(expected, abs=1e-4)
        assert answer.is_greedy == bool((logits.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_tokens", [1, 150, 5000])
def test_generations_one_by_one(model, plain, batch_tokens, monkeypatch):
    monkeypatch.setattr(
        "evomerge.engine.transformers_engine.BATCH_TOKENS", dict.fromkeys(("cpu", "cuda"), batch_tokens)
    )
    engine = TransformersEngine(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ended = 0
    for prompt, answer in zip(prompts(), engine.generate([GenerateRequest(p, 12) for p in prompts()]), strict=True):
        tokens = plain.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.n_tokens == len(tokens)
        ended += len(tokens) < 12
    assert ended


def test_the_token_that_ends_a_text_is_not_in_it(model, tmp_path):
    """Also where the tokenizer does not call it special, as with many models tuned to chat (<|im_end|>)."""
    requests = [GenerateRequest(prompt, 12) for prompt in prompts()]
    before = TransformersEngine(model).generate(requests)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(model / name)
    letter = before[0].text[2]
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(letter)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    after = TransformersEngine(tmp_path).generate(requests)
    assert [answer.text for answer in after] == [answer.text.partition(letter)[0] for answer in before]
    assert after[0].n_tokens == before[0].text.index(letter) + 1


def test_of_stop_strings_that_end_together_the_first_counts(model):
    engine = TransformersEngine(model)
    (text,) = [answer.text for answer in engine.generate([GenerateRequest(prompts()[0], 12)])]
    stops = [text[4:6], text[3:6]]
    assert text.count(stops[0]) == 1
    requests = [GenerateRequest(prompts()[0], 12, tuple(stop)) for stop in (stops, stops[::-1], [*stops, text[1:3]])]
    assert [answer.text for answer in engine.generate(requests)] == [text[:4], text[:3], text[:1]]


def test_one_prompt_without_numbers_fails_beside_others(tmp_path):
    folder = write_tiny_llama(tmp_path, seed=0, tied=False, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(folder)
    assert len(engine.generate([GenerateRequest((5, 6), 1), GenerateRequest((5, 8), 1)])) == 2
    with pytest.raises(EngineError, match="NaN logits while generating for 2 prompts"):
        engine.generate([GenerateRequest((5, 6), 1), GenerateRequest((5, 7), 1)])


def test_text_keeps_a_leading_space_and_drops_half_characters():
    class Metaspace:
        """Drops the space at the start of a text, as sentencepiece tokenizers do; byte tokens may end half-way."""

        added_tokens_decoder: ClassVar = {}

        def decode(self, tokens, skip_special_tokens):
            pieces = {1: "▁a", 2: "▁b", 3: "\ufffd"}
            return "".join(pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")

    text_of = Decoder(Metaspace(), frozenset(), StopTokens(Metaspace(), 4)).after([1])
    assert text_of([2]) == " b"
    assert text_of([2, 3]) == " b"


def test_a_character_that_began_in_the_prompt_stays_unfinished():
    """What is unfinished inside an answer stays in it."""
    alphabet = sorted(ByteLevel.alphabet())
    model = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    space, *rest = tokenizer.encode(" é")
    text_of = Decoder(tokenizer, frozenset(), StopTokens(tokenizer, 256)).after([space, rest[0]])
    letters = tokenizer.encode("ab")
    assert text_of([*rest[1:], *letters]) == "\ufffdab"
    assert text_of([letters[0], rest[0], letters[1], rest[0]]) == "a\ufffdb"


def test_only_special_tokens_of_the_model_stop_a_text(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|plain|>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    one, two = tokenizer.convert_tokens_to_ids(["<|one|>", "<|two|>"])
    assert StopTokens(tokenizer, two + 1).of(("|>",)) == [one, two]
    assert StopTokens(tokenizer, two).of(("|>",)) == [one]


def test_tokenizers_without_added_tokens_stop_nothing():
    assert StopTokens(object(), 4).of(("a",)) == []


def test_checkpoint_and_architecture_must_fit(model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())

    def save(changed):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    save(tensors | {"extra.weight": torch.zeros(3)})
    with pytest.raises(EngineError, match=r"unexpected_keys.*extra\.weight"):
        TransformersEngine(tmp_path)
    save({name: value for name, value in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(EngineError, match=r"missing_keys.*model\.norm\.weight"):
        TransformersEngine(tmp_path)
    # A tied model that stores its output layer too: one storage, one name.
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    names = []
    TransformersEngine(tmp_path).update(lambda target: names.extend(target.names()))
    assert set(names) == set(tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(EngineError, match="cannot load"):
        TransformersEngine(tmp_path)


def test_lengths(model):
    assert TransformersEngine(model).max_length == 512
    with pytest.raises(EngineError, match="max_model_len 513 exceeds"):
        TransformersEngine(model, max_model_len=513)
