"""Hub models in this machine's huggingface_hub cache are found by their hub names."""

from pathlib import Path

import pytest
import yaml

from evomerge.build.commands.starting import write_first_config
from evomerge.config import read_config
from evomerge.core import CheckpointError, RecipeError, cached_model, model_name
from evomerge.plan import read_model_header
from evomerge.recipe import read_recipe, read_recipe_file
from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task
from evomerge.weights import merge_file_to_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with acme/a and acme/b, whose files are links to `blobs`, in huggingface_hub's layout."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        folder = tmp_path / "hf" / "hub" / f"models--acme--{name}"
        write_tiny_llama(folder / "blobs", seed=seed)
        snapshot = folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        for file in (folder / "blobs").iterdir():
            (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hf" / "hub"


def test_names_and_revisions_are_resolved_to_snapshots(cache: Path) -> None:
    snapshot = cache / "models--acme--a" / "snapshots" / COMMIT
    assert cached_model("acme/a") == cached_model("acme/a", "main") == cached_model("acme/a", COMMIT) == snapshot
    assert read_model_header(snapshot).n_layers > 0
    assert cached_model("acme/none") is cached_model("acme/a", "v2") is None
    assert cached_model("../hub/models--acme--a") is cached_model("a") is cached_model("acme/a", "../main") is None
    assert model_name(str(snapshot)) == "acme/a"
    assert model_name("/models/acme/a") == "a"


def test_recipes_may_name_cached_models(cache: Path, tmp_path: Path) -> None:
    models = [
        {"model": "acme/a"},
        {"model": {"model": {"path": "acme/b", "revision": COMMIT}}, "parameters": {"weight": 0.5}},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": "acme/a", "models": models, "dtype": "float32"}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    snapshots = [str(cache / f"models--acme--{name}" / "snapshots" / COMMIT) for name in "ab"]
    assert list(read_recipe(tmp_path / "r.yml").models()) == snapshots
    merge_file_to_folder(read_recipe_file(tmp_path / "r.yml"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- acme/a\n- acme/b\n" in card
    assert str(cache) not in card
    (tmp_path / "acme" / "a").mkdir(parents=True)
    assert read_recipe(tmp_path / "r.yml").base == str(tmp_path / "acme" / "a"), (
        "a folder of that name takes precedence over the cache"
    )
    recipe["base_model"] = "acme/c"
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RecipeError, match=r"'acme/c' is not a folder .* and not in the hub's cache; `hf download"):
        read_recipe(tmp_path / "r.yml")


def test_recipes_may_name_models_below_home(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cache))
    models = [{"model": "~/models--acme--a/blobs", "parameters": {"weight": 1}}]
    (tmp_path / "r.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    assert read_recipe(tmp_path / "r.yml").models() == (str(cache / "models--acme--a" / "blobs"),)


def test_configurations_may_name_cached_models(cache: Path, tmp_path: Path) -> None:
    write_toy_task(tmp_path / "toy.yaml", n_items=2)
    write_first_config(tmp_path / "s.yaml", ["acme/a", "acme/b"], base=None, tasks=[str(tmp_path / "toy.yaml")])
    assert yaml.safe_load((tmp_path / "s.yaml").read_text())["models"]["experts"] == {"a": "acme/a", "b": "acme/b"}
    models = read_config(tmp_path / "s.yaml").models
    assert models is not None
    assert models.experts["a"].path == str(cache / "models--acme--a" / "snapshots" / COMMIT)
    with pytest.raises(CheckpointError, match="no such model folder"):
        write_first_config(tmp_path / "t.yaml", ["acme/a", "acme/c"], base=None, tasks=())


def test_cache_is_not_consulted_for_existing_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consulting it would import huggingface_hub."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    asked: list[str] = []
    monkeypatch.setattr("evomerge.recipe.files.cached_model", asked.append)
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels: [{model: ./a}, {model: ./b}]\nparameters: {weight: 1}\n"
    )
    assert len(read_recipe(tmp_path / "r.yml").models()) == 2
    assert not asked
