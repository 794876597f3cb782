"""The transformers engine compared with the plainest possible use of transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.core import EngineError
from evomerge.engine import GenerateRequest, LogLikelihoodRequest
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
def test_log_likelihoods_equal_those_computed_one_by_one(model, plain, batch_tokens, monkeypatch):
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
def test_generations_equal_those_computed_one_by_one(model, plain, batch_tokens, monkeypatch):
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


def test_token_that_ends_a_text_is_not_part_of_it(model, tmp_path):
    """Even if the tokenizer does not mark it as special, as in many chat models (<|im_end|>)."""
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


def test_first_of_several_stop_strings_that_end_together_counts(model):
    engine = TransformersEngine(model)
    (text,) = [answer.text for answer in engine.generate([GenerateRequest(prompts()[0], 12)])]
    stops = [text[4:6], text[3:6]]
    assert text.count(stops[0]) == 1
    requests = [GenerateRequest(prompts()[0], 12, tuple(stop)) for stop in (stops, stops[::-1], [*stops, text[1:3]])]
    assert [answer.text for answer in engine.generate(requests)] == [text[:4], text[:3], text[:1]]


def test_prompt_with_nan_logits_fails_without_affecting_others(tmp_path):
    folder = write_tiny_llama(tmp_path, seed=0, tied=False, dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(folder)
    assert len(engine.generate([GenerateRequest((5, 6), 1), GenerateRequest((5, 8), 1)])) == 2
    with pytest.raises(EngineError, match="NaN logits while generating for 2 prompts"):
        engine.generate([GenerateRequest((5, 6), 1), GenerateRequest((5, 7), 1)])


def test_checkpoint_must_match_the_architecture(model, tmp_path):
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
    # A tied model that also stores its output layer: one storage, one name.
    save(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    names = []
    TransformersEngine(tmp_path).update(lambda target: names.extend(target.names()))
    assert set(names) == set(tensors)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(EngineError, match="cannot load"):
        TransformersEngine(tmp_path)


def test_maximum_length_is_checked(model):
    assert TransformersEngine(model).max_length == 512
    with pytest.raises(EngineError, match="max_model_len 513 exceeds"):
        TransformersEngine(model, max_model_len=513)
