"""Merges for the tests of the GPU kernels. Requires triton."""

import pytest
import torch
from fused_cases import Views

from evomerge.plan import MergePlan, TensorInput, TensorStep
from evomerge.weights import Merger, WeightPool
from evomerge.weights.triton.batch import TritonBatch


def written(plan, pool, dtype, **options):
    """What the Triton kernels write for `plan`; fails if something else wrote it."""
    merger, target = Merger(pool), Views(plan, dtype, **options)
    launches = []
    launch = TritonBatch._launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonBatch, "_launch", lambda self, *a: (launches.append(a), launch(self, *a))[1])
        patch.setattr("evomerge.weights.fused.batch.FusedBatch.run", None)
        merger.write(plan, target)
    assert launches
    assert target.untouched()
    return target.tensor(plan.steps[0].output)


def della_case(n_models, method="della", *, rescale, normalize=True, levels=0, shape=(30, 97)):
    """A plan of one tensor whose experts are pruned with various densities, and its pool.

    Args:
        n_models: how many experts.
        method: della or della_linear.
        rescale, normalize: as in the recipe.
        levels: number of distinct magnitudes of the deltas; 0 = all different.
        shape: of the tensor.
    """
    edges = [
        (0.0, 0.0),
        (1.0, 0.0),
        (0.5, 0.0),
        (0.5, 0.4999999),
        (1e-6, 5e-7),
        (1 - 1e-6, 5e-7),
        (0.3, 0.2),
        (0.6, 0.1),
    ]
    generator = torch.Generator().manual_seed(n_models)
    tensors = {("base", "w"): torch.randn(shape, generator=generator).bfloat16()}
    inputs = []
    for number in range(n_models):
        density, epsilon = edges[(number + 3) % len(edges)]
        noise = torch.randn(shape, generator=generator)
        if levels:
            noise = (noise * levels).round() / levels
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        tensors[f"m{number}", "w"] = (tensors["base", "w"].float() + noise).to(dtype)
        parameters = {"weight": 0.4 - 0.1 * number, "density": density, "epsilon": epsilon}
        inputs.append(TensorInput(f"m{number}", "w", parameters))
    shared = {"lambda": 0.9, "normalize": normalize, "rescale": rescale}
    step = TensorStep("w", shape, method, tuple(inputs), TensorInput("base", "w", {}), shared)
    return MergePlan((step,), 0, 0, "float32", "float32", 3), WeightPool.holding(tensors)


def two_tensors(n_elements=5000, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name in ("a", "b"):
        base = torch.randn(n_elements, generator=generator)
        tensors["base", name] = base.bfloat16()
        tensors["m", name] = (scale * (base + 0.1 * torch.randn(n_elements, generator=generator))).bfloat16()
    return WeightPool.holding(tensors)


def ties_plan(names, n_elements=5000, dtype="bfloat16", weight=0.7):
    shared = {"lambda": 1.0, "normalize": False, "rescale": False}
    steps = [
        TensorStep(
            name,
            (n_elements,),
            "ties",
            (TensorInput("m", name, {"weight": weight, "density": 0.5}),),
            TensorInput("base", name, {}),
            shared,
        )
        for name in names
    ]
    return MergePlan(tuple(steps), 0, 0, dtype, "float32", 0)
