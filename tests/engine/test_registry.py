import subprocess
import sys

import pytest

from evomerge.core import EngineError
from evomerge.engine import ENGINES, available_engines, default_engine_kind, engine_environment, make_engine


def test_importing_the_package_does_not_import_torch_or_vllm():
    code = "import sys, evomerge.engine as e; e.default_engine_kind(); print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_engine_kinds_are_refused(tmp_path):
    assert set(available_engines()) <= set(ENGINES) == {"vllm", "transformers"}
    assert default_engine_kind() in available_engines()
    with pytest.raises(EngineError, match=r"unknown engine 'vlm'; did you mean 'vllm'\? Known: vllm"):
        make_engine("vlm", tmp_path)
    with pytest.raises(EngineError, match=r"unknown engine 'x'\. Known: vllm"):
        make_engine("x", tmp_path)


def test_vllm_is_preferred_if_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert default_engine_kind() == "vllm"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else object())
    assert default_engine_kind() == "transformers"
    with pytest.raises(EngineError, match="'vllm': the package vllm is not installed"):
        make_engine("vllm", None)


def test_engine_environment_sets_threads_and_vllm_options():
    for kind in ENGINES:
        assert kind == "vllm" or engine_environment(kind, threads=3)["OMP_NUM_THREADS"] == "3"
    assert engine_environment()["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert engine_environment()["VLLM_NO_USAGE_STATS"] == "1"
    assert engine_environment()["GLOO_SOCKET_IFNAME"] == "lo"


def test_gpu_engine_processes_are_spawned_rather_than_forked(monkeypatch):
    monkeypatch.setattr("evomerge.engine.environment.vllm_targets_cpu", lambda: False)
    assert engine_environment()["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_missing_weights_are_reported(tmp_path):
    from evomerge.core import CheckpointError

    for kind in available_engines():
        with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
            make_engine(kind, tmp_path)
