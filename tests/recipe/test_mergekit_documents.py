"""mergekit's documents: how they are read, what is ignored, and how errors are reported."""

from typing import Any

import pytest

from evomerge.core import RecipeError
from evomerge.plan import slices_with_inputs
from evomerge.recipe import Recipe, Slice, Source, check_recipe, mergekit_remark, recipe_file_from_yaml
from evomerge.recipe.mergekit_reader import recipe_from_mergekit

GOOD = {"models": [{"model": "a", "parameters": {"weight": 1.0}}], "merge_method": "linear"}

BARE = {"models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_methd": "x"}, "did you mean 'merge_method'"),
        ({"merge_method": None}, "'merge_method' is missing; known methods: arcee_fusion"),
        ({"merge_method": "tie"}, "did you mean 'ties'"),
        ({"parameters": {"wieght": 1}}, "did you mean 'weight'"),
        (
            {"models": [{"model": "a", "weight": 1}]},
            r"models\[0\]: unknown key 'weight'; it belongs under 'parameters'",
        ),
        ({"parameters": {"filter": "mlp", "value": 0.5}}, "no parameter 'filter'"),
        ({"merge_method": "arcee_fusion", "parameters": {"strength": 1}}, "no parameter 'strength'. It has: none"),
        ({"parameters": {"weight": float("nan")}}, "finite"),
        ({"parameters": {"weight": "abc"}}, "number"),
        ({"parameters": {"weight": []}}, "empty"),
        ({"parameters": {"weight": [1, True]}}, "expected a number"),
        ({"parameters": {"weight": 10**400}}, "must be a finite number"),
        ({"models": [{"model": "+l"}]}, r"models\[0\].model: '\+l' is not a model reference"),
        ({"models": [{"model": "a+"}]}, "'a\\+' is not a model reference"),
        ({"base_model": "@x"}, "base_model: '@x' is not a model reference"),
        ({"parameters": {"weight": {"valeu": 1}}}, "did you mean 'value'"),
        ({"parameters": {"normalize": 3}}, "true or false"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "twice"),
        (
            {"models": [{"model": "a", "parameters": {"wieght": 1}}]},
            r"models\[0\]\.parameters: .*'wieght'; did you mean 'weight'",
        ),
        ({"models": []}, "at least one"),
        ({"models": "a"}, "list"),
        ({"slices": []}, "exactly one"),
        ({"models": None, "modules": {"default": {"models": GOOD["models"], "slices": []}}}, "exactly one"),
        (
            {"models": None, "modules": {"default": {"models": GOOD["models"]}, "x": {"models": GOOD["models"]}}},
            "either all",
        ),
        ({"models": None, "modules": {"default": {"modles": []}}}, "did you mean 'models'"),
        ({"models": None}, "exactly one"),
        ({"parameters": {3: 1.0}}, "^file.yml: parameters: merge method 'linear' has no parameter '3'"),
        ({"modules": {}}, "exactly one"),
        ({"models": None, "modules": {}}, "mapping of modules"),
        ({"chat_template": 3}, "expected text"),
        ({"tokenizer_source": "union", "tokenizer": {"source": "base"}}, "give one of"),
        ({"tokenizer": {"sorce": "base"}}, "did you mean 'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "at least 1"),
        ({"tokenizer": {"pad_to_multiple_of": "8"}}, "whole number"),
        ({"tokenizer": {"tokens": {"<a>": {}}}}, "'source' is missing"),
        ({"tokenizer": {"tokens": {"<a>": {"source": {"kind": "mean"}}}}}, "'zero' or 'model_token'"),
        (
            {"tokenizer": {"tokens": {"<a>": {"source": {"kind": "model_token", "model": "a"}}}}},
            "exactly one of 'token'",
        ),
        ({"tokenizer": {"tokens": {"<a>": {"source": "a", "force": 1}}}}, "true or false"),
        (
            {"base_model": "b@main", "models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]},
            "must also be listed among the sources of every slice",
        ),
        ({"models": [{"model": {"model": "a", "lora": "l@x"}}]}, "only hub models can have a revision"),
        ({"models": [{"model": {"model": "a", "override_architektur": "x"}}]}, "did you mean 'override_architecture'"),
        (
            {"models": None, "slices": [{"sources": [{"model": "a", "revision": "x", "layer_range": [0, 1]}]}]},
            r"slices\[0\].sources\[0\]: unknown key 'revision'; write `model: PATH@REVISION`",
        ),
        (
            {"models": None, "slices": [{"sources": [{"model": "a"}]}]},
            r"slices\[0\].sources\[0\]: layer_range is missing: .* list whole models under `models`",
        ),
        ({"random_seed": "x"}, "random_seed: expected a whole number from 0"),
        ({"dtype": "int4"}, "unknown dtype"),
        ({"merge_method": "ties"}, "needs a base model"),
        ({**BARE, "merge_method": "slerp", "base_model": "b", "parameters": {"t": 2.0}}, "t: expected 0 to 1, got 2.0"),
        ({**BARE, "merge_method": "karcher", "parameters": {"tol": 0}}, "tol: expected more than 0, got 0.0"),
        (
            {**BARE, "merge_method": "karcher", "parameters": {"max_iter": -1}},
            "max_iter: expected a whole number from 0, got -1.0",
        ),
        ({**BARE, "merge_method": "karcher", "parameters": {"max_iter": 2.5}}, "a whole number from 0, got 2.5"),
        ({"merge_method": "multislerp", "parameters": {"weight": 1, "eps": 0}}, "eps: expected more than 0, got 0.0"),
    ],
)
def test_errors_in_documents_are_named(change, message):
    document = {**GOOD, **change}
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe_from_mergekit(document, "file.yml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {base: a, experts: {b: b}}\nmethod: ties", "search configuration"),
        ("base_model: a\ngate_mode: hidden\nexperts: [{source_model: b}]", "mergekit-moe"),
        ("merge_method: moe\nexperts: [{source_model: b}]", "mergekit-moe"),
        ("genome: {models: [a, b], merge_method: ties}\ntasks_: []", "mergekit-evolve"),
    ],
)
def test_other_kinds_of_files_are_identified(text, message):
    with pytest.raises(RecipeError, match=f"r.yml: is .*{message}"):
        recipe_file_from_yaml(text, "r.yml")


def test_only_module_of_a_language_model_needs_no_name():
    plain = recipe_from_mergekit(GOOD, "x")
    assert (
        recipe_from_mergekit({"merge_method": "linear", "modules": {"default": {"models": GOOD["models"]}}}, "x")
        == plain
    )


@pytest.mark.parametrize("base", ["b", {"model": "b"}, {"model": {"path": "b"}}])
def test_slice_may_repeat_the_base_in_any_spelling(base):
    sources = [{"model": name, "layer_range": [0, 2], "parameters": {"weight": 1}} for name in "ab"]
    document = {"merge_method": "task_arithmetic", "base_model": "b", "slices": [{"sources": sources}]}
    repeated = document | {"slices": [{"sources": sources, "base_model": base}]}
    assert recipe_from_mergekit(repeated, "x") == recipe_from_mergekit(document, "x")
    other = recipe_from_mergekit(document | {"slices": [{"sources": sources, "base_model": "a"}]}, "x")
    assert (other.base, other.slices[0].base) == ("b", "a")
    assert other.fingerprint() != recipe_from_mergekit(document, "x").fingerprint()


def test_settings_that_mergekit_ignores_are_dropped_with_a_warning(caplog):
    sources = [{"model": name, "layer_range": [0, 2], "parameters": {"weight": 1, "density": 0.5}} for name in "ab"]
    plain = {"merge_method": "slerp", "base_model": "a", "parameters": {"t": 0.5}}
    slices = [{"sources": [{key: source[key] for key in ("model", "layer_range")} for source in sources]}]
    circulating = {
        **plain,
        "slices": [{"sources": sources, "residual_weight": 0.5}],
        "parameters": {"t": 0.5, "int8_mask": True, "dtype": "bfloat16", "embed_slerp": True},
    }
    assert recipe_from_mergekit(circulating, "r.yml") == recipe_from_mergekit(plain | {"slices": slices}, "r.yml")
    assert "r.yml: without effect with merge method 'slerp', as in mergekit: slices[0].residual_weight, " in caplog.text
    for place in ("slices[0].sources[1].parameters.density", "parameters.int8_mask", "parameters.dtype"):
        assert place in caplog.text
    caplog.clear()
    for_all = {**GOOD, "models": [{"model": "a", "parameters": {"weight": 1.0, "normalize": False}}]}
    assert recipe_from_mergekit(for_all, "r.yml") == recipe_from_mergekit(GOOD, "r.yml")
    assert "as in mergekit: models[0].parameters.normalize" in caplog.text


def test_random_seed_becomes_the_seed_of_the_recipe():
    assert recipe_from_mergekit(GOOD | {"random_seed": 7}, "x").seed == 7


def test_override_architecture_is_ignored():
    model = {"model": {"path": "a"}, "override_architecture": "LlamaForCausalLM"}
    document = {**GOOD, "models": [{"model": model, "parameters": {"weight": 1.0}}]}
    assert recipe_from_mergekit(document, "x") == recipe_from_mergekit(GOOD, "x")


@pytest.mark.parametrize("base", ["b@main", "b+l", {"model": {"path": "b", "revision": "main"}, "lora": "l"}])
def test_base_with_revision_or_adapter_is_added_to_whole_models(base):
    document = {**BARE, "merge_method": "task_arithmetic", "parameters": {"weight": 1}, "base_model": base}
    listed = document | {"models": [{"model": "a"}, {"model": base}]}
    assert recipe_from_mergekit(document, "x") == recipe_from_mergekit(listed, "x")
    assert recipe_from_mergekit(document, "x").base == recipe_from_mergekit(listed, "x").slices[0].sources[1].key


def of_layers(*models: str, **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": model, "layer_range": [0, 2]} for model in models], **more}


def test_base_that_provides_only_config_and_tokenizer_need_not_be_in_the_slices():
    document = {"merge_method": "passthrough", "base_model": "b+l", "slices": [of_layers("a")]}
    recipe = recipe_from_mergekit(document, "x")
    assert (recipe.base, recipe.models()) == ("b", ("b", "a"))
    listed = recipe_from_mergekit(document | {"slices": [of_layers("a"), of_layers("b+l")]}, "x")
    assert listed.base == "b+l"
    assert listed.source("b+l").lora == "l"
    with pytest.raises(
        RecipeError, match="b@main has a revision or an adapter, so it must also be listed among the sources"
    ):
        recipe_from_mergekit(document | {"base_model": "b@main"}, "x")


@pytest.mark.parametrize(
    ("document", "base", "n_sources"),
    [
        ({"merge_method": "passthrough", "models": [{"model": "a"}]}, "b", 1),
        (GOOD, "b", 1),  # the weight belongs to that model only
        ({**GOOD, "parameters": {"weight": 1.0}}, "b+l", 2),
    ],
)
def test_base_with_adapter_is_an_input_whenever_a_plain_base_is(document, base, n_sources):
    recipe = recipe_from_mergekit({**document, "base_model": "b+l"}, "x")
    assert (recipe.base, len(recipe.slices[0].sources)) == (base, n_sources)
    plain = recipe_from_mergekit({**document, "base_model": "b"}, "x")
    assert len(slices_with_inputs(plain)[0].sources) == n_sources


def test_slice_with_its_own_base_does_not_need_the_recipes_base():
    slices = [of_layers("b+l", "a"), of_layers("c", "a", base_model="c")]
    document = {"merge_method": "task_arithmetic", "base_model": "b+l", "slices": slices, "parameters": {"weight": 1}}
    recipe = recipe_from_mergekit(document, "x")
    assert [recipe.base_of(part) for part in recipe.slices] == ["b+l", "c"]
    assert [len(part.sources) for part in recipe.slices] == [2, 2]
    with pytest.raises(RecipeError, match="b\\+l has a revision or an adapter"):
        recipe_from_mergekit(document | {"slices": [*slices, of_layers("a")]}, "x")


@pytest.mark.parametrize(
    ("written", "meant"), [("false", False), ("No", False), ("on", True), (["0", "true"], (False, True))]
)
def test_switch_may_be_written_as_text(written, meant):
    recipe = recipe_from_mergekit({**GOOD, "parameters": {"normalize": written}}, "x")
    assert recipe.parameters["normalize"][0].value == meant
    check_recipe(recipe)
    with pytest.raises(RecipeError, match="expected true or false, got 'nope'"):
        check_recipe(recipe_from_mergekit({**GOOD, "parameters": {"normalize": "nope"}}, "x"))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"int8_mask": "yes"}),
        ("sce", {"int8_mask": ["true", "off", True]}),
        ("task_arithmetic", {"rescale": ["no", "yes"], "density": "1e-1"}),
    ],
)
def test_parameters_without_effect_are_checked_like_others(method, parameters):
    document = {**BARE, "merge_method": method, "base_model": "b"}
    weight = {} if method == "sce" else {"weight": 1}
    check_recipe(recipe_from_mergekit({**document, "parameters": weight | parameters}, "x"))
    with pytest.raises(RecipeError, match="int8_mask: expected true or false, got 'nope'"):
        check_recipe(recipe_from_mergekit({**document, "parameters": weight | {"int8_mask": "nope"}}, "x"))


def test_slice_of_different_ranges_must_list_the_base():
    def document(first, *listed):
        ranges = {"a": [0, 1], "b": first} | dict(listed)
        sources = [{"model": name, "layer_range": layers} for name, layers in ranges.items()]
        return {"merge_method": "model_stock", "base_model": "c", "slices": [{"sources": sources}]}

    for fine in (document([0, 1]), document([1, 2], ("c", [1, 2]))):
        check_recipe(recipe_from_mergekit(fine, "x"))
    with pytest.raises(
        RecipeError, match=r"slices\[0\]: the sources have different layer ranges, so the base model c must be listed"
    ):
        check_recipe(recipe_from_mergekit(document([1, 2]), "x"))


def test_remark_says_what_mergekit_needs():
    plain = Recipe("linear", (Slice((Source("/a"), Source("/b"))),))
    assert mergekit_remark(plain) is None
    adapted = Recipe("linear", (Slice((Source("/a"), Source("/b", lora="/l"))),))
    assert mergekit_remark(adapted) == "mergekit merges LoRA adapters only with --lora-merge-cache FOLDER"
    shifted = Recipe("shifted_linear", (Slice((Source("/a"),)),))
    assert str(mergekit_remark(shifted)).startswith("mergekit cannot express this merge")
