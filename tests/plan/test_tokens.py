"""Models that give tokens different ids are detected from their tokenizer.json, and a merge and a search say so."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from evomerge.build import describe, make_problem, parse_config
from evomerge.plan import make_plan, other_tokens, read_models
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task
from evomerge.weights.checkpoint.export import merge_to_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed)
    return tmp_path


def said(folder: Path, *names: str) -> str | None:
    """The warning for a mean of the models, if any."""
    headers = read_models({name: (str(folder / name), None) for name in names})
    sources = tuple(Source(name, None, {"weight": (Setting(1.0),)}) for name in names)
    return other_tokens(headers, make_plan(Recipe("linear", (Slice(sources),)), headers))


def rewrite(model: Path, change: Any) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[5:7]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def test_tokens_with_different_ids_are_named(folder: Path) -> None:
    assert said(folder, "base", "a", "b") is None
    rewrite(folder / "b", swap)
    text = said(folder, "base", "a", "b")
    assert text is not None
    assert "from that of base" in text
    assert "b has different ids for 2 tokens (" in text
    assert "a gives" not in text
    vocabulary = json.loads((folder / "base" / "tokenizer.json").read_text())["model"]["vocab"]
    assert all(repr(token) in text for token in list(vocabulary)[5:7])


def test_additional_tokens_and_other_settings_are_not_a_difference(folder: Path) -> None:
    rewrite(folder / "a", lambda content: content["added_tokens"].append({"id": 10_000, "content": "<more>"}))
    rewrite(folder / "b", lambda content: content.update(padding=None))
    assert said(folder, "base", "a", "b") is None


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"model": []}',
        '{"model": {"vocab": "x"}}',
        '{"model": {"vocab": [3, ["<zz>"]]}, "added_tokens": [4, {"content": 5}]}',
    ],
)
def test_invalid_tokenizer_is_ignored_here(folder: Path, content: str) -> None:
    (folder / "a" / "tokenizer.json").write_text(content)
    assert said(folder, "base", "a") is None
    (folder / "a" / "tokenizer.json").unlink()
    assert said(folder, "base", "a") is None


def test_added_tokens_and_token_lists_are_compared(folder: Path) -> None:
    for name, ids in (("base", (1, 2)), ("a", (2, 1))):
        tokens = [{"id": number, "content": token} for number, token in zip(ids, "xy", strict=True)]
        (folder / name / "tokenizer.json").write_text(
            json.dumps({"model": {"vocab": [["p", 0]]}, "added_tokens": tokens})
        )
    assert "a has different ids for 2 tokens ('x', 'y')" in str(said(folder, "base", "a"))
    for name, order in (("base", "pqrst"), ("a", "tpqrs")):
        content = {"model": {"vocab": [[token, -1.0] for token in order]}}
        (folder / name / "tokenizer.json").write_text(json.dumps(content))
    assert "a has different ids for 5 tokens ('t', 'p', 'q', ...)" in str(said(folder, "base", "a"))


def test_search_and_merge_warn_about_different_tokens(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_toy_task(folder / "toy.yaml", n_items=4)
    settings: dict[str, Any] = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "budget": {"evaluations": 20},
    }

    def notes(**changes: Any) -> str:
        problem = make_problem(parse_config({**settings, **changes}, folder=folder))
        return "\n".join(line for line in describe(problem) if line.startswith("note"))

    source = Source(str(folder / "a"), None, {"weight": (Setting(1.0),)})
    other = Source(str(folder / "b"), None, {"weight": (Setting(1.0),)})
    recipe = Recipe("linear", (Slice((source, other)),))
    assert "tokenizers differ" not in notes()
    rewrite(folder / "b", swap)
    assert "b has different ids for 2 tokens" in notes()
    ends = {name: {"stacking": {"ends": name}} for name in ("a", "b")}
    assert "tokenizers differ" not in notes(space=ends["a"]), "layers have no token rows"
    assert "b has different ids for 2 tokens" in notes(space=ends["b"])
    with caplog.at_level(logging.WARNING):
        merge_to_folder(recipe, folder / "out")
    assert "b has different ids for 2 tokens" in caplog.text
    assert "`tokenizer: {source: base}`" in caplog.text


@pytest.mark.parametrize(("models", "is_said"), [("pqp", False), ("ppq", True), ("qqp", True), ("ppp", False)])
def test_only_slices_that_provide_token_rows_are_compared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, models: str, is_said: bool
) -> None:
    for seed, name in enumerate("pq"):
        write_tiny_llama(tmp_path / name, seed=seed, tied=False)
    rewrite(tmp_path / "q", swap)
    parts = tuple(Slice((Source(str(tmp_path / name), (0, 1)),)) for name in models)
    merge_to_folder(Recipe("passthrough", parts), tmp_path / "out")
    assert ("different ids" in caplog.text) == is_said
