"""Which tensors are compared to decide whether models are related."""

from pathlib import Path

from evomerge.plan import read_model_header
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights.kinship import _sample


def test_first_middle_and_last_layer_are_compared_in_any_file_order(tmp_path: Path) -> None:
    header = read_model_header(write_tiny_llama(tmp_path / "a", seed=0, n_layers=13))
    in_file = [name for name in header.tensors if "q_proj" in name]
    assert in_file != sorted(in_file, key=lambda name: int(name.split(".")[2])), "layer 10 comes before layer 2"
    assert [int(name.split(".")[2]) for name in _sample({"a": header})] == [0, 6, 12]
