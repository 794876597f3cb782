"""Building a zoo from a micro recipe with two steps per model: the folders, the cache, and the effect of an interruption."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evomerge.core import EvomergeError
from evomerge.zoo import BaseSettings, ExpertSettings, ModelSettings, ZooSettings, build_zoo
from evomerge.zoo.worker import Job

MICRO = ZooSettings(
    model=ModelSettings(n_layers=1, hidden=16, intermediate=16, n_heads=2, n_kv_heads=1),
    base=BaseSettings(batch_size=4, max_steps=2, warmup_steps=1, cooldown_steps=1, check_every=1),
    experts=(ExpertSettings("reverse", learning_rate=1e-3, max_steps=2, batch_size=4, other_batch_size=4),),
    n_check=5,
    n_score=5,
)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished micro zoo; tests must not change it."""
    return build_zoo(tmp_path_factory.mktemp("micro") / "zoo", seed=5, settings=MICRO).folder


def test_transformers_can_read_the_folders_of_a_zoo(micro: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert leftovers(micro.parent) == ["zoo"]
    assert leftovers(micro) == ["base", "reverse", "zoo.json"]
    for name in ("base", "reverse"):
        model = AutoModelForCausalLM.from_pretrained(micro / name)
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype is torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(micro / name)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
        assert tokenizer.decode(tokenizer("reverse k a t e is")["input_ids"]) == "reverse k a t e is"
        assert (micro / name / "tokenizer.json").read_bytes() == (micro / "base" / "tokenizer.json").read_bytes()


def test_the_same_seed_gives_the_same_bytes_and_another_one_different_weights(micro: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    again = build_zoo(tmp_path / "again", seed=5, settings=MICRO, progress=lines.append)
    assert not again.reused
    assert files(again.folder) == files(micro)
    assert any(line.startswith("reverse: step 2") for line in lines)
    other = build_zoo(tmp_path / "again", seed=6, settings=MICRO)
    assert not other.reused, "a zoo of another seed must be replaced"
    assert leftovers(tmp_path) == ["again"]
    differing = {name for name, content in files(other.folder).items() if files(micro)[name] != content}
    assert differing == {"base/model.safetensors", "reverse/model.safetensors", "zoo.json"}


def test_a_finished_zoo_is_reused_unless_damaged_or_outdated(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evomerge.zoo.build as build

    trained: list[Path] = []

    def remember(folder: Path, *_: object) -> dict[str, dict[str, float]]:
        trained.append(folder)
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}", encoding="utf-8")
        return {"base": {"reverse": 0.0}, "reverse": {"reverse": 0.0}}

    monkeypatch.setattr(build, "_train_all", remember)
    report = build_zoo(micro, seed=5, settings=MICRO)
    assert report.reused
    assert list(report.scores) == ["base", "reverse"]
    assert not trained

    copy = shutil.copytree(micro, tmp_path / "zoo")
    assert build_zoo(copy, seed=5, settings=MICRO).reused
    (copy / "base" / "config.json").write_text("{}", encoding="utf-8")
    assert not build_zoo(copy, seed=5, settings=MICRO).reused
    assert build_zoo(copy, seed=5, settings=MICRO).reused
    assert not build_zoo(copy, seed=5, settings=replace(MICRO, weight_decay=0.02)).reused
    (copy / "zoo.json").write_text("{", encoding="utf-8")
    assert not build_zoo(copy, seed=5, settings=MICRO).reused
    assert len(trained) == 3


def test_an_interrupted_build_leaves_the_old_zoo_unchanged(micro: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(micro, tmp_path / "zoo")

    def interrupt(line: str) -> None:
        if line.startswith("base: step"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_zoo(copy, seed=6, settings=MICRO, progress=interrupt)
    assert files(copy) == files(micro)
    assert leftovers(tmp_path) == ["zoo"]
    with pytest.raises(KeyboardInterrupt):
        build_zoo(tmp_path / "new", seed=6, settings=MICRO, progress=interrupt)
    assert leftovers(tmp_path) == ["zoo"]


def test_remains_of_a_killed_build_are_not_taken_for_a_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evomerge.zoo.build as build

    (tmp_path / ".zoo.building" / "base").mkdir(parents=True)
    (tmp_path / ".zoo.building" / "base" / "half").write_text("", encoding="utf-8")

    def nothing(folder: Path, *_: object) -> dict[str, dict[str, float]]:
        assert list(folder.iterdir()) == []
        return {"reverse": {"reverse": 1.0}}

    monkeypatch.setattr(build, "_train_all", nothing)
    assert not build_zoo(tmp_path / "zoo", settings=MICRO).reused
    assert leftovers(tmp_path) == ["zoo"]


def test_a_folder_that_is_not_a_zoo_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(EvomergeError, match="no zoo"):
        build_zoo(tmp_path, settings=MICRO)
    assert (tmp_path / "thesis.txt").is_file()
    with pytest.raises(EvomergeError, match="negative"):
        build_zoo(tmp_path / "zoo", seed=-1, settings=MICRO)


def test_a_failing_worker_is_reported_with_its_log(tmp_path: Path) -> None:
    broken = replace(MICRO, model=replace(MICRO.model, n_heads=3))
    with pytest.raises(EvomergeError, match=r"training base failed with exit code 1(.|\n)*Error"):
        build_zoo(tmp_path / "zoo", settings=broken)
    assert leftovers(tmp_path) == []


def test_jobs_can_be_passed_on_the_command_line(tmp_path: Path) -> None:
    job = Job("reverse", tmp_path, 3, MICRO)
    assert Job.from_json(job.to_json()) == job
    assert Job.from_json(job.to_json()).settings.fingerprint(3) == MICRO.fingerprint(3)
    assert MICRO.fingerprint(3) != MICRO.fingerprint(4)


def test_the_manifest_lists_every_file(micro: Path) -> None:
    manifest = json.loads((micro / "zoo.json").read_text(encoding="utf-8"))
    assert {*manifest["files"], "zoo.json"} == set(files(micro))
    assert manifest["seed"] == 5
