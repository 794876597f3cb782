"""Crossovers of real checkpoints: exact inner products; descendants compared with explicit weights, and fused merges with plain ones."""

import numpy as np
import pytest
import torch

from evomerge.core import Candidate, CrossoverGenome, Mutation, RecipeError, VectorGenome, random_stream
from evomerge.plan import Piece, Region, make_plan
from evomerge.recipe import (
    Lineage,
    Recipe,
    Setting,
    Slice,
    Source,
    WeightLayout,
    slerp_factors,
)
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights import Merger, WeightPool
from evomerge.weights.gram import SeedGram
from evomerge.weights.noise import noise_key, normal_noise, quantiles
from evomerge.weights.philox import WORD_ROUNDS, philox
from evomerge.weights.registry import reference
from evomerge.weights.tensor_group import TensorGroup

DEPTH = 9


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    return WeightPool.from_folders([str(write_tiny_llama(folder / f"m{seed}", seed=seed)) for seed in range(3)])


@pytest.fixture(scope="module")
def chromosomes(pool):
    """The steps of a plain sum, in two chromosomes: attention and the rest."""
    sources = tuple(Source(model, parameters={"weight": (Setting(1.0),)}) for model in pool.headers)
    steps = make_plan(Recipe("linear", (Slice(sources),)), pool.headers).steps
    return [[s for s in steps if "self_attn" in s.output], [s for s in steps if "self_attn" not in s.output]]


@pytest.fixture(scope="module")
def layout(chromosomes):
    return WeightLayout(tuple(tuple((s.output, int(np.prod(s.shape))) for s in steps) for steps in chromosomes))


@pytest.fixture(scope="module")
def gram(pool, chromosomes):
    return SeedGram(pool, chromosomes)


def flat_seed(pool, steps, index):
    parts = [pool.tensor(s.inputs[index].source, s.inputs[index].tensor).double().reshape(-1) for s in steps]
    return torch.cat(parts).numpy()


def genomes(n_seeds=3, mutation_sigma=0.0):
    """Seeds, then generations in which the previous child is crossed with a random earlier candidate."""
    stream = random_stream(4, "lineage")
    found = {f"s{i}": VectorGenome(tuple(float(i == k) for k in range(n_seeds))) for i in range(n_seeds)}
    previous = "s0"
    for index in range(DEPTH):
        other = str(stream.choice([name for name in found if name != previous]))
        mutation = Mutation(int(stream.integers(2**63)), mutation_sigma) if mutation_sigma else None
        splits = (stream.random(), stream.random())
        found[f"c{index}"] = CrossoverGenome((previous, other), stream.random(), splits, mutation)
        previous = f"c{index}"
    return found, Candidate(previous, found[previous])


def explicit(pool, chromosomes, found, last):
    """The descendant from successive SLERPs of whole float64 weight vectors, each with one global angle."""
    weights = {f"s{i}": [flat_seed(pool, steps, i) for steps in chromosomes] for i in range(3)}
    for name, genome in found.items():
        if not isinstance(genome, CrossoverGenome):
            continue
        a, b = (weights[parent] for parent in genome.parents)
        whole_a, whole_b = np.concatenate(a), np.concatenate(b)
        products = (whole_a @ whole_a, whole_b @ whole_b, whole_a @ whole_b)
        child = []
        for part_a, part_b, split, steps in zip(a, b, genome.splits, chromosomes, strict=True):
            left = np.arange(len(part_a)) < int(split * len(part_a))
            (a1, b1), (a2, b2) = (slerp_factors(share, *products) for share in (genome.mix, 1 - genome.mix))
            part = np.where(left, a1 * part_a + b1 * part_b, a2 * part_a + b2 * part_b)
            if genome.mutation is not None:
                noise = [normal_noise(genome.mutation.seed, s.output, 0, int(np.prod(s.shape))) for s in steps]
                part = part + genome.mutation.sigma * torch.cat(noise).double().numpy()
            child.append(part)
        weights[name] = child
    return np.concatenate(weights[last])


def merged(pool, recipe, chromosomes, **options):
    tensors = dict(Merger(pool, **options).tensors(make_plan(recipe, pool.headers)))
    return tensors, torch.cat([tensors[s.output].double().reshape(-1) for c in chromosomes for s in c]).numpy()


def test_inner_products_are_exact_over_any_prefix(pool, chromosomes, layout, gram):
    for index, steps in enumerate(chromosomes):
        rows = np.array([flat_seed(pool, steps, seed) for seed in range(3)])
        ends = layout.ends(index)
        for position in (0, 1, int(ends[0]), int(ends[0]) + 17, int(ends[-1]) - 1, int(ends[-1])):
            wanted = rows[:, :position] @ rows[:, :position].T
            np.testing.assert_allclose(gram.before(index, position), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("sigma", "tolerance"), [(0.0, 1e-5), (0.02, 1e-3)])
def test_deep_descendant_equals_explicit_slerps(pool, chromosomes, layout, gram, sigma, tolerance):
    found, candidate = genomes(mutation_sigma=sigma)
    lineage = Lineage([Source(model) for model in pool.headers], layout, gram, out_dtype="float32")
    recipe = lineage.recipe(candidate, found.__getitem__)
    _, got = merged(pool, recipe, chromosomes)
    wanted = explicit(pool, chromosomes, found, candidate.id)
    # with noise, the angles use the expected inner products of the noise
    assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted)
    assert lineage.combination(candidate, found.__getitem__).n_bytes < 4096


class Engine:
    """Live parameters: q/k/v fused, down_proj split by columns."""

    def __init__(self, plan):
        self.parameters = {s.output: torch.full(s.shape, torch.nan, dtype=torch.float32) for s in plan.steps}

    def names(self):
        return list(self.parameters)

    def regions(self, tensor):
        view = self.parameters[tensor]
        half = view.shape[-1] // 2
        if "down_proj" in tensor:
            return [
                Region((slice(None), slice(0, half)), view[:, :half]),
                Region((slice(None), slice(half, None)), view[:, half:]),
            ]
        third = view.shape[0] // 3
        return [Region((slice(0, third),), view[:third]), Region((slice(third, None),), view[third:])]


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sigma", [0.0, 0.02])
def test_fused_plain_and_live_weights_are_bit_identical(pool, chromosomes, layout, gram, out_dtype, sigma):
    found, candidate = genomes(mutation_sigma=sigma)
    lineage = Lineage([Source(model) for model in pool.headers], layout, gram, out_dtype=out_dtype)
    recipe = lineage.recipe(candidate, found.__getitem__)
    assert recipe.pieces.splits_tensors
    fused, _ = merged(pool, recipe, chromosomes)
    plain, _ = merged(pool, recipe, chromosomes, fused=False)
    plan = make_plan(recipe, pool.headers)
    engine = Engine(plan)
    Merger(pool).write(plan, engine)
    for name, tensor in fused.items():
        assert torch.equal(tensor, plain[name]), name
        assert torch.equal(engine.parameters[name], tensor.float()), name


def test_seed_recipes_give_the_seed_models(pool, layout, gram):
    lineage = Lineage([Source(model) for model in pool.headers], layout, gram)
    for index, model in enumerate(pool.headers):
        genome = VectorGenome(tuple(float(index == k) for k in range(3)))
        plan = make_plan(lineage.recipe(Candidate(f"s{index}", genome), {}.__getitem__), pool.headers)
        for name, tensor in Merger(pool).tensors(plan):
            assert torch.equal(tensor, pool.tensor(model, name)), name


def test_recipe_of_different_models_is_refused(pool, layout, gram, tmp_path):
    lineage = Lineage([Source(model) for model in pool.headers], layout, gram)
    found, candidate = genomes()
    recipe = lineage.recipe(candidate, found.__getitem__)
    taller = WeightPool.from_folders([str(write_tiny_llama(tmp_path / f"t{i}", seed=i, n_layers=3)) for i in range(3)])
    smaller = WeightPool.from_folders([str(write_tiny_llama(tmp_path / f"u{i}", seed=i, hidden=16)) for i in range(3)])
    for other, complaint in ((taller, r"layers\.2.* is missing"), (smaller, "the tensor has")):
        renamed = dict(zip(pool.headers, other.headers.values(), strict=True))
        with pytest.raises(RecipeError, match=complaint):
            make_plan(recipe, renamed)


def test_reference_computes_on_the_device_of_its_inputs():
    """As in `evomerge merge --device cuda` of a descendant; the meta device, which has no memory, stands in for the GPU."""
    tensors = [torch.empty(4, 8, device="meta") for _ in range(2)]
    pieces = (Piece(10, (0.5, 0.5), ((3, 0.1),)), Piece(32, (0.2, 0.8)))
    merged = reference("piecewise")(TensorGroup("w", tensors, [{}, {}], None, {}, 0, pieces))
    assert (merged.device.type, merged.shape) == ("meta", (4, 8))


def test_noise_is_normal_and_does_not_depend_on_the_chunking():
    noise = normal_noise(7, "w", 0, 200_000)
    assert abs(noise.mean()) < 0.01
    assert noise.std().item() == pytest.approx(1.0, abs=0.01)
    assert ((noise.abs() < 1).float().mean()).item() == pytest.approx(0.6827, abs=0.005)
    assert torch.equal(noise[1001:5000], normal_noise(7, "w", 1001, 3999))
    counter, zero = np.arange(50_000, dtype=np.uint64), np.zeros(50_000, np.uint64)
    words = np.stack(philox([counter, zero, zero, zero], noise_key(7, "w"), WORD_ROUNDS), axis=1).reshape(-1)
    assert np.array_equal(noise.numpy(), quantiles()[words >> np.uint64(16)])
    assert not torch.equal(noise, normal_noise(8, "w", 0, 200_000))
    assert not torch.equal(noise, normal_noise(7, "v", 0, 200_000))
    table = quantiles().astype(np.float64)
    assert table.mean() == pytest.approx(0.0, abs=1e-9)
    assert table.var() == pytest.approx(1.0, abs=1e-6)
