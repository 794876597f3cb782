"""`evomerge align`: copies of models over one vocabulary hold every row where the tokenizer expects it, and a search accepts them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from evomerge.build import align_models, make_problem, merge_recipe, parse_config
from evomerge.build.commands.describing import notes
from evomerge.core import ConfigError, RecipeError
from evomerge.testing.tiny_models import DEFAULT_VOCAB, write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write_model(folder: Path, seed: int, *tokens: str, dtype: str = "bfloat16") -> None:
    """A model with its own tokens after the shared ones."""
    n_tokens = _n_known(write_tiny_llama(folder, seed=seed)) + len(tokens)
    write_tiny_llama(folder, seed=seed, tied=False, vocab=n_tokens, dtype=dtype)
    write_tokens(folder, *tokens)


def write_tokens(folder: Path, *tokens: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


def _n_known(folder: Path) -> int:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "base", 0)
    write_model(tmp_path / "a", 1, "<ours>", "<both>")
    write_model(tmp_path / "b", 2, "<theirs>", "<both>", dtype="float32")
    write_toy_task(tmp_path / "toy.yaml", n_items=4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ids(folder: Path | str) -> dict[str, int]:
    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).get_vocab()


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def settings(*experts: str, base: str) -> dict[str, object]:
    return {
        "models": {"base": base, "experts": {Path(expert).name: expert for expert in experts}},
        "method": "task_arithmetic",
        "tasks": ["toy.yaml"],
        "budget": {"evaluations": 4},
    }


def test_copies_hold_the_rows_of_one_vocabulary(folder: Path) -> None:
    with pytest.raises(ConfigError, match="use `evomerge align` to give the models one vocabulary"):
        make_problem(parse_config(settings("a", "b", base="base"), folder=folder))
    aligned = align_models(["a", "b"], "out", base="base")
    new = ids("out/base")
    assert new == ids("out/a") == ids("out/b")
    assert set(new) == set(ids("base")) | {"<ours>", "<both>", "<theirs>"}
    assert (aligned.n_tokens, aligned.n_rows) == (len(new), len(new))
    for name in ("base", "a", "b"):
        old, copy, own = weights(name), weights(f"out/{name}"), ids(name)
        assert {key: tensor.dtype for key, tensor in copy.items()} == {key: tensor.dtype for key, tensor in old.items()}
        for key, tensor in old.items():
            if key not in (EMBEDDING, HEAD):
                assert torch.equal(copy[key], tensor)
                continue
            for token, row in new.items():
                if token in own:
                    assert torch.equal(copy[key][row], tensor[own[token]])
    lent, owner = weights("out/b"), weights("a")
    torch.testing.assert_close(lent[EMBEDDING][new["<ours>"]], owner[EMBEDDING][ids("a")["<ours>"]].float())
    both = [weights(name)[HEAD][ids(name)["<both>"]].float() for name in "ab"]
    assert torch.equal(weights("out/base")[HEAD][new["<both>"]], ((both[0] + both[1]) / 2).bfloat16())
    assert json.loads(Path("out/a/config.json").read_text())["vocab_size"] == len(new)
    problem = make_problem(parse_config(settings("out/a", "out/b", base="out/base"), folder=folder))
    assert set(problem.headers) == {str(folder / "out" / name) for name in ("base", "a", "b")}


def test_the_recipe_of_a_copy_reproduces_it_from_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    align_models(["a", "b"], "out", base="base")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    copy = folder / "out" / "a"
    again = merge_recipe(copy / "recipe.yaml", "again")
    assert (again / "model.safetensors").read_bytes() == (copy / "model.safetensors").read_bytes()


def test_models_that_already_have_the_vocabulary_are_not_copied(folder: Path) -> None:
    write_model(folder / "c", 3)
    aligned = align_models(["one=a", "c"], "out", base="base", tokenizer="base")
    assert aligned.lines() == [
        "base: unchanged",
        "out/one: written",
        "c: unchanged",
        f"{len(ids('base'))} tokens, {len(ids('base'))} embedding rows",
        "next: evomerge init out/one c --base base",
    ]
    assert ids("out/one") == ids("base")
    assert torch.equal(weights("out/one")[EMBEDDING], weights("a")[EMBEDDING][: len(ids("base"))])


def test_tokens_with_different_ids_are_rearranged(folder: Path) -> None:
    content = json.loads(Path("base/tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"], vocabulary["y"] = vocabulary["y"], vocabulary["x"]
    write_model(folder / "moved", 3)
    Path("moved/tokenizer.json").write_text(json.dumps(content))
    problem = make_problem(parse_config(settings("moved", base="base"), folder=folder))
    assert any(
        "has different ids for 2 tokens" in note and "`evomerge align` gives the models one vocabulary" in note
        for note in notes(problem)
    )
    align_models(["moved"], "out", base="base")
    old, new = weights("moved")[EMBEDDING], weights("out/moved")[EMBEDDING]
    assert torch.equal(new[ids("base")["x"]], old[ids("base")["y"]])
    assert not Path("out/base").exists()


def test_without_a_base_the_first_model_determines_the_order(folder: Path) -> None:
    aligned = align_models(["b", "a"], "out", pad_to_multiple_of=64)
    assert ids("out/a") == ids("out/b")
    assert ids("out/a") == ids("b") | {"<ours>": len(ids("b"))}
    assert aligned.n_rows == weights("out/a")[EMBEDDING].shape[0] == 128
    assert aligned.lines()[-1] == "next: evomerge init out/b out/a"
    align_models(["b", "a"], "as-a", tokenizer="a")
    assert [path.name for path in Path("as-a").iterdir()] == ["b"]
    assert ids("as-a/b") == ids("a")


def test_padding_rows_are_kept(folder: Path) -> None:
    """So that models which have them already are not copied; but an expert's tokens do not count as padding of the base."""
    for name, seed in (("base", 0), ("a", 1)):
        write_tiny_llama(folder / "padded" / name, seed=seed, tied=False)
    n_tokens = len(ids("padded/base"))
    aligned = align_models(["padded/a", "b"], "out", base="padded/base", tokenizer="base")
    assert (aligned.n_tokens, aligned.n_rows) == (n_tokens, DEFAULT_VOCAB)
    assert [copy.model for copy in aligned.copied] == ["out/b"]
    write_tokens(folder / "padded" / "a", "<ours>")
    aligned = align_models(["padded/a"], "union", base="padded/base")
    assert (aligned.n_tokens, aligned.n_rows) == (n_tokens + 1, DEFAULT_VOCAB)
    assert [copy.model for copy in aligned.copied] == ["union/base"]
    assert torch.equal(weights("union/base")[EMBEDDING][n_tokens], weights("padded/a")[EMBEDDING][n_tokens])


def test_weights_of_mixed_dtypes_keep_their_values(folder: Path) -> None:
    mixed = weights("b") | {"model.norm.weight": weights("a")["model.norm.weight"]}
    save_file(mixed, "b/model.safetensors")
    align_models(["a", "b"], "out", base="base")
    assert torch.equal(weights("out/b")["model.norm.weight"], mixed["model.norm.weight"].float())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(weights("out/b")[name], mixed[name])


def test_a_path_through_a_link_is_followed(folder: Path) -> None:
    (folder / "far" / "sub").mkdir(parents=True)
    (folder / "far" / "a").symlink_to(folder / "b")
    (folder / "link").symlink_to(folder / "far" / "sub")
    align_models(["x=link/../a"], "out", base="base", tokenizer="base")
    assert torch.equal(weights("out/x")["model.norm.weight"], weights("b")["model.norm.weight"])


def test_an_invalid_chat_template_is_reported_before_anything_is_written(folder: Path) -> None:
    Path("b/chat_template.jinja").write_text("{% if x %}")
    with pytest.raises(RecipeError, match=f"{folder}/b: chat_template, line 1: "):
        align_models(["a", "b"], "out", base="base")
    assert not Path("out").exists()


def test_an_invalid_size_is_reported_even_if_nothing_is_copied(folder: Path) -> None:
    write_model(folder / "c", 3)
    with pytest.raises(ConfigError, match="max memory 'lots': expected a size"):
        align_models(["c"], "out", base="base", max_memory="lots")


def test_copies_must_not_overlap_the_source_models(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"^a: overlaps the source model .*/a; choose another folder"):
        align_models(["a", "b"], ".", overwrite=True)


def test_a_copy_keeps_its_own_chat_template(folder: Path) -> None:
    Path("b/chat_template.jinja").write_text("{{ messages[0].content }}<both>")
    align_models(["a", "b"], "out", base="base")
    assert Path("out/b/chat_template.jinja").read_text() == "{{ messages[0].content }}<both>"
    assert not Path("out/a/chat_template.jinja").exists()


def test_nothing_is_written_if_models_or_folders_conflict(folder: Path) -> None:
    write_tiny_llama(folder / "deep", seed=4, n_layers=3, tied=False)
    write_model(folder / "out" / "b", 5, "<mine>")
    before = weights("out/b")
    for experts, kind, message in (
        (["a"], ConfigError, "name at least two models"),
        (["a", "x=b", "x=base"], ConfigError, "two models are called 'x'"),
        (
            ["a", "../x=b"],
            ConfigError,
            r"expert name '../x' must consist of letters.*; give it a name, e.g. first=/.*/b",
        ),
        (["a", "base"], ConfigError, "expert name 'base' must consist of .*; give it a name, e.g. first="),
        (["a", "x=a"], ConfigError, "'a' and 'x' are the same model, .*/a; remove one of them"),
        (["a", "b"], RecipeError, "out/b: exists and is not empty; .* overwrite it"),
        (["a", "deep"], RecipeError, "deep has 3 layers"),
    ):
        with pytest.raises(kind, match=message):
            align_models(experts, "out")
        assert [path.name for path in Path("out").iterdir()] == ["b"]
    with pytest.raises(
        ConfigError, match=r"tokenizer 'c': expected union, base, the name of a model \(a, b\), or a folder"
    ):
        align_models(["a", "b"], "out", tokenizer="c")
    assert weights("out/b").keys() == before.keys()
    align_models(["a", "b"], "out", overwrite=True)
    assert "<mine>" not in ids("out/b")


def evomerge(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "evomerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_next_step_that_the_command_suggests_works(folder: Path) -> None:
    *written, size, last = evomerge("align", "a", "b", "--base", "base", "--out", "out")
    assert written == ["out/base: written", "out/a: written", "out/b: written"]
    assert size == f"{len(ids('out/a'))} tokens, {len(ids('out/a'))} embedding rows"
    said = evomerge(*last.removeprefix("next: evomerge ").split(), "-t", "toy.yaml")
    assert said == ["search.yaml: written", "next: evomerge search search.yaml"]
