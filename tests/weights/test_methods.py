"""Properties of every method in the table; test_mergekit_parity compares the values themselves with mergekit's."""

from itertools import product

import pytest
import torch

from evomerge.core import RecipeError
from evomerge.plan import make_plan
from evomerge.recipe import METHODS, BaseRole, Recipe, Scope, Setting, Slice, Source
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.registry import ELEMENTWISE, reference
from evomerge.weights.task_vectors import keep_largest
from evomerge.weights.tensor_group import TensorGroup

REQUIRED = {"weight": 0.5, "t": 0.3}


def shared_defaults(spec, scope, **changes):
    return {
        parameter.name: changes.get(parameter.name, REQUIRED.get(parameter.name, parameter.default))
        for parameter in spec.parameters
        if parameter.scope is scope
    }


def group(method, tensors, base=None, seed=0, **changes):
    spec = METHODS[method]
    per_model = shared_defaults(spec, Scope.MODEL, **changes)
    shared = shared_defaults(spec, Scope.GLOBAL, **changes)
    return TensorGroup("w", tensors, [per_model] * len(tensors), base, shared, seed)


def n_sources(spec):
    return spec.max_sources or max(2, spec.min_sources)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return WeightPool.from_folders([str(write_tiny_llama(folder / f"m{seed}", seed=seed)) for seed in range(4)])


@pytest.mark.parametrize("method", METHODS)
def test_merging_identical_models_gives_the_same_model(method):
    spec = METHODS[method]
    tensor = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    base = tensor if spec.base is not BaseRole.SOURCE else None
    merged = reference(method)(group(method, [tensor] * n_sources(spec), base))
    torch.testing.assert_close(merged, tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1), (1, 5), (2, 3, 4)])
def test_inputs_of_any_shape_are_left_unchanged(method, shape):
    spec = METHODS[method]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(n_sources(spec))]
    base = torch.randn(shape) if spec.base is not BaseRole.SOURCE else None
    before = [tensor.clone() for tensor in tensors]
    merged = reference(method)(group(method, tensors, base, density=0.5))
    assert merged.shape == shape
    assert bool(torch.isfinite(merged).all())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, before, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("math_dtype", [None, "bfloat16"])
def test_whole_models_can_be_merged(method, math_dtype, pool):
    spec = METHODS[method]
    base, *experts = pool.headers
    sources = tuple(Source(model) for model in experts[: n_sources(spec)])
    settings = {
        parameter.name: (Setting(REQUIRED[parameter.name]),)
        for parameter in spec.parameters
        if parameter.default is None
    }
    recipe = Recipe(
        method, (Slice(sources),), base if spec.base is not BaseRole.SOURCE else None, settings, math_dtype, "bfloat16"
    )
    merged = dict(Merger(pool).tensors(make_plan(recipe, pool.headers)))
    assert set(merged) == set(pool.headers[base].tensors)
    assert all(tensor.dtype is torch.bfloat16 for tensor in merged.values())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_random_masks_preserve_the_rate_and_the_mean(method, density):
    rows, columns = 200, 400
    delta = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3)) + 0.5
    base = torch.zeros(rows, columns)
    merged = reference(method)(
        group(method, [base + delta], base, seed=1, weight=1.0, density=density, rescale=False, normalize=False)
    )
    kept = merged != 0
    sigma = (density * (1 - density) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - density) < 5 * sigma
    assert torch.equal(merged[kept], delta[kept])
    rescaled = reference(method)(
        group(method, [base + delta], base, seed=1, weight=1.0, density=density, normalize=False)
    )
    torch.testing.assert_close(rescaled.abs().sum(), delta.abs().sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("density", "kept"), [(1.0, [0, 1, 2, 3, 4]), (0.59, [0, 2]), (0.61, [0, 2, 3]), (0.01, [0]), (0.0, [])]
)
def test_largest_are_kept_and_ties_go_to_the_first(density, kept):
    delta = torch.tensor([3.0, -1.0, 2.0, -2.0, 0.5])
    assert keep_largest(delta, density).nonzero().flatten().tolist() == kept


def test_della_keeps_large_entries_more_often():
    rows, columns, density, epsilon = 4000, 5, 0.5, 0.2
    delta = torch.arange(1.0, columns + 1).expand(rows, columns).contiguous()
    base = torch.zeros(rows, columns)
    merged = reference("della_linear")(
        group("della_linear", [delta], base, weight=1.0, density=density, epsilon=epsilon, rescale=False)
    )
    rates = (merged != 0).double().mean(dim=0)
    expected = torch.linspace(density - epsilon, density + epsilon, columns, dtype=torch.float64)
    assert bool(((rates - expected).abs() < 5 * (0.25 / rows) ** 0.5).all())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("della", {"density": 0.1, "epsilon": 0.2}, "between 0 and 1"),
        ("della_linear", {"density": 0.9}, "between 0 and 1"),
        ("multislerp", {"weight": 0.0}, "sum to 0"),
        ("linear", {"weight": 0.0}, "sum to 0"),
    ],
)
def test_contradictory_parameters_are_refused(method, settings, message, pool):
    base, a, b, _ = pool.headers
    values = {name: (Setting(value),) for name, value in ({"weight": 0.5} | settings).items()}
    recipe = Recipe(method, (Slice((Source(a), Source(b))),), None if method == "linear" else base, values)
    with pytest.raises(RecipeError, match=message):
        make_plan(recipe, pool.headers)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_every_corner_of_dellas_default_bounds_can_be_merged(method, pool):
    base, a, b, _ = pool.headers
    density, epsilon = (METHODS[method].parameter(name) for name in ("density", "epsilon"))
    for corner in product(*((one.search_low, one.search_high) for one in (density, epsilon))):
        values = {"weight": 1.0, "density": corner[0], "epsilon": corner[1]}
        settings = {name: (Setting(value),) for name, value in values.items()}
        assert make_plan(Recipe(method, (Slice((Source(a), Source(b))),), base, settings), pool.headers).steps


@pytest.mark.parametrize("method", ELEMENTWISE)
@pytest.mark.parametrize("math_dtype", [torch.float32, torch.bfloat16])
def test_merging_parts_of_a_tensor_equals_merging_the_whole(method, math_dtype):
    spec, generator = METHODS[method], torch.Generator().manual_seed(2)
    tensors = [torch.randn(31_001, generator=generator).to(math_dtype) for _ in range(n_sources(spec) + 1)]

    def merged(part):
        base = tensors[0][part] if spec.base is not BaseRole.SOURCE else None
        return reference(method)(group(method, [tensor[part] for tensor in tensors[1:]], base))

    parts = [slice(0, 9), slice(9, 20_000), slice(20_000, None)]
    assert torch.equal(torch.cat([merged(part) for part in parts]), merged(slice(None)))


def test_multislerp_refuses_directions_that_cancel():
    a = torch.tensor([1.0, 0.0])
    b, c = torch.tensor([-0.5, 3**0.5 / 2]), torch.tensor([-0.5, -(3**0.5) / 2])
    with pytest.raises(RecipeError, match="cancel"):
        reference("multislerp")(group("multislerp", [a, b, c], eps=1e-6))


def test_ramplus_keeps_changes_that_all_experts_share():
    base, change = torch.zeros(3), torch.tensor([1.0, -2.0, 0.5])
    merged = reference("ramplus_tl")(group("ramplus_tl", [change, change], base, epsilon=0.0))
    torch.testing.assert_close(merged, change)


def test_search_bounds_are_valid():
    for spec in METHODS.values():
        for parameter in spec.parameters:
            assert (parameter.search_low is None) == (parameter.search_high is None)
            if parameter.search_low is not None and parameter.search_high is not None:
                assert parameter.search_low < parameter.search_high
                assert parameter.low is None or parameter.low <= parameter.search_low
                assert parameter.high is None or parameter.search_high <= parameter.high
