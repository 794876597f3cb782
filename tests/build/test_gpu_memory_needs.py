"""What an engine and its merges need of a GPU follows from the models and the configuration."""

from pathlib import Path

import pytest

from evomerge.build import parse_config
from evomerge.build.evaluators import gpu_memory_needs
from evomerge.plan import read_models
from evomerge.testing.tiny_models import write_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, n_layers=2)
    return tmp_path


@pytest.mark.parametrize(
    ("method", "engine", "cluster", "n_slots", "engine_share", "n_sources", "gpus"),
    [
        ("ties", {}, {}, None, 1, 3, 1),
        ("della", {}, {}, None, 1, 0, 1),
        ("ties", {}, {"gpus_per_worker": 0.5}, None, 1, 3, 0.5),
        ("ties", {"kind": "vllm", "tensor_parallel": 2}, {}, None, 0.5, 3, 1),
        ("ties", {"kind": "vllm", "tensor_parallel": 2}, {"gpus_per_worker": 2}, None, 0.5, 3, 1),
        ("ties", {}, {}, 6, 3, 3, 1),
    ],
)
def test_needs(folder, monkeypatch, method, engine, cluster, n_slots, engine_share, n_sources, gpus):
    monkeypatch.setattr("evomerge.weights.triton.find_spec", lambda name: name)  # as where triton is installed
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

    needs = gpu_memory_needs(config, models, n_slots)

    # the file also has a header, of a tenth at most
    assert needs["engine_bytes"] == pytest.approx(engine_share * size, rel=0.1)
    assert needs["source_bytes"] == pytest.approx(n_sources * size, rel=0.1)
    assert needs["gpus"] == gpus


def test_without_triton_sources_stay_in_the_cpus_memory(folder, monkeypatch):
    monkeypatch.setattr("evomerge.weights.triton.find_spec", lambda name: None)
    settings = {
        "models": {"experts": {"a": "a", "b": "b"}},
        "method": "linear",
        "tasks": ["gsm8k"],
        "budget": {"evaluations": 9},
    }
    models = read_models({"a": (str(folder / "a"), None), "b": (str(folder / "b"), None)})
    assert gpu_memory_needs(parse_config(settings, folder=folder), models, None)["source_bytes"] == 0
