"""docs/cluster.md: its files parse and fit their schemas, its commands and options exist. The clusters themselves are not here to try."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|bash)\n(.*?)```", DOCUMENT, flags=re.DOTALL)
SCRIPTS = [text for language, text in BLOCKS if language == "bash"]
FILES = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]


def commands(program: str) -> list[list[str]]:
    """Every use of a program, as words after its name; also inside YAML and after options of other programs."""
    text = "\n".join([*SCRIPTS, *(text for language, text in BLOCKS if language == "yaml")]).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        match = re.search(rf"(?:^|[\s/]){program} ((?:[a-z]|--).*)", line)
        if match and not line.strip().startswith(("#", "name:")):
            words = shlex.split(match.group(1).split(" &")[0].split("   #")[0], comments=True)
            found.append(words[: words.index("--")] if "--" in words else words)
    return found


def check(root: Any, words: list[str]) -> None:
    """Whether these options exist for this command (of click, or of typer's own copy of it)."""
    command = root.commands[words[0]]
    if hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in known, (words[0], word, sorted(known))


@pytest.mark.parametrize("words", commands("evomerge"), ids=" ".join)
def test_evomerge_commands_exist(words: list[str]) -> None:
    from evomerge.cli.app import app

    check(typer.main.get_command(app), words)


@pytest.mark.parametrize("words", commands("ray"), ids=" ".join)
def test_ray_commands_exist(words: list[str]) -> None:
    from evomerge.cluster.ray_session import keep_to_this_machine

    keep_to_this_machine()  # Ray reads its settings on import, and later tests of this process start a cluster
    from ray.scripts.scripts import cli

    check(cli, words)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda text: text.splitlines()[0][:40])
def test_scripts_are_valid_shell(script: str) -> None:
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=30)


def _of(key: str) -> dict[str, Any]:
    return next(content for content in FILES if key in content)


def test_the_cluster_section_is_valid() -> None:
    from evomerge.build import parse_config

    settings = {"evaluation": {"kind": "synthetic"}, "budget": {"evaluations": 1}, "cluster": _of("cluster")["cluster"]}
    parse_config(settings, folder=Path("/"))


def test_the_ray_cluster_file_fits_rays_schema() -> None:
    import importlib.util

    import jsonschema

    # Importing Ray here would fix its settings for every later test of the process.
    package = importlib.util.find_spec("ray")
    assert package is not None
    assert package.origin is not None
    schema = json.loads((Path(package.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(_of("cluster_name"), schema)


def test_the_kuberay_file_has_the_parts_of_a_ray_job() -> None:
    job = _of("apiVersion")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes
        assert set(pod["containers"][0]["resources"]) == {"limits"}


def test_rays_authentication_is_on_wherever_it_is_started() -> None:
    assert DOCUMENT.count("RAY_AUTH_MODE") >= 6
