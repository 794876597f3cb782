"""Parameters resolve as in mergekit; models that do not fit together are refused; planning many candidates is cheap."""

import dataclasses
import json
from pathlib import Path

import pytest

from evomerge.core import CheckpointError, RecipeError
from evomerge.plan import make_plan, read_model_header, slices_with_inputs
from evomerge.recipe import Recipe, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        name: str(write_tiny_llama(folder / name, seed=seed, n_layers=4))
        for seed, name in enumerate(["base", "a", "b"])
    }


@pytest.fixture(scope="module")
def headers(models):
    return {path: read_model_header(path) for path in models.values()}


def weight(*settings):
    return {"weight": tuple(settings)}


def whole(models, method="ties", parameters=None, **kwargs):
    sources = tuple(Source(models[name], None, weight(Setting(0.5))) for name in "ab")
    return Recipe(method, (Slice(sources),), models["base"], parameters or {}, **kwargs)


def by_name(plan):
    return {step.output: step for step in plan.steps}


def test_base_with_different_shapes_is_refused(models, headers, tmp_path):
    base = str(write_tiny_llama(tmp_path / "base", seed=0, n_layers=4, intermediate_size=96))
    with pytest.raises(RecipeError, match=r"mlp.*shape .* in .*a, .*96.* in .*base; only tensors of equal shape"):
        make_plan(whole(models | {"base": base}), headers | {base: read_model_header(base)})


def test_linear_merge_adds_the_base_to_the_sources_as_mergekit_does():
    half = weight(Setting(0.5))
    listed = Recipe("linear", (Slice((Source("/a"), Source("/b"))),), "/b", half)
    assert slices_with_inputs(listed) == listed.slices
    beside = dataclasses.replace(listed, base="/c")
    assert [source.key for source in slices_with_inputs(beside)[0].sources] == ["/a", "/b", "/c"]
    weights_of_its_own = Recipe("linear", (Slice((Source("/a", None, half), Source("/b", None, half))),), "/c")
    assert slices_with_inputs(weights_of_its_own) == weights_of_its_own.slices


def test_sum_with_one_nonzero_weight_reads_only_that_model(models, headers):
    """If several weights are nonzero, all models stay, so that the thousands of candidates of a search share one form."""

    def inputs(*weights):
        sources = (Source(path, None, weight(value)) for path, value in zip(models.values(), weights, strict=True))
        plan = make_plan(Recipe("linear", (Slice(tuple(sources)),)), headers)
        return {tuple(entry.source for entry in step.inputs) for step in plan.steps}

    base, a, b = models.values()
    assert inputs(Setting(0.0), Setting(0.5), Setting(0.0)) == {(a,)}
    assert inputs(Setting(0.3), Setting(0.5), Setting(0.0)) == {(base, a, b)}
    assert inputs(Setting(0.0), Setting(0.5), Setting((0.0, 1.0))) == {(a,), (base, a, b)}, (
        "the inputs must be decided at each depth"
    )


def test_whole_model_plan_covers_all_tensors(models, headers):
    plan = make_plan(whole(models, seed=3), headers)
    assert plan.n_layers == 4
    assert (plan.dtype, plan.math_dtype, plan.seed) == ("bfloat16", "float32", 3)
    rounded = make_plan(dataclasses.replace(whole(models), dtype="float16"), headers)
    assert (rounded.dtype, rounded.math_dtype) == ("float16", "float16")
    assert sorted(step.output for step in plan.steps) == sorted(headers[models["base"]].tensors)
    assert plan.steps[0].output == "model.embed_tokens.weight"
    assert plan.steps[-1].output == "model.norm.weight"
    step = by_name(plan)["model.layers.2.mlp.up_proj.weight"]
    assert step.base.source == models["base"]
    assert [entry.source for entry in step.inputs] == [models["a"], models["b"]]
    assert step.inputs[0].parameters == {"weight": 0.5, "density": 1.0}
    assert step.parameters == {"lambda": 1.0, "normalize": True, "rescale": False}
    assert plan.output_bytes == sum(t.end - t.start for t in headers[models["base"]].tensors.values())


def test_gradients_filters_and_precedence_are_resolved(models, headers):
    source = {"weight": (Setting(9.0, "q_proj"), Setting((0.0, 1.0), "mlp"))}
    level = {"weight": (Setting(5.0, "k_proj"),)}
    recipe = Recipe(
        "task_arithmetic",
        (Slice((Source(models["a"], None, source),), level),),
        models["base"],
        {"weight": (Setting(0.25),), "lambda": (Setting((1.0, 2.0)),)},
    )
    steps = by_name(make_plan(recipe, headers))

    def value(name):
        return steps[name].inputs[0].parameters["weight"]

    assert value("model.layers.1.self_attn.q_proj.weight") == 9.0
    assert value("model.layers.1.self_attn.k_proj.weight") == 5.0
    assert value("model.layers.1.self_attn.v_proj.weight") == 0.25
    assert value("model.layers.1.mlp.up_proj.weight") == pytest.approx(1 / 3)
    assert value("model.embed_tokens.weight") == 0.25
    assert steps["model.layers.3.mlp.up_proj.weight"].parameters["lambda"] == 2.0
    assert steps["model.norm.weight"].parameters["lambda"] == 1.0


@pytest.mark.parametrize(("depth", "expected"), [(0, 0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1, 1)])
def test_gradient_is_interpolated_over_depth(depth, expected):
    assert Setting((0.0, 0.5, 1.0)).number(depth) == pytest.approx(expected)
    assert Setting((7.0,)).number(depth) == Setting(7.0).number(depth) == 7.0


def test_slices_renumber_layers_and_read_the_right_ones(models, headers):
    recipe = Recipe(
        "slerp",
        (
            Slice((Source(models["base"], (0, 1)), Source(models["a"], (3, 4))), {"t": (Setting(0.25),)}),
            Slice((Source(models["base"], (0, 4)), Source(models["a"], (0, 4))), {"t": (Setting((0.0, 1.0)),)}),
        ),
        models["base"],
    )
    plan = make_plan(recipe, headers)
    steps = by_name(plan)
    assert plan.n_layers == 5
    first = steps["model.layers.0.mlp.up_proj.weight"]
    assert first.base.tensor == "model.layers.0.mlp.up_proj.weight"
    assert first.inputs[0].tensor == "model.layers.3.mlp.up_proj.weight"
    assert first.parameters["t"] == 0.25
    assert steps["model.layers.4.mlp.up_proj.weight"].base.tensor == "model.layers.3.mlp.up_proj.weight"
    assert steps["model.layers.3.mlp.up_proj.weight"].parameters["t"] == pytest.approx(2 / 3)
    assert steps["model.embed_tokens.weight"].parameters["t"] == 0.25  # from the first slice
    assert steps["model.norm.weight"].parameters["t"] == 0.0  # from the last slice, at depth 0


def test_linear_plan_reads_the_base_only_if_it_has_a_weight(models, headers):
    sources = tuple(Source(models[name], None, weight(Setting(1.0))) for name in "ab")
    without = make_plan(Recipe("linear", (Slice(sources),), models["base"]), headers)
    assert len(without.steps[0].inputs) == 2
    with_weight = Recipe("linear", (Slice(sources),), models["base"], weight(Setting(0.5)))
    plan = make_plan(with_weight, headers)
    assert [entry.source for entry in plan.steps[0].inputs] == [models["a"], models["b"], models["base"]]
    assert plan.steps[0].base is None


def test_structure_is_cached_but_values_are_not(models, headers):
    first = make_plan(whole(models), headers)
    second = make_plan(whole(models, parameters={"lambda": (Setting(2.0),)}), headers)
    assert first.steps[0].parameters["lambda"] == 1.0
    assert second.steps[0].parameters["lambda"] == 2.0


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (lambda m: whole(m, "tie"), "did you mean 'ties'"),
        (lambda m: whole(m, parameters={"densty": (Setting(1.0),)}), "did you mean 'density'"),
        (lambda m: whole(m, parameters={"density": (Setting(2.0),)}), "expected 0 to 1"),
        (lambda m: Recipe("ties", (Slice((Source(m["a"]),)),), m["base"]), "'weight' of .* has no value"),
        (lambda m: Recipe("slerp", (Slice((Source(m["a"]), Source(m["b"]))),), m["base"]), "exactly 1"),
        (
            lambda m: Recipe(
                "linear", (Slice((Source(m["a"]), Source(m["b"])), weight(Setting(1.0, "x"), Setting(0.0))),)
            ),
            "sum to 0",
        ),
        (lambda m: Recipe("linear", (Slice((Source(m["a"], (0, 9)),)),), None, weight(Setting(1.0))), "has 4 layers"),
        (lambda m: Recipe("linear", (Slice((Source("/nowhere"),)),), None, weight(Setting(1.0))), "no model header"),
        (
            lambda m: Recipe("linear", (Slice((Source(m["a"], (0, 2)), Source(m["b"], (0, 3)))),), None),
            "same number of layers",
        ),
    ],
)
def test_bad_recipes_are_refused(models, headers, recipe, message):
    with pytest.raises(RecipeError, match=message):
        make_plan(recipe(models), headers)


def edited(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("kwargs", "changes", "message"),
    [
        ({"n_layers": 3}, {}, "3 layers.*has 4"),
        ({"vocab": 144}, {}, "144 embedding rows.*has 128"),
        ({"hidden": 64}, {}, "hidden_size"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, {}, "num_attention_heads"),
        ({"intermediate_size": 96}, {}, "shape"),
        ({}, {"rope_theta": 500000.0}, "rope"),
        ({}, {"model_type": "mistral"}, "model_type"),
        ({"tied": False}, {}, "ties it to the embedding"),
    ],
)
def test_models_that_do_not_fit_are_refused(tmp_path, models, headers, kwargs, changes, message):
    other = edited(write_tiny_llama(tmp_path / "other", seed=9, **{"n_layers": 4, **kwargs}), **changes)
    recipe = whole({**models, "b": str(other)})
    with pytest.raises(RecipeError, match=message):
        make_plan(recipe, {**headers, str(other): read_model_header(other)})


@pytest.mark.parametrize("changes", [{"vocab": 144}, {"tied": False}, {"vocab": 144, "tied": False, "n_layers": 6}])
def test_model_that_provides_only_layers_may_have_another_vocabulary(tmp_path, models, headers, changes):
    other = str(write_tiny_llama(tmp_path / "other", seed=9, **{"n_layers": 4, **changes}))
    headers = {**headers, other: read_model_header(other)}

    def stacked(*parts):
        return Recipe("passthrough", tuple(Slice((Source(model, layers),)) for model, layers in parts))

    middle = stacked((models["a"], (0, 2)), (other, (1, 3)), (models["a"], (3, 4)))
    plan = make_plan(middle, headers)
    found = {entry.source for step in plan.steps for entry in step.inputs if ".layers." not in step.output}
    assert found == {models["a"]}
    assert by_name(plan)["model.layers.2.mlp.up_proj.weight"].inputs[0].source == other
    with pytest.raises(RecipeError, match=r"embedding rows|ties it to the embedding"):
        make_plan(stacked((models["a"], (0, 2)), (other, (2, 4))), headers)


def test_rope_spellings_are_equivalent(tmp_path, models, headers):
    other = edited(
        write_tiny_llama(tmp_path / "o", seed=9, n_layers=4),
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000},
    )
    make_plan(whole({**models, "b": str(other)}), {**headers, str(other): read_model_header(other)})


def test_tied_expert_with_untied_base_uses_its_embedding(tmp_path, models, headers):
    base = write_tiny_llama(tmp_path / "base", seed=9, n_layers=4, tied=False)
    recipe = dataclasses.replace(whole(models), base=str(base))
    plan = make_plan(recipe, {**headers, str(base): read_model_header(base)})
    step = by_name(plan)["lm_head.weight"]
    assert step.base.tensor == "lm_head.weight"
    assert step.inputs[0].tensor == "model.embed_tokens.weight"


@pytest.mark.parametrize("extra", [True, False])
def test_missing_and_extra_tensors_are_reported(tmp_path, models, headers, extra):
    from safetensors.torch import load_file, save_file

    other = write_tiny_llama(tmp_path / "other", seed=9, n_layers=4)
    tensors = load_file(other / "model.safetensors")
    norm = tensors.pop("model.norm.weight") if not extra else tensors["model.norm.weight"]
    if extra:
        tensors["model.extra.weight"] = norm.clone()
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra.weight" if extra else "no tensor 'model.norm.weight'"):
        make_plan(whole({**models, "b": str(other)}), {**headers, str(other): read_model_header(other)})


def test_multi_token_prediction_layers_are_merged_but_not_counted(tmp_path):
    folders = {
        name: str(write_tiny_llama(tmp_path / name, seed=seed, n_layers=4))
        for seed, name in enumerate(["base", "a", "b"])
    }
    for folder in folders.values():
        edited(Path(folder), num_hidden_layers=3, num_nextn_predict_layers=1)
    plan = make_plan(whole(folders), {folder: read_model_header(folder) for folder in folders.values()})
    assert plan.n_layers == 3
    assert "model.layers.3.mlp.up_proj.weight" in by_name(plan)


def test_output_layer_comes_after_the_layers(tmp_path):
    """Whatever its name, it takes the parameters of the last slice, and the embedding those of the first."""
    from safetensors.torch import load_file, save_file

    folder = write_tiny_llama(tmp_path / "neox", seed=1, n_layers=2, tied=False)
    names = {
        "model.embed_tokens.weight": "gpt_neox.embed_in.weight",
        "lm_head.weight": "embed_out.weight",
        "model.norm.weight": "model.embedding_norm.weight",
    }
    tensors = load_file(folder / "model.safetensors")
    save_file({names.get(name, name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    pieces = [Slice((Source(str(folder), (layer, layer + 1), weight(Setting(layer + 1.0))),)) for layer in range(2)]
    recipe = Recipe("linear", tuple(pieces), None, {"normalize": (Setting(False),)})
    steps = by_name(make_plan(recipe, {str(folder): read_model_header(folder)}))
    found = {name: steps[name].inputs[0].parameters["weight"] for name in names.values()}
    assert list(found.values()) == [1.0, 2.0, 2.0]
    assert next(iter(steps)) == "gpt_neox.embed_in.weight"
