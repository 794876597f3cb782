"""docs/cluster.md: its files parse and fit their schemas, and its commands and options exist. The Slurm script runs with
stand-ins for Slurm, Ray and evomerge, as no such clusters are available here."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer.main
import yaml

DOCUMENT = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(yaml|bash)\n(.*?)```", DOCUMENT, flags=re.DOTALL)
SCRIPTS = [text for language, text in BLOCKS if language == "bash"]
FILES = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]


def commands(program: str) -> list[list[str]]:
    """Every use of a program, as the words after its name; also inside YAML and after options of other programs."""
    text = "\n".join([*SCRIPTS, *(text for language, text in BLOCKS if language == "yaml")]).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        match = re.search(rf"(?:^|[\s/]){program} ((?:[a-z]|--).*)", line)
        if match and not line.strip().startswith(("#", "name:")):
            words = shlex.split(match.group(1).split(" &")[0].split("   #")[0], comments=True)
            found.append(words[: words.index("--")] if "--" in words else words)
    return found


def check(root: Any, words: list[str]) -> None:
    """Checks that these options exist for this command (of click, or of typer's own copy of it)."""
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


def test_rays_authentication_is_on_wherever_ray_is_started() -> None:
    """For a start by hand and in the Slurm script it is exported first."""
    assert sum("export RAY_AUTH_MODE=token" in text for text in SCRIPTS) == 2
    file = _of("cluster_name")
    starts = [line for key in ("head", "worker") for line in file[f"{key}_start_ray_commands"] if "ray start" in line]
    assert [line.split()[0] for line in starts] == ["RAY_AUTH_MODE=token"] * 2


def test_the_ray_cluster_file_starts_as_many_workers_as_it_lists() -> None:
    """Ray's newer autoscaler counts the head as one of them; and `ray down` stops nothing if `ray` is not on the PATH."""
    file = _of("cluster_name")
    assert file["max_workers"] == len(file["provider"]["worker_ips"])
    assert "RAY_enable_autoscaler_v2=0 ray start" in file["head_start_ray_commands"][-1]
    assert any("~/.bashrc" in line and "/.venv/bin:$PATH" in line for line in file["setup_commands"])


FAKE_SRUN = """#!/bin/bash
# srun's part for one node: the program alone, without the options before it
while [[ "$1" == --* ]]; do shift; done
echo "srun $*" >> "$LOG"
exec "$@"
"""

FAKE_RAY = """#!/usr/bin/env python3
import os, signal, socket, sys, time
words = sys.argv[1:]
open(os.environ["LOG"], "a").write("ray " + " ".join(words) + "\\n")
if words[0] == "status":
    sys.exit(print("Active:\\n 1 node_a\\n 1 node_b"))
server = None
for word in words:
    if word.startswith("--port="):
        time.sleep(1)
        server = socket.create_server(("", int(word.split("=")[1])))
if server is None:
    address = next(word for word in words if word.startswith("--address=")).split("=")[1].split(":")
    try:
        socket.create_connection((address[0], int(address[1])), timeout=5).close()
    except ConnectionRefusedError:
        open(os.environ["LOG"], "a").write("a node came before the head listened\\n")
        sys.exit(1)
signal.pause()
"""

FAKE_EVOMERGE = """#!/usr/bin/env python3
import os, signal, sys, time
open(os.environ["LOG"], "a").write("evomerge " + " ".join(sys.argv[1:]) + "\\n")
if os.environ["END"] == "interrupt":
    try:
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(20)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(int(os.environ["END"]))
"""


def run_slurm_script(folder: Path, end: str, *, begun: bool) -> tuple[int, list[str]]:
    """Runs the document's script with stand-ins for Slurm, Ray and evomerge; returns its exit code and what it called, in order."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    programs = {
        "srun": FAKE_SRUN,
        "ray": FAKE_RAY,
        "evomerge": FAKE_EVOMERGE,
        "scontrol": "#!/bin/bash\necho h1\necho h2\n",
        "hostname": "#!/bin/bash\necho 127.0.0.1 0.0.0.0\n",  # the second address also means this machine, even without a network
    }
    for name, text in programs.items():
        (folder / ".venv" / "bin" / name).write_text(text)
        (folder / ".venv" / "bin" / name).chmod(0o755)
    (folder / ".venv" / "bin" / "activate").write_text(f"PATH={folder}/.venv/bin:$PATH\n")
    if begun:
        (folder / "runs" / "slurm").mkdir(parents=True)
        (folder / "runs" / "slurm" / "journal.jsonl").touch()
    job = str(os.getpid())
    script = folder / "job.sh"
    script.write_text(next(text for text in SCRIPTS if "#SBATCH" in text))
    log = folder / "log"
    environment = dict(os.environ) | {
        "LOG": str(log),
        "END": end,
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "h[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "3",
    }
    # bash ignores SIGINT if it was ignored when bash started, as when these tests run in the background of a shell
    command = ["env", "--default-signal=INT", "bash", str(script)]
    with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True) as job_script:
        try:
            code = job_script.wait(timeout=60)
        finally:
            for process in psutil.process_iter():
                if _session(process.pid) == job_script.pid:
                    process.kill()
    return code, log.read_text().splitlines()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(("end", "code"), [("0", 0), ("2", 2), ("interrupt", 130)])
@pytest.mark.parametrize("begun", [False, True])
def test_the_slurm_script_starts_ray_and_passes_on_signals_and_exit_codes(
    tmp_path: Path, end: str, code: int, begun: bool
) -> None:
    ended, calls = run_slurm_script(tmp_path, end, begun=begun)
    assert ended == code, calls
    assert "a node came before the head listened" not in calls
    head = next(call for call in calls if call.startswith("ray") and "--head" in call)
    port = re.search(r"--port=(\d+)", head)
    address = re.search(r"--node-ip-address=(\S+)", head)
    assert port is not None
    assert address is not None
    assert "--num-cpus=3" in head
    at = f"{address[1]}:{port[1]}"
    joined = [call for call in calls if call.startswith("ray start") and f"--address={at}" in call]
    assert len(joined) == 1
    driver = next(call for call in calls if call.startswith("evomerge"))
    assert driver == (
        f"evomerge resume runs/slurm --set cluster.address={at}"
        if begun
        else f"evomerge search search.yaml --run-dir runs/slurm --address {at}"
    )
    assert calls[-1].startswith("srun rm -rf /tmp/ray-")
