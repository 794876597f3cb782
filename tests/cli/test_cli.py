"""The command line as a user sees it: help, exit codes, and one clear message for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch.cuda import is_available

from evomerge.testing.tiny_models import write_tiny_llama
from evomerge.testing.tiny_tasks import write_toy_task

COMMANDS = [
    [],
    ["search"],
    ["resume"],
    ["front"],
    ["summary"],
    ["report"],
    ["export"],
    ["merge"],
    ["eval"],
    ["validate"],
    ["plan"],
    ["init"],
    ["watch"],
    ["doctor"],
    ["zoo"],
    ["zoo", "build"],
]


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "evomerge", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)


def test_commands_run_garbage_collection_rarely() -> None:
    line = "import gc, sys; from evomerge.cli import main; import atexit; atexit.register(lambda: print(gc.get_threshold())); main()"
    command = [sys.executable, "-c", line, "--version"]
    assert "(50000, " in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout
    assert [line for line in result.stdout.splitlines() if "<bool>" in line and "--help" not in line] == []


def test_warnings_from_the_hub_are_printed_once() -> None:
    code = (
        "import contextlib, sys\nsys.argv = ['evomerge', '--version']\nfrom evomerge.cli import main\n"
        "with contextlib.suppress(SystemExit):\n    main()\n"
        "from huggingface_hub.utils import logging\nlogging.get_logger('huggingface_hub.utils').warning('retrying')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr.count("retrying") == 1


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nsys.argv = ['evomerge', '--help']\nfrom evomerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'vllm', 'ray', 'lm_eval', 'transformers', 'datasets', 'numpy.testing', 'pymoo', 'cma', 'optuna'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "heavy: []" in result.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["merge", "none.yml", "out"], "none.yml: no such file"),
        (["merge", ".", "out"], ".: is a folder; expected a file"),
        (["merge", "binary.yml", "out"], "binary.yml: is not UTF-8 text (byte 0xff at position 1)"),
        (["validate", "."], ".: is a folder; expected a file"),
        (["validate", "recipe.yml"], "recipe.yml: this is a recipe, not a search configuration"),
        (["merge", "search.yml", "out"], "search.yml: is a search configuration, not a recipe"),
        (["merge", "recipe.yml", "out"], "model 'org/a' is not a folder (tried"),
        (["export", "recipe.yml"], "recipe.yml: not a run directory"),
        (["report", "recipe.yml"], "recipe.yml: not a run directory"),
        (["resume", "recipe.yml"], "recipe.yml: not a run directory"),
        (["watch", "recipe.yml", "--once"], "recipe.yml: not a run directory"),
        (["zoo", "build", "-o", "binary.yml/zoo"], "binary.yml: cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_unsuitable_files_are_reported_in_plain_words(
    command: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary.yml").write_bytes(b"a\xff")
    (tmp_path / "recipe.yml").write_text("merge_method: passthrough\nmodels: [{model: org/a}]\n")
    (tmp_path / "search.yml").write_text("needs: much\ntasks: [gsm8k]\n")
    monkeypatch.chdir(tmp_path)
    result = run(*command)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Errno" not in result.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Valid models, a task and a valid configuration."""
    folder = tmp_path_factory.mktemp("project")
    for index, name in enumerate(("base", "a", "b")):
        write_tiny_llama(folder / "models" / name, seed=index)
    write_tiny_llama(folder / "models" / "wide", seed=5, hidden=64)
    write_tiny_llama(folder / "models" / "nan", seed=6)
    shard = folder / "models" / "nan" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    write_toy_task(folder / "toy.yaml", n_items=4)
    (folder / "search.yaml").write_text(
        yaml.safe_dump(
            {
                "models": {"base": "models/base", "experts": {"a": "models/a", "b": "models/b"}},
                "method": "ties",
                "tasks": ["toy.yaml"],
                "engine": {"kind": "transformers"},
                "cluster": {"kind": "local"},
                "budget": {"evaluations": 12},
            }
        )
    )
    return folder


def test_validate_says_what_would_be_searched(project: Path) -> None:
    result = run("validate", project / "search.yaml")
    assert result.returncode == 0, result.stderr
    assert "4 parameters" in result.stdout
    assert "weight[a] in [0, 1.5]" in result.stdout
    assert "toy (maximize acc)" in result.stdout


def test_validate_loads_the_items_on_request(project: Path) -> None:
    result = run("validate", project / "search.yaml", "--items")
    assert result.returncode == 0, result.stderr
    assert "items       toy: 4 search, 4 select, 4 report; longest 15 tokens" in result.stdout
    assert "candidate   8 requests on search, 116 prompt tokens\n" in result.stdout
    short = run("validate", project / "search.yaml", "--items", "--set", "engine.max_model_len=14")
    assert short.returncode == 2
    assert "context and continuation take 15 tokens, but the engine has room for 14" in short.stderr


def test_a_price_without_times_is_refused(project: Path) -> None:
    refused = run("plan", project / "search.yaml", "--price", "2")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--price: costs are computed from times; also give --from or --seconds" in refused.stderr
    assert run("plan", project / "search.yaml", "--price", "2", "--seconds", "3").returncode == 0


def test_validate_notes_items_longer_than_the_models_positions(project: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        write_tiny_llama(tmp_path / "models" / name, seed=1, max_position_embeddings=12)
    for name in ("search.yaml", "toy.yaml", *(f"toy.{split}.jsonl" for split in ("search", "select", "report"))):
        (tmp_path / name).write_text((project / name).read_text())
    result = run("validate", tmp_path / "search.yaml", "--items")
    assert "config.json allows 12 positions, fewer than the longest item needs" in result.stdout


def test_validate_notes_when_nothing_would_be_searched(project: Path) -> None:
    result = run("validate", project / "search.yaml", "--set", "budget.evaluations=9")
    assert result.returncode == 0, result.stderr
    assert "9 is used up by the 9 baselines" in result.stdout


def test_validate_notes_too_few_candidates_for_the_parameters(project: Path) -> None:
    groups = ["--set", "space.layer_groups=2", "--set", "space.module_groups=[attention, rest]"]
    few = run("validate", project / "search.yaml", *groups, "--set", "budget.evaluations=104")
    assert "95 candidates are few for 16 parameters" in few.stdout
    assert "or a budget of at least 105" in few.stdout
    assert "few for" not in run("validate", project / "search.yaml", *groups, "--set", "budget.evaluations=105").stdout


def test_help_shows_defaults() -> None:
    assert "(default: runs/<name>-<time>-<pid>)" in " ".join(run("search", "--help").stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (["budgets.evaluations=3"], ["budgets: unknown key; did you mean 'budget'?"]),
        (["budget.evaluations=0"], ["budget.evaluations: must be greater than or equal to 1 (got 0)"]),
        (["models.experts.c=models/none"], ["models/none: no such model folder"]),
        (["models.experts.c=models/wide"], ["wide"]),
        (["tasks=[toy.yaml, none.yaml]"], ["no such task file", "none.yaml"]),
        (["tasks=[gsm8kk]"], ["lm-eval has no task 'gsm8kk'; did you mean 'gsm8k'"]),
        (["tasks=[mmluu]"], ["lm-eval has no task 'mmluu'; did you mean 'mmlu'"]),
        (["tasks=[{task: toy.yaml, splits: {search: train}}]"], ["no split 'train' for search; it has report"]),
        (["tasks=[{task: toy.yaml, splits: {search: report}}]"], ["nothing left for report", "finals: {finalists: 0}"]),
        (["models.base=models/none", "needs=a base"], ["what this configuration needs: a base"]),
        (["method=tise"], ["unknown merge method 'tise'; did you mean 'ties'?"]),
        (["strategy=cma-es"], ["cma_es"]),
        (["strategy={name: cma_es, sigma: 1}"], ["sigma", "sigma0"]),
        (["objectives=[toi]"], ["no task produces 'toi'"]),
        (["space={method: ties, layer_groups: 9}"], ["2 layers cannot be divided into 9 groups"]),
        (["models.base=models/none", "tasks=[none.yaml]"], ["2 problems", "models/none", "none.yaml"]),
        (
            ["method=tise", "strategy={name: cma_es, sigma: 1}", "tasks=[none.yaml]"],
            ["3 problems", "none.yaml", "'tise'", "'sigma'"],
        ),
        (["method=tise", "strategy=cma-es"], ["2 problems", "'tise'", "'cma-es'"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("command", ["validate", "search"])
def test_invalid_configurations_give_one_clear_message(
    project: Path, tmp_path: Path, command: str, changes: list[str], messages: list[str]
) -> None:
    config = project / "search.yaml"
    if changes[0].startswith("space="):
        config = project / "without-method.yaml"
        settings = yaml.safe_load((project / "search.yaml").read_text())
        del settings["method"]
        config.write_text(yaml.safe_dump(settings))
    options = [part for change in changes for part in ("--set", change)]
    where = ["--run-dir", tmp_path / "run"] if command == "search" else []
    result = run(command, config, *options, *where)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for message in messages:
        assert message in result.stderr
    assert len(result.stderr.splitlines()) < 24, "the message should fit on one screen"
    assert not (tmp_path / "run").exists(), "an unfinished run directory was left behind"


def test_a_nan_in_a_shard_is_found_before_anything_starts(project: Path, tmp_path: Path) -> None:
    result = run(
        "search", project / "search.yaml", "--run-dir", tmp_path / "run", "--set", "models.experts.c=models/nan"
    )
    assert result.returncode == 2, result.stdout + result.stderr
    assert "model.layers.1.mlp.up_proj.weight" in result.stderr
    assert "contains nan" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["front", "nowhere"], "not a run directory"),
        (["front", "nowhere", "--json", "--csv"], "--json and --csv: give only one of them"),
        (
            ["plan", "nowhere.yaml", "--from", "nowhere", "--seconds", "2"],
            "--from and --seconds: give only one of them",
        ),
        (["plan", "nowhere.yaml", "--seconds", "inf"], "--seconds inf: expected a number above 0"),
        (["watch", "nowhere", "--once", "--every", "3"], "--once and --every: give only one of them"),
        (
            ["search", "nowhere.yaml", "--address", "auto", "--set", "cluster.address=x:1"],
            "--address and --set cluster.address: give only one of them",
        ),
        (
            ["merge", "nowhere.yaml", "out", "--cuda", "--device", "cpu"],
            "--cuda and --device cpu: give only one of them",
        ),
        (["merge", "nowhere.yaml", "out", "--dtype", "bf16"], "unknown dtype 'bf16'; known: bfloat16, float16"),
        (["resume", "nowhere"], "not a run directory"),
        (["export", "nowhere"], "not a run directory"),
        (["search", "nowhere.yaml"], "no such configuration file"),
        (["merge", "nowhere.yaml", "out"], "nowhere.yaml"),
        (["eval", "nowhere", "--config", "nowhere.yaml"], "no such model folder or recipe file"),
        (["merges"], "No such command"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_missing_files_and_wrong_arguments_are_reported(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_merge_accepts_mergekit_command_lines_and_standard_input(project: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    models = [{"model": str(project / "models" / name), "parameters": {"weight": 0.5}} for name in "ab"]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
    usual = ("--copy-tokenizer", "--allow-crimes", "--lazy-unpickle", "--low-cpu-memory", "--out-shard-size", "1B")
    usual += ("--clone-tensors", "--quiet", "-vv", "--lora-merge-cache", tmp_path / "adapted", "--no-low-cpu-memory")
    usual += ("--write-threads", "4", "-j", "2", "--read-to-gpu", "--multi-gpu", "--device", "auto")
    first = run("merge", recipe, tmp_path / "first", *usual)
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'first'}\n"), first.stderr
    second = run("merge", "-", tmp_path / "second", stdin=recipe.read_text())
    assert second.returncode == 0, second.stderr
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert contents[0] == contents[1]
    # options that ask for a GPU do so even on a machine without one
    for asked in (("--cuda",), ("--gpu-rich",), ("--cuda", "--device", "cuda:0")):
        asked_for = run("merge", recipe, tmp_path / "third", "--overwrite", *asked)
        assert asked_for.returncode == (0 if is_available() else 2)


def test_a_search_from_start_to_merged_model(project: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    result = run("search", project / "search.yaml", "--run-dir", directory)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "report split" in result.stdout
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["evaluations"] == 12
    assert set(summary["splits"]["report"]["sources"]) == {"base", "a", "b"}

    again = run("search", project / "search.yaml", "--run-dir", directory)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    refused = run("resume", directory, "--set", "seed=3")
    assert refused.returncode == 2
    assert "can be changed when a run is resumed" in refused.stderr

    shown = run("summary", directory, "--json")
    assert json.loads(shown.stdout) == summary
    front = run("front", directory, "--json")
    assert json.loads(front.stdout)["members"]
    assert run("front", directory, "--csv").stdout.startswith("id,toy,toy_stderr\n")
    assert run("export", directory, "--pick", "best", "-o", tmp_path / "best.yaml").returncode == 0
    refused = run("export", directory, "--pick", "knee", "-o", tmp_path / "best.yaml")
    assert refused.returncode == 2
    assert "best.yaml: already exists; choose another file, or overwrite it (--overwrite)" in refused.stderr
    assert run("export", directory, "--overwrite", "-o", tmp_path / "best.yaml").returncode == 0
    for place in ("-", "/dev/stdout"):
        piped = run("export", directory, "-o", place)
        assert piped.stdout == (tmp_path / "best.yaml").read_text()
        assert "ties of 3 models" in piped.stderr
    assert run("export", directory, "--pick", "id:99").returncode == 2
    merged = run("merge", tmp_path / "best.yaml", tmp_path / "merged")
    assert merged.returncode == 0, merged.stderr
    refused = run("merge", tmp_path / "best.yaml", tmp_path / "merged")
    assert refused.returncode == 2

    scored = run("eval", tmp_path / "merged", "--config", directory, "--split", "report", "--json", "--show", "2")
    assert scored.returncode == 0, scored.stderr
    answer = json.loads(scored.stdout)
    assert answer["scores"]["toy"] == summary["splits"]["report"]["best"]["toy"]
    assert answer["n_items"]["toy"] == answer["cost"]["items"] > 0
    assert [item["number"] for item in answer["items"]["toy"]] == [0, 1]
    assert all(item["prompt"] and item["answers"] and item["target"] for item in answer["items"]["toy"])
    other = run("eval", tmp_path / "merged", "--config", directory, "--set", "tasks=[nowhere.yaml]")
    assert f"no such task file: {Path.cwd() / 'nowhere.yaml'}" in other.stderr, (
        "a relative path given now should start at the current folder"
    )
