"""Merges of tiny models equal the merges of mergekit itself, run in its own environment on the recipe files we export."""

from dataclasses import replace

import pytest
import torch
from both_ways import assert_close, merged_both_ways

from evomerge.plan import read_model_header
from evomerge.recipe import (
    PIECEWISE,
    Folding,
    PieceTable,
    Recipe,
    Setting,
    Slice,
    Source,
    Span,
    StackLayer,
    stack_recipe,
)
from evomerge.testing.tiny_models import write_tiny_llama


def settings(**values):
    return {
        name.rstrip("_"): tuple(Setting(*entry) if isinstance(entry, list) else Setting(entry) for entry in entries)
        for name, entries in values.items()
    }


def recipes(models, out_dtype, names=("w",)):
    base, a, b = models
    mixed = settings(weight=[[0.7, "mlp"], [(0.1, 0.9), "self_attn"], 0.3], density=[[0.3, "mlp"], (0.1, 1.0)])
    plain = settings(weight=[0.4])
    mixed_weights = settings(weight=[[0.7, "mlp"], 0.4])

    def grouped(method, **shared):
        return Recipe(
            method,
            tuple(
                Slice((Source(base, layers), Source(a, layers, mixed), Source(b, layers, plain)))
                for layers in [(0, 2), (1, 4)]
            ),
            base,
            settings(**shared),
            out_dtype=out_dtype,
        )

    def whole(method, per_model, with_base=base, sources=(a, b), **shared):
        listed = tuple(Source(model, None, per_model) for model in sources)
        return Recipe(method, (Slice(listed),), with_base, settings(**shared), out_dtype=out_dtype)

    def based(method, *bases, with_base=base, per_model=plain, sources=(base, a, b), **shared):
        """Slices with their own bases; None = the recipe's base."""
        return Recipe(
            method,
            tuple(
                Slice(tuple(Source(model, layers, per_model) for model in sources), base=own)
                for layers, own in zip([(0, 2), (1, 3), (3, 4)], bases, strict=True)
            ),
            with_base,
            settings(**shared),
            out_dtype=out_dtype,
        )

    def with_dtypes(recipe, dtype, written):
        return replace(recipe, dtype=dtype, out_dtype=written)

    gradients = settings(weight=[[(0.1, 0.5, 1.0), "mlp"], (1.0, 0.0)])
    levels = Recipe(
        "ties",
        (
            Slice(
                (Source(base, (0, 2)), Source(a, (1, 3), settings(weight=[[0.9, "up_proj"]])), Source(b, (2, 4))),
                settings(weight=[[(0.2, 0.8), "mlp"]], density=[(0.3, 0.9)]),
            ),
            Slice((Source(a, (3, 4)), Source(base, (3, 4))), settings(lambda_=[1.3])),
        ),
        base,
        settings(
            weight=[[0.3, "q_proj"], 0.5], lambda_=[[0.6, "norm"], (0.9, 1.1)], normalize=[[False, "o_proj"], True]
        ),
        out_dtype=out_dtype,
    )
    return {
        "parameters_at_every_level": levels,
        "gradients": whole("ties", gradients, density=[(0.2, 1.0)], lambda_=[(0.5, 1.0, 0.7)]),
        "switches_over_depth": whole(
            "ties", plain, density=[0.4], normalize=[(True, False, True)], rescale=[[(False, True), "mlp"]]
        ),
        "bases_of_slices": based("ties", a, None, b, density=[0.4]),
        "bases_of_slices_only": based("dare_linear", b, a, base, with_base=None),
        "bases_of_slices_are_ends": based("slerp", a, None, a, per_model={}, sources=(base, a), t=[(0.1, 0.4)]),
        "bases_of_slices_or_none": based("multislerp", None, a, b, with_base=None),
        "bases_of_slices_are_sources": based("linear", a, None, b),
        "base_is_listed": whole("task_arithmetic", mixed, sources=(a, base, b)),
        "linear_base_is_listed": whole("linear", plain, sources=(a, base, b)),
        "written_as_float16": with_dtypes(whole("ties", mixed), "float32", "float16"),
        "sums_in_float32": with_dtypes(whole("ramplus_tl", {}, epsilon=[0.1], r=[0.3]), "bfloat16", "float32"),
        "results_in_float32": with_dtypes(whole("arcee_fusion", {}, sources=(a,)), "bfloat16", "float32"),
        "written_as_float32": with_dtypes(whole("linear", plain, with_base=None), None, "float32"),
        "linear": Recipe(
            "linear",
            (Slice(tuple(Source(m, None, settings(weight=[0.2 + i])) for i, m in enumerate(models))),),
            out_dtype=out_dtype,
        ),
        "linear_with_base": whole("linear", {}, weight=[0.6], normalize=[False]),
        "task_arithmetic": whole("task_arithmetic", mixed, lambda_=[0.7]),
        "task_arithmetic_grouped": grouped("task_arithmetic", normalize=[True]),
        "ties": whole("ties", mixed),
        "ties_grouped": grouped("ties", lambda_=[(0.5, 1.5)]),
        "ties_rescaled": whole("ties", plain, density=[0.2], rescale=[True], normalize=[False]),
        "dare_ties_whole": whole("dare_ties", plain, density=[1.0]),
        "dare_linear_whole": whole("dare_linear", plain, density=[1.0], normalize=[True]),
        "breadcrumbs": whole("breadcrumbs", plain, density=[0.6], gamma=[0.2], rescale=[True]),
        "breadcrumbs_few": whole("breadcrumbs", plain, density=[0.9], gamma=[0.2]),
        "breadcrumbs_ties": whole("breadcrumbs_ties", plain, density=[0.5], gamma=[0.05], normalize=[True]),
        "della_whole": whole("della", plain, density=[1.0]),
        "della_linear_whole": whole("della_linear", plain, density=[1.0]),
        "nuslerp": whole("nuslerp", mixed_weights, with_base=None),
        "nuslerp_base": whole("nuslerp", mixed_weights),
        "nuslerp_rows": whole("nuslerp", mixed_weights, nuslerp_flatten=[False]),
        "nuslerp_columns": whole("nuslerp", mixed_weights, nuslerp_flatten=[False], nuslerp_row_wise=[True]),
        "multislerp": whole("multislerp", mixed_weights, with_base=None),
        "multislerp_base": whole("multislerp", mixed_weights, normalize_weights=[False]),
        "karcher": whole("karcher", {}),
        "karcher_two": whole("karcher", {}, with_base=None, max_iter=[3], tol=[1e-4]),
        "model_stock": whole("model_stock", {}),
        "model_stock_rows": whole("model_stock", {}, filter_wise=[True]),
        "sce": whole("sce", {}),
        "sce_selected": whole("sce", {}, select_topk=[0.3]),
        "arcee_fusion": whole("arcee_fusion", {}, sources=(a,)),
        "nearswap": whole("nearswap", {}, sources=(a,), t=[0.05]),
        "ram": whole("ram", {}, epsilon=[0.1]),
        "ramplus_tl": whole("ramplus_tl", {}, epsilon=[0.1], r=[0.3]),
        "passthrough": whole("passthrough", {}, with_base=None, sources=(a,), scale=[[0.5, "o_proj"], 1.0]),
        "slerp": whole("slerp", {}, sources=(base, a), t=[[(0.0, 0.5, 1.0), "mlp"], 0.4]),
        "stack": stack_recipe(
            [
                StackLayer(0, ((base, 1.0),)),
                StackLayer(2, ((a, 1.0),), 0.5),
                StackLayer(2, ((a, 1.0),), 1.7),
                StackLayer(1, ((base, 0.4), (a, 0.9), (b, -0.3)), 0.6),
                StackLayer(3, ((b, 1.0),)),
            ],
            ends=[(base, 0.4), (a, 0.6)],
            folding=Folding(("o_proj", "down_proj"), ("o_proj", "down_proj")),
            out_dtype=out_dtype,
        ),
        "stack_of_copies": stack_recipe(
            [
                StackLayer(0, ((base, 1.0),)),
                StackLayer(1, ((base, 1.0),)),
                StackLayer(2, ((a, 1.0),), 0.5),
                StackLayer(3, ((a, 1.0),)),
                StackLayer(3, ((a, 1.0),), 1.7),
                StackLayer(0, ((b, 1.0),), 1.3),
                StackLayer(3, ((base, 1.0),), 0.9),
            ],
            ends=[(base, 1.0)],
            folding=Folding(("o_proj", "down_proj"), ("o_proj", "down_proj")),
            out_dtype=out_dtype,
        ),
        "piecewise": Recipe(
            PIECEWISE.name, (Slice((Source(a), Source(b))),), out_dtype=out_dtype, pieces=pieces(names)
        ),
    }


def pieces(names):
    """Different weights for each third of the tensors, as in a crossover of crossovers that was split at tensor boundaries."""
    return PieceTable(
        ((0.7, 0.4), (0.2, 0.9), (-0.1, 1.05)),
        {name: (Span(None, 3 * index // len(names)),) for index, name in enumerate(names)},
    )


NAMES = tuple(recipes(("x", "y", "z"), "float32"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory, mergekit):
    """(dtype, case) -> (our tensors, mergekit's)."""
    folder = tmp_path_factory.mktemp("parity")
    wanted = {}
    for dtype in ("float32", "bfloat16"):
        models = [
            str(write_tiny_llama(folder / f"{dtype}-{seed}", seed=seed, n_layers=4, tied=False, dtype=dtype))
            for seed in range(3)
        ]
        names = list(read_model_header(models[0]).tensors)
        wanted |= {(dtype, name): recipe for name, recipe in recipes(models, dtype, names).items()}
    return merged_both_ways(wanted, folder, mergekit)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merges_equal_mergekit(merged, dtype, name):
    assert_close(*merged[dtype, name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacks_of_copied_layers_equal_mergekit_to_the_bit(merged, dtype):
    ours, theirs = merged[dtype, "stack_of_copies"]
    assert len(ours) == len(theirs) > 7 * 9
    for tensor, expected in theirs.items():
        assert torch.equal(ours[tensor], expected), tensor
