"""`evomerge doctor` says where candidates for a GPU's engine are merged. The GPU is a stand-in."""

from types import SimpleNamespace

import pytest
import torch

from evomerge.build.doctor import Grade, examine


@pytest.mark.parametrize("lacking", [None, "triton needs a C compiler"])
def test_what_keeps_merges_off_the_gpu_is_named(monkeypatch, tmp_path, lacking):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="G", total_memory=8e10))
    monkeypatch.setattr("evomerge.weights.triton.missing", lambda: lacking)
    (finding,) = [finding for finding in examine(tmp_path) if finding.subject == "merging"]
    assert (finding.grade, finding.advice) == ((Grade.NOTE, lacking) if lacking else (Grade.GOOD, ""))
