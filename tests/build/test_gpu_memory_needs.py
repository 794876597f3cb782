"""The GPU memory that an engine and its merges need follows from the models and the configuration."""

import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from evomerge.build import evaluate_model, make_problem, parse_config
from evomerge.build.commands import planning
from evomerge.build.engines import gpu_memory_needs, gpus_per_worker
from evomerge.cli.tables import print_plan
from evomerge.config import SearchConfig
from evomerge.core import ConfigError, EvaluationError
from evomerge.plan import (
    PLACE_BYTES,
    RANK_BYTES,
    RANKED_METHODS,
    MergePlan,
    Region,
    TensorHeader,
    TensorInput,
    TensorStep,
    keeps_ranks,
    read_models,
    statistics_bytes,
)
from evomerge.recipe import method_spec
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task
from evomerge.weights import Merger, WeightPool
from evomerge.weights.fused.statistics import Statistics
from evomerge.weights.fused.steps import fuse, fused_methods


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=2)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "engine", "cluster", "n_slots", "engine_share", "n_sources", "gpus"),
    [
        ("ties", {}, {}, None, 1, 3, 1),
        ("sce", {}, {}, None, 1, 0, 1),
        ("ties", {}, {"gpus_per_worker": 0.5}, None, 1, 3, 0.5),
        ("ties", {"kind": "vllm", "tensor_parallel": 2}, {}, None, 0.5, 1.5, 1),
        ("ties", {"kind": "vllm", "tensor_parallel": 2}, {"gpus_per_worker": 2}, None, 0.5, 1.5, 1),
        ("ties", {}, {}, 6, 3, 3, 1),
        ("ties", {"dtype": "float32"}, {}, None, 2, 3, 1),
    ],
)
def test_gpu_memory_needs(folder, monkeypatch, method, engine, cluster, n_slots, engine_share, n_sources, gpus):
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: None)  # as on a machine where triton works
    monkeypatch.setattr("evomerge.engine.computes_on_cpu", lambda kind: False)
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "method": method,
        "tasks": ["gsm8k"],
        "engine": engine,
        "cluster": cluster,
        "budget": {"evaluations": 10},
    }
    config = parse_config(settings, folder=folder)
    models = read_models({name: (str(folder / name), None) for name in ("base", "a", "b")})
    size = (folder / "base" / "model.safetensors").stat().st_size

    needs = gpu_memory_needs(config, models, n_slots, (method,))

    # the file also has a header, which takes at most a tenth
    assert needs.engine_bytes == pytest.approx(engine_share * size, rel=0.1)
    assert needs.source_bytes == pytest.approx(n_sources * size, rel=0.1)
    assert needs.gpus == gpus


@pytest.mark.parametrize(
    ("processes", "given", "gpus"), [(1, None, 1), (4, None, 4), (1, 0.5, 0.5), (4, 4, 4), (2, 4, 4), (2, 0, 0)]
)
def test_a_worker_gets_a_gpu_for_each_process_of_its_engine(folder, processes, given, gpus):
    assert gpus_per_worker(spread(folder, processes, given)) == gpus


def test_fewer_gpus_than_processes_are_refused_before_a_search_starts(folder):
    with pytest.raises(ConfigError, match=r"gpus_per_worker: 1 is too low for engine.tensor_parallel: 4"):
        make_problem(spread(folder, 4, 1))


def spread(folder: Path, processes: int, gpus: float | None) -> SearchConfig:
    write_toy_task(folder / "toy.yaml", n_items=4)
    settings = {
        "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
        "tasks": ["toy.yaml"],
        "engine": {"kind": "vllm", "tensor_parallel": processes},
        "cluster": {"gpus_per_worker": gpus},
        "budget": {"evaluations": 10},
    }
    return parse_config(settings, folder=folder)


@pytest.mark.parametrize("method", [*RANKED_METHODS, "sce"])
def test_memory_needs_include_ranks(folder, monkeypatch, capsys, method):
    """Two bytes for every element of the two experts, plus one bit for a mask; none for the base. With sce, four bytes for each element of the base, and no GPU."""
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: None)
    write_toy_task(folder / "toy.yaml", n_items=4)
    problem = make_problem(
        parse_config(
            {
                "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
                "method": method,
                "tasks": ["toy.yaml"],
                "budget": {"evaluations": 10},
            },
            folder=folder,
        )
    )
    n_bytes = sum(header.n_bytes for header in problem.headers.values())
    n_elements = sum(tensor.numel() for tensor in load_file(folder / "base" / "model.safetensors").values())
    rank_bytes = 4 * n_elements

    monkeypatch.setattr("evomerge.engine.computes_on_cpu", lambda kind: True)

    needs, sizes = gpu_memory_needs(problem.config, problem.headers, None, (method,)), planning.sizes(problem)

    assert needs.source_bytes == (0 if method == "sce" else n_bytes + rank_bytes)
    assert (sizes.source_bytes, sizes.rank_bytes) == (n_bytes, rank_bytes)
    mask_bytes = 0 if method == "sce" else n_elements // 4
    assert sizes.worker_bytes == n_bytes + rank_bytes + mask_bytes + sizes.engine_bytes
    assert sizes.engine_bytes == 2 * sizes.candidate_bytes, "bfloat16 weights are served in float32 on a CPU"
    print_plan(sizes, [])
    assert f"{rank_bytes / 1e9:.3g} GB ranks" in " ".join(capsys.readouterr().out.split())


def test_memory_needs_cover_all_of_several_methods(folder, monkeypatch):
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: None)
    monkeypatch.setattr("evomerge.engine.computes_on_cpu", lambda kind: False)
    write_toy_task(folder / "toy.yaml", n_items=4)

    def room(*methods: str) -> tuple[float, int, int]:
        """Room for the sources on a GPU, and for ranks and for statistics in CPU memory."""
        settings = {
            "models": {"base": "base", "experts": {"a": "a", "b": "b"}},
            "method": list(methods),
            "tasks": ["toy.yaml"],
            "budget": {"evaluations": 10},
        }
        problem = make_problem(parse_config(settings, folder=folder))
        sizes = planning.sizes(problem)
        needs = gpu_memory_needs(problem.config, problem.headers, None, problem.config.space.methods)
        return needs.source_bytes, sizes.rank_bytes, sizes.statistics_bytes

    n_elements = sum(tensor.numel() for tensor in load_file(folder / "base" / "model.safetensors").values())
    sources, places, ranks = 3 * 2 * n_elements, 4 * n_elements, 2 * 2 * n_elements
    histograms, masks = room("ties")[2], room("della")[2]
    assert histograms > 0 < masks
    assert room("sce") == (0, places, 0)
    assert room("ties", "sce") == (sources, places, histograms), "sce has no GPU kernels"
    # both variants of della keep the same ranks
    assert room("della", "della_linear") == (sources + ranks, ranks, masks)
    assert room("ties", "sce", "della", "della_linear") == (sources + ranks, places + ranks, histograms + masks)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "linear"])
def test_plan_predicts_roughly_what_merges_need(method):
    generator = torch.Generator().manual_seed(0)
    shape = (1024, 1024)
    base = 0.02 * torch.randn(shape, generator=generator)
    tensors = {(name, "w"): (base + 0.001 * torch.randn(shape, generator=generator)).bfloat16() for name in ("a", "b")}
    pool = WeightPool.holding(tensors | {("base", "w"): base.bfloat16()})
    inputs = tuple(TensorInput(name, "w", {"weight": 1.0, "density": 0.5}) for name in ("a", "b"))
    shared = {"lambda": 1.0, "normalize": True, "rescale": method != "ties"}
    step = TensorStep("w", shape, method, inputs, None if method == "linear" else TensorInput("base", "w", {}), shared)
    statistics = Statistics(pool)
    assert fuse(step, statistics) is not None
    plan = MergePlan((step,), 1, 2 << 20, "bfloat16", "float32", 0)
    view = torch.zeros(shape, dtype=torch.bfloat16)
    target = SimpleNamespace(names=lambda: ["w"], regions=lambda name: [Region((slice(None), slice(None)), view)])
    merger = Merger(pool)
    merger.write(plan, target)
    tracemalloc.start()
    merger.write(plan, target)
    _, again = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    header = SimpleNamespace(tensors={"w": TensorHeader("w", shape, "BF16", "model.safetensors", 0, 2 << 20)})
    expected = statistics_bytes((method,), [header, header])

    kept = sum(norms.nbytes for _, norms in statistics._kept_norms.values())
    kept += sum(h._counts.nbytes + h._listed.nbytes for h in statistics._histograms.values())
    if method == "dare_ties":
        assert expected - kept == pytest.approx(again, rel=0.3)
    else:
        assert expected == pytest.approx(kept, rel=0.5)


def test_evaluating_a_recipe_reserves_what_that_recipe_needs(folder, monkeypatch):
    """Whatever the configuration would search."""
    asked = []

    def make_evaluator(settings):
        asked.append(settings)
        raise EvaluationError("enough")

    monkeypatch.setattr("evomerge.build.commands.scoring.make_evaluator", make_evaluator)
    write_toy_task(folder / "toy.yaml", n_items=4)
    own = "parameters: {weight: 1, density: 0.5}"
    (folder / "recipe.yaml").write_text(
        f"merge_method: della\nbase_model: {folder}/base\nmodels: [{{model: {folder}/a, {own}}}, {{model: {folder}/b, {own}}}]\n"
    )
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["toy.yaml"],
        "budget": {"evaluations": 9},
    }
    with pytest.raises(EvaluationError, match="enough"):
        evaluate_model(parse_config(settings, folder=folder), folder / "recipe.yaml")
    assert asked[0]["methods"] == ["della"]
    models = read_models(asked[0]["models"])
    config = SearchConfig.model_validate(asked[0]["config"])
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: None)
    n_bytes = sum(header.n_bytes for header in models.values())
    needs = gpu_memory_needs(config, models, None, tuple(asked[0]["methods"]))
    assert (
        needs.source_bytes > 1.5 * n_bytes
    )  # two bytes per element of both experts, in addition to three bfloat16 models


def test_methods_that_keep_ranks_are_those_that_prune_by_rank():
    tensor = torch.arange(8.0).reshape(2, 4)
    pool = WeightPool.holding({("base", "w"): torch.zeros(2, 4), ("m0", "w"): tensor, ("m1", "w"): tensor.flip(1)})
    shared = {"lambda": 1.0, "normalize": False, "rescale": False, "t": 0.5, "shift": False, "scale": 1.0}
    shared |= {
        "filter_wise": False,
        "nuslerp_flatten": True,
        "normalize_weights": True,
        "eps": 1e-8,
        "max_iter": 10.0,
        "tol": 1e-5,
        "r": 0.1,
        "alpha": 0.2,
        "epsilon": 0.0,
        "select_topk": 0.5,
    }
    own = {"weight": 1.0, "density": 0.5, "epsilon": 0.1, "gamma": 0.01, "scale": 1.0}
    ranked = []
    for method in fused_methods():
        inputs = tuple(TensorInput(f"m{number}", "w", own) for number in range(method_spec(method).min_sources))
        step = TensorStep("w", (2, 4), method, inputs, TensorInput("base", "w", {}), shared)
        form = fuse(step, Statistics(pool))
        kept = [
            prune.ranks if prune.places is None else prune.places
            for _, _, prune in ([] if form is None else form.inputs)
        ]
        if any(ranks is not None for ranks in kept):
            ranked.append(method)
            assert keeps_ranks(step)
            assert kept[0].itemsize == (PLACE_BYTES if method == "sce" else RANK_BYTES)
    assert tuple(ranked) == (*RANKED_METHODS, "sce")


@pytest.mark.parametrize("without", ["triton", "compiler"])
def test_without_kernels_sources_stay_in_cpu_memory(folder, monkeypatch, without):
    monkeypatch.setattr("evomerge.weights.triton.find_spec", lambda name: None if without == "triton" else name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["gsm8k"],
        "budget": {"evaluations": 9},
    }
    models = read_models({"a": (str(folder / "a"), None), "b": (str(folder / "b"), None)})
    assert gpu_memory_needs(parse_config(settings, folder=folder), models, None, "linear").source_bytes == 0
