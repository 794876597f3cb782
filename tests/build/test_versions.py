"""A run records the version of the code it was made with."""

import json
import subprocess
from pathlib import Path

from evomerge.build import parse_config, start_search
from evomerge.build.commands.report import write_report
from evomerge.build.versions import checkout


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=someone", "-c", "user.email=someone@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_revision_of_a_checkout_and_local_changes_are_found(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    code = package / "code.py"
    code.write_text("A = 1\n")
    (tmp_path / "notes.txt").write_text("no code\n")
    assert checkout(package) is None
    git(tmp_path, "init", "--quiet")
    assert checkout(package) is None, "nothing committed yet"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD").strip()
    assert checkout(package) == {"revision": revision, "dirty": False}
    (tmp_path / "notes.txt").write_text("still none\n")
    assert checkout(package) == {"revision": revision, "dirty": False}
    code.write_text("A = 2\n")
    assert checkout(package) == {"revision": revision, "dirty": True}
    git(tmp_path, "checkout", "--quiet", "package")
    (package / "more.py").write_text("B = 1\n")
    assert checkout(package) == {"revision": revision, "dirty": True}


def test_a_package_inside_someone_elses_checkout_has_no_revision(tmp_path: Path) -> None:
    package = tmp_path / "venv" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("A = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "an environment by mistake")
    assert checkout(package) is None


def test_a_run_records_the_versions_it_was_made_with(tmp_path: Path) -> None:
    settings = {
        "evaluation": {"kind": "synthetic"},
        "strategy": "random",
        "cluster": {"kind": "local"},
        "budget": {"evaluations": 2},
        "finals": {"finalists": 0},
    }
    start_search(parse_config(settings, folder=tmp_path), tmp_path / "run")
    resolved = json.loads((tmp_path / "run" / "resolved.json").read_text())
    assert {"python", "evomerge", "torch", "transformers", "lm-eval", "ray"} <= set(resolved["versions"])
    assert resolved["checkout"] == checkout()
    resolved["checkout"] = {"revision": "0123abcd", "dirty": True}
    (tmp_path / "run" / "resolved.json").write_text(json.dumps(resolved))
    assert "; revision 0123abcd, modified</p>" in write_report(tmp_path / "run").read_text()
