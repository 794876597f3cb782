"""Recipe files: our own form is lossless, mergekit's form is read as the same merge, and hostile files are refused."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.core import RecipeError
from evomerge.core.safe_yaml import load_yaml
from evomerge.recipe import (
    METHODS,
    BaseRole,
    Recipe,
    Scope,
    Setting,
    Slice,
    Source,
    TokenizerSpec,
    TokenRule,
    read_recipe,
    recipe_file_from_yaml,
    recipe_to_yaml,
    write_recipe,
)
from evomerge.recipe.mergekit_reader import recipe_from_mergekit
from evomerge.recipe.mergekit_writer import recipe_to_mergekit

paths = st.sampled_from(["/m/base", "/m/a", "/m/b b", "/m/c+d", "/m/e@f", "org/model", "/m/ü"])
adapters = st.sampled_from([None, "/l/a", "/l/b+c"])
filters = st.one_of(st.none(), st.sampled_from(["mlp", "self_attn", "*", "layers.1", "yes", "1"]))


def values(spec):
    if isinstance(spec.default, bool):
        return st.booleans()
    if spec.whole:
        return st.integers(0, 9).map(float)
    low = -2.0 if spec.low is None else spec.low + 0.25 * spec.above_low
    high = 2.0 if spec.high is None else spec.high
    number = st.floats(low, high, allow_nan=False)
    return st.one_of(number, st.lists(number, min_size=1, max_size=4).map(tuple))


@st.composite
def parameters(draw, method, scopes):
    names = [spec for spec in METHODS[method].parameters if spec.scope in scopes]
    chosen = draw(st.lists(st.sampled_from(names), unique_by=lambda spec: spec.name)) if names else []
    return {
        spec.name: tuple(draw(st.lists(st.builds(Setting, values(spec), filters), min_size=1, max_size=3)))
        for spec in chosen
    }


def tokenizers(models):
    one_model = st.sampled_from(models)
    rules = st.one_of(
        st.builds(TokenRule, st.none(), st.none(), st.booleans()),
        st.builds(
            TokenRule,
            one_model,
            st.one_of(st.none(), st.text(min_size=1, max_size=3), st.integers(0, 9)),
            st.booleans(),
        ),
    )
    source = st.one_of(st.sampled_from(["union", "base"]), one_model)
    tokens = st.dictionaries(st.sampled_from(["<a>", "b", "yes", "1"]), rules, max_size=2)
    return st.one_of(st.none(), st.builds(TokenizerSpec, source, tokens, st.sampled_from([None, 64])))


@st.composite
def recipes(draw, canonical=False):
    method = draw(st.sampled_from(sorted(METHODS)))
    spec = METHODS[method]
    n_sources = draw(st.integers(max(2, spec.min_sources), spec.max_sources or 4)) if spec.max_sources != 1 else 1
    models = draw(st.lists(paths, min_size=n_sources + 1, max_size=n_sources + 1, unique=True))
    base, models = models[0], models[1:]
    if spec.base is BaseRole.SOURCE and draw(st.booleans()):
        base = None
    whole = draw(st.booleans())
    both = (Scope.MODEL, Scope.GLOBAL)
    slices = []
    modules = draw(st.sampled_from([(None,), ("text_decoder", "vision_tower")]))
    for module in [module for module in modules for _ in range(1 if whole else draw(st.integers(1, 3)))]:
        first = draw(st.integers(0, 5))
        layers = None if whole else (first, first + 2)
        listed = list(models)
        if base is not None and not whole and spec.base is not BaseRole.SOURCE:
            listed.append(base)
        sources = tuple(
            Source(m, layers, draw(parameters(method, (Scope.MODEL,))), lora=draw(adapters) if m != base else None)
            for m in listed
        )
        own = {} if whole and canonical and module is None else draw(parameters(method, both))
        bases = (
            st.none() if whole or spec.base is BaseRole.SOURCE else st.sampled_from([None, *(s.key for s in sources)])
        )
        slices.append(Slice(sources, own, module, draw(bases)))
    out_dtype = draw(st.sampled_from(["bfloat16", "float16", "float32"] + ([] if canonical else [None])))
    return Recipe(
        method,
        tuple(slices),
        base,
        draw(parameters(method, both)),
        draw(st.sampled_from([None, "float32", "bfloat16"])),
        out_dtype,
        0 if canonical else draw(st.integers(0, 2**63)),
        draw(tokenizers(models)),
        None if canonical else draw(st.one_of(st.none(), st.text(max_size=8))) or None,
        chat_template=draw(st.sampled_from([None, "auto", "chatml", "{{ messages }}\n"])),
    )


@settings(max_examples=60)
@given(recipes())
def test_file_and_json_are_lossless(recipe):
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe_file_from_yaml(recipe_to_yaml(recipe)).final == recipe


@settings(max_examples=60)
@given(recipes(canonical=True))
def test_mergekit_form_alone_is_lossless(recipe):
    """Without the trailing comment, everything that mergekit's format can express is preserved."""
    read = recipe_from_mergekit(recipe_to_mergekit(recipe), "x")
    assert read == recipe
    text = recipe_to_yaml(recipe)
    body = text[: text.index("# evomerge-recipe")]
    assert recipe_file_from_yaml(body).final == recipe


def test_line_separators_in_a_token_survive_the_mergekit_form():
    for separator in "\x85\u2028\u2029":
        tokens = {"<a>": TokenRule("/a", f"x{separator}y")}
        recipe = Recipe(
            "linear",
            (Slice((Source("/a", None, {"weight": (Setting(1.0),)}),)),),
            tokenizer=TokenizerSpec("union", tokens),
        )
        text = recipe_to_yaml(recipe)
        assert recipe_file_from_yaml(text[: text.index("# evomerge-recipe")]).final.tokenizer == recipe.tokenizer


def test_fingerprint_ignores_only_the_name():
    recipe = Recipe("linear", (Slice((Source("/a", None, {"weight": (Setting(1.0),)}),)),))
    assert recipe.fingerprint() == dataclasses.replace(recipe, name="x").fingerprint()
    assert recipe.fingerprint() != dataclasses.replace(recipe, seed=1).fingerprint()
    assert Setting(1) == Setting(1.0)


def test_edited_yaml_takes_precedence_over_the_comment():
    recipe = Recipe("slerp", (Slice((Source("/a"),)),), "/b", {"t": (Setting(0.5),)}, seed=7)
    text = recipe_to_yaml(recipe).replace("t: 0.5", "t: 0.25")
    assert recipe_file_from_yaml(text).final.parameters == {"t": (Setting(0.25),)}
    assert recipe_file_from_yaml(text).final.seed == 0


def test_file_with_edited_paths_keeps_its_random_masks():
    weights = {"weight": (Setting(0.5),), "density": (Setting(0.5),)}
    recipe = Recipe("dare_ties", (Slice((Source("/old/a", None, weights),)),), "/old/base", seed=7, name="x")
    edited = recipe_file_from_yaml(recipe_to_yaml(recipe).replace("/old/", "/new/", 3)).final
    assert (edited.models(), edited.seed, edited.name) == (("/new/base", "/new/a"), 7, None)


MERGEKIT = """
slices:
  - sources:
      - model: {model: {path: a}}
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
        parameters:
          density: [0.2, 5e-1]
          weight:
            - {filter: mlp, value: 1e-3}
            - value: 1
merge_method: ties
base_model: a
parameters: {normalize: true, int8_mask: true}
dtype: float32
out_dtype: bfloat16
"""


def test_mergekit_recipe_is_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "r.yml").write_text(MERGEKIT)
    recipe = read_recipe(tmp_path / "r.yml")
    assert recipe.base == str(tmp_path / "a")
    assert recipe.slices[0].sources[1].parameters == {
        "density": (Setting((0.2, 0.5)),),
        "weight": (Setting(0.001, "mlp"), Setting(1.0)),
    }
    assert (recipe.dtype, recipe.out_dtype) == (None, "bfloat16")


def test_relative_folders_are_tried_from_the_file_and_then_from_the_working_directory(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "a").mkdir(parents=True)
    there.mkdir()
    monkeypatch.chdir(here)
    file = there / "r.yml"
    file.write_text("models: [{model: a, parameters: {weight: 1}}]\nmerge_method: linear\n")
    assert read_recipe(file).slices[0].sources[0].model == str(here / "a")
    (there / "a").mkdir()
    assert read_recipe(file).slices[0].sources[0].model == str(there / "a")
    file.write_text("models: [{model: zz, parameters: {weight: 1}}]\nmerge_method: linear\n")
    with pytest.raises(RecipeError, match=r"zz.*there/zz and .*here/zz"):
        read_recipe(file)
    file.write_text(f"models: [{{model: {'z' * 5000}, parameters: {{weight: 1}}}}]\nmerge_method: linear\n")
    with pytest.raises(RecipeError, match=r"r\.yml: models\[0\]: model 'z+': cannot be read: File name too long"):
        read_recipe(file)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(10)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "!!python/object/apply:os.system ['true']",
        "models: 1\nmodels: 2",
        "[",
        "\x00",
        "- 1",
        "",
        "a: " * 5,
        "[" * 5000,
    ],
)
def test_hostile_yaml_is_refused(text, tmp_path):
    file = tmp_path / "r.yml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yml"):
        read_recipe(file)


def test_unreadable_files_are_reported(tmp_path: Path):
    for make in (lambda p: p.write_bytes(b"\xff\xfe"), lambda p: p.mkdir(), lambda p: None):
        file = tmp_path / f"r{len(list(tmp_path.iterdir()))}.yml"
        make(file)
        with pytest.raises(RecipeError):
            read_recipe(file)


def test_damaged_comment_is_an_error():
    recipe = Recipe("slerp", (Slice((Source("/a"),)),), "/b", {"t": (Setting(0.5),)})
    with pytest.raises(RecipeError, match="damaged"):
        recipe_file_from_yaml(recipe_to_yaml(recipe)[:-20])


def test_written_file_is_plain_mergekit(tmp_path):
    recipe = Recipe("ties", (Slice((Source("/a", (0, 2)),)),), "/b", {"weight": (Setting(0.5),)}, out_dtype="bfloat16")
    write_recipe(recipe, tmp_path / "r.yml")
    document = load_yaml((tmp_path / "r.yml").read_text(), "r", RecipeError)
    assert document["dtype"] == "float32"
    assert [source["model"] for source in document["slices"][0]["sources"]] == ["/a", "/b"]
    assert set(document) == {"merge_method", "base_model", "slices", "parameters", "dtype", "out_dtype"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "linear"}, "^recipe: key 'slices' is missing"),
        ({"method": "linear", "slices": [], "versoin": 1}, "did you mean 'version'"),
        ({"method": "linear", "slices": [], "version": 99}, "upgrade"),
        ({"method": "linear", "slices": []}, "at least one slice"),
        (
            {"method": "linear", "slices": [{"sources": [{"model": "a"}]}, {"sources": []}]},
            "at least one source",
        ),
        (
            {"method": "linear", "slices": [{"sources": [{"model": "a"}, {"model": "b", "layer_range": [0, 1]}]}]},
            "all sources must be whole",
        ),
        (
            {"method": "linear", "slices": [{"sources": [{"model": "a"}]}, {"sources": [{"model": "b"}]}]},
            "whole models in one slice",
        ),
        ({"method": 3, "slices": []}, "expected text"),
        ({"method": "linear", "slices": [{"sources": [{"model": "a", "layer_range": [3, 1]}]}]}, "layer_range"),
        (
            {"method": "linear", "slices": [{"sources": [{"model": "a"}], "base": "a"}]},
            "only a slice of layers can have its own base",
        ),
    ],
)
def test_bad_json_is_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_json(data)


def test_recipes_of_the_first_version_are_read():
    data = Recipe("slerp", (Slice((Source("/a"),)),), "/b", {"t": (Setting(0.5),)}).to_json()
    old = {key: value for key, value in data.items() if key not in ("tokenizer", "chat_template")} | {
        "tokenizer_source": "/a"
    }
    assert Recipe.from_json(old).tokenizer == TokenizerSpec("/a")
    assert Recipe.from_json(old | {"tokenizer_source": None}).tokenizer is None
