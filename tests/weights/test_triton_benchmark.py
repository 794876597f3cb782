"""benchmarks/merge_gpu.py runs under Triton's interpreter, keeps its other rows if one fails, and notices wrong bits.

`make triton-test` runs these tests, like those of test_triton_kernels.py.
"""

import argparse
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton stays out of this environment; `make triton-test` runs this")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run here only under TRITON_INTERPRET=1: `make triton-test`", allow_module_level=True)

import evomerge.weights.triton.batch as triton_batch
from evomerge.plan import TensorInput
from evomerge.weights.triton.batch import TritonBatch, obstacle
from evomerge.weights.triton.resident import ResidentSources
from evomerge.weights.windows import whole

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "merge_gpu.py"


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("merge_gpu", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "merge_gpu", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(triton_batch, "_kernel", triton_batch._kernel)  # the benchmark replaces it
    return module


def test_benchmark_runs(tmp_path):
    methods = ["linear", "ties", "dare_ties", "slerp", "della"]
    command = [
        sys.executable,
        BENCHMARK,
        "--interpret",
        "--methods",
        ",".join(methods),
        "--json",
        tmp_path / "rows.json",
    ]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("equal")] == methods
    found = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["method"], row["bits_equal"], row["target_met"]) for row in found["rows"]] == [
        (method, True, None) for method in methods
    ]
    assert found["date"]
    assert "interpreter" in found["gpu"]


@pytest.mark.parametrize(("model", "n_parameters"), [("8b", 8.03e9), ("experts", 30.53e9)])
def test_host_benchmark_measures_from_recipe_to_launches(tmp_path, model, n_parameters):
    file = tmp_path / "rows.json"
    options = ["--model", model, "--methods", "ties", "--rounds", "2", "--json", file]
    subprocess.run([sys.executable, BENCHMARK.with_name("merge_host.py"), *options], check=True, capture_output=True)
    (row,) = json.loads(file.read_text())["rows"]
    assert 0 < row["first_ms"] < row["all_ms"]
    assert row["gpu_ms"] == pytest.approx(1e3 * 10 * n_parameters / (0.85 * 4.8e12), rel=1e-3)


def test_failing_method_does_not_affect_other_benchmark_rows(benchmark, monkeypatch, tmp_path):
    options = argparse.Namespace(
        interpret=True, tiny=False, layers=1, rounds=1, methods="linear,ties,slerp", json=tmp_path / "rows.json"
    )
    measure = benchmark.measure

    def failing(row, *arguments):
        if row == "ties":
            raise RuntimeError("out of luck")
        return measure(row, *arguments)

    monkeypatch.setattr(benchmark, "measure", failing)
    assert not benchmark.run(options, "cpu")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["method"], row.get("error")) for row in rows] == [
        ("linear", None), ("ties", "RuntimeError: out of luck"), ("slerp", None)
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["bits", "device"])
def test_benchmark_notices_work_not_done_by_the_gpu(benchmark, monkeypatch, tmp_path, wrong):
    options = argparse.Namespace(
        interpret=True, tiny=False, layers=1, rounds=1, methods="linear", json=tmp_path / "rows.json"
    )
    if wrong == "bits":
        monkeypatch.setattr(TritonBatch, "run", lambda self, groups: answer_nothing(self.device))
    else:
        monkeypatch.setattr(ResidentSources, "free_bytes", lambda self: 0.0)
    assert not benchmark.run(options, "cpu")
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["bits_equal"] is False if wrong == "bits" else "no kernel was launched" in row["error"]


def answer_nothing(device):
    """A launch that computes nothing."""
    obstacle(device)


def test_benchmark_tensors_have_their_own_memory(benchmark):
    shapes = benchmark.TINY.tensors(2)
    pool = benchmark.make_pool(shapes)
    resident = ResidentSources(pool, torch.device("cpu"))
    entries = [
        (TensorInput(model, name, {}), whole(math.prod(shape)))
        for model in ("base", "expert0")
        for name, shape in shapes.items()
    ]
    resident.hold(entries)
    assert len({resident.copy(*entry).address for entry in entries}) == len(entries)


@pytest.mark.parametrize(
    ("row", "n_bytes"),
    [("linear", 8), ("ties", 10), ("slerp", 6), ("della", 16), ("dare_ties", 10)],
)
def test_bytes_per_element_are_counted(benchmark, row, n_bytes):
    assert benchmark.bytes_moved(row, 1) == n_bytes


def test_benchmark_reports_that_it_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCHMARK], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr
