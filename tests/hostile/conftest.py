"""Fixtures `models` and `refused`: a folder of models, and a check that merging them is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import recipe_of, run_merge

from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.weights.checkpoint.stream import StreamedMerge
from evomerge.weights.mapping import MappedModel


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with models `base`, `a` and `b`."""
    for seed, name in enumerate(("base", "a", "b")):
        write_tiny_llama(tmp_path / name, seed=seed, dtype="float32")
    return tmp_path


@pytest.fixture
def refused(models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refused("part of the message", ...) -> the error message of a merge of the models; by default no weight may be read before it."""

    def check(*parts: str, recipe: dict[str, Any] | None = None, reads_weights: bool = False) -> str:
        def read(*_: object) -> None:
            pytest.fail("a weight was read before metadata was refused")

        before = {path: path.stat().st_mtime_ns for path in models.rglob("*")}
        with monkeypatch.context() as patch:
            if not reads_weights:
                patch.setattr(MappedModel, "_tensor", read)
                patch.setattr(StreamedMerge, "_stored", read)
            with pytest.raises(SystemExit) as ended:
                run_merge(models, patch, recipe or recipe_of())
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert said.startswith("error: ")
        assert "Traceback" not in said
        for part in parts:
            assert part in said
        left = {path for path in models.rglob("*") if path.name != "recipe.yml"}
        assert left <= set(before), "something was left behind"
        return said

    return check
