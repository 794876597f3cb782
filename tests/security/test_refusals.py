"""Data that would run code if a careless program read it, and secrets, which must not be written anywhere."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from evomerge.core import CheckpointError, ConfigError, EvomergeError
from evomerge.plan import read_model_header
from evomerge.recipe import read_recipe
from evomerge.testing.tiny_models import write_tiny_llama


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self._mark),))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickled_checkpoint_is_refused_and_not_read(tmp_path: Path, mark: Path, name: str) -> None:
    folder = tmp_path / "model"
    write_tiny_llama(folder, seed=0)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(CheckpointError, match="pickle"):
        read_model_header(folder)
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.mkdir", "!!python/module:os"])
def test_yaml_tags_are_refused_in_configurations_and_recipes(tmp_path: Path, mark: Path, tag: str) -> None:
    from evomerge.build import load_config

    path = tmp_path / "file.yaml"
    path.write_text(f"merge_method: {tag} [{mark}]\n")
    for read in (load_config, read_recipe):
        with pytest.raises(EvomergeError, match=r"file\.yaml"):
            read(path)
    with pytest.raises(ConfigError, match="--set"):
        load_config(_synthetic(tmp_path), [f"name={tag} [{mark}]"])
    assert not mark.exists()


def _synthetic(folder: Path) -> Path:
    path = folder / "synthetic.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "strategy": "random",
                "evaluation": {"kind": "synthetic", "function": "sphere"},
                "cluster": {"kind": "local"},
                "budget": {"evaluations": 5},
                "finals": {"finalists": 1},
            }
        )
    )
    return path


def test_secrets_are_not_written_into_a_run(tmp_path: Path) -> None:
    planted = "s3cr3t-0123456789abcdef"
    names = ("HF_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "OPENAI_API_KEY")
    result = subprocess.run(
        [sys.executable, "-c", "from evomerge.cli import main; main()", "search", str(_synthetic(tmp_path)), "--run-dir", str(tmp_path / "run")],
        env={**os.environ, **dict.fromkeys(names, planted)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert planted not in result.stdout + result.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) >= 6
    for path in written:
        assert planted.encode() not in path.read_bytes(), path


def test_a_local_search_opens_no_port(tmp_path: Path) -> None:
    """Checked by tracing system calls if strace is installed: no socket is bound or listened on."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    log = tmp_path / "calls"
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", "search", str(_synthetic(tmp_path))]
    subprocess.run(
        [strace, "-f", "-e", "trace=bind,listen", "-o", str(log), *command, "--run-dir", str(tmp_path / "run")],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert "AF_INET" not in log.read_text()
    assert "listen(" not in log.read_text()
