"""The plugin shown in docs/extending.md, installed and used as described there."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import evomerge

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files shown on the page, and what an installer makes of the entry point."""
    for name, content in re.findall(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    installed = tmp_path / "one_plus_one-1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    for group, points in project["entry-points"].items():
        (installed / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; "
    return subprocess.run(
        [sys.executable, "-c", code + arguments[0], *arguments[1:]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_plugin_passes_its_tests(folder: Path) -> None:
    done = run(folder, "import pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'test_one_plus_one.py']))")
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_plugin_can_be_used_in_a_search(folder: Path) -> None:
    command = re.search(r"`evomerge (search \S+ --set strategy=\S+)`", TEXT)
    assert command is not None
    _, config, *options = command[1].split()
    more = ["--set", "budget.evaluations=30", "--run-dir", "run"]
    done = run(folder, "from evomerge.cli import main; main()", "search", str(ROOT / config), *options, *more)
    assert done.returncode == 0, done.stderr
    rows = evomerge.open_run(folder / "run").records()
    assert sum(row["id"].startswith("c") for row in rows) >= 20


def test_every_package_is_in_the_table() -> None:
    packages = {path.parent.name for path in (ROOT / "evomerge").glob("*/__init__.py")}
    named = {name for row in re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == packages
