"""`evomerge doctor` reports where candidates for a GPU engine are merged, that such an engine needs a GPU, and an unsupported vLLM version. The GPU is a stand-in."""

from types import SimpleNamespace

import pytest
import torch

from evomerge.build.commands.doctor import Grade, _engine, examine


@pytest.mark.parametrize("lacking", [None, "triton needs a C compiler"])
def test_the_reason_why_merges_avoid_the_gpu_is_reported(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="G", total_memory=8e10))
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: lacking)
    (finding,) = [finding for finding in examine(tmp_path) if finding.subject == "merging"]
    assert (finding.grade, finding.advice) == ((Grade.NOTE, lacking) if lacking else (Grade.GOOD, ""))


@pytest.mark.parametrize("on_nodes", [False, True])
def test_a_gpu_engine_does_not_run_without_a_gpu(monkeypatch, on_nodes):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(
        "evomerge.build.commands.doctor.installed_version", lambda package: "0.32.0" if package == "vllm" else None
    )
    *_, engine = _engine(on_nodes=on_nodes)
    assert engine.subject == "engine"
    assert engine.grade is (Grade.NOTE if on_nodes else Grade.BAD)
    assert engine.found == "this vllm is built for GPUs, but there is no GPU here"


@pytest.mark.parametrize(("version", "grade"), [("0.33.0", Grade.GOOD), ("0.34.0", Grade.BAD), ("0.3.2", Grade.BAD)])
def test_an_unsupported_vllm_version_is_reported(monkeypatch, version, grade):
    monkeypatch.setattr(
        "evomerge.build.commands.doctor.installed_version", lambda package: version if package == "vllm" else None
    )
    vllm, *_ = _engine(on_nodes=True)
    assert (vllm.grade, vllm.found) == (grade, version)
