"""`build_zoo`: trains the models in separate processes, or recognises a finished zoo. Knows folders, but nothing of training."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import evomerge
from evomerge.core import EvomergeError, FilePath, Json, atomic_write_json, fsync_folder
from evomerge.zoo.settings import ZooSettings
from evomerge.zoo.worker import BASE, Job

logger = logging.getLogger(__name__)

MANIFEST: Final = "zoo.json"
GOOD_ACCURACY: Final = 0.85
"""An expert with a lower accuracy on its own skill causes a warning."""

_LOG_TAIL_CHARACTERS: Final = 2000

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ZooReport:
    """A finished zoo.

    Attributes:
        folder: its location; each model is in the subfolder of its name.
        seed: the seed from which it was built.
        reused: whether it already existed.
        scores: model -> skill -> accuracy in [0, 1] on items of the `report` split; the base first.
    """

    folder: Path
    seed: int
    reused: bool
    scores: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        skills = list(next(iter(self.scores.values())))
        width = max(map(len, [*self.scores, *skills])) + 2
        rows = [
            f"{'':{width}}" + "".join(f"{skill:>{width}}" for skill in skills),
            *(
                f"{model:{width}}" + "".join(f"{accuracies[skill]:{width}.3f}" for skill in skills)
                for model, accuracies in self.scores.items()
            ),
        ]
        origin = "found finished" if self.reused else "built"
        return "\n".join([f"zoo {self.folder} (seed {self.seed}, {origin}); accuracy on held-out items:", *rows])


def build_zoo(
    out: FilePath, *, seed: int = 0, progress: Progress | None = None, settings: ZooSettings | None = None
) -> ZooReport:
    """Train the base and the experts into `out`, or reuses a finished zoo there.

    A zoo counts as finished only if its manifest has the same seed and recipe and every file has the recorded hash. It is
    built next to `out` and renamed, so an interrupted build leaves `out` unchanged. Concurrent builds of one folder take turns.

    Args:
        out: the zoo's folder; its parent is created if missing. A zoo with another seed or recipe in it is replaced.
        seed: not negative. The same seed on the same machine gives the same bytes.
        progress: receives lines of text during training.
        settings: None for the demo's settings.

    Raises:
        EvomergeError: `out` contains something that is not a zoo, its parent cannot be written, or a training process failed.
        OSError: the disk fails during writing.
    """
    if seed < 0:
        raise EvomergeError(f"zoo: the seed must not be negative, got {seed}")
    settings = ZooSettings() if settings is None else settings
    say: Progress = logger.info if progress is None else progress
    # absolute but not resolved, so that a link is kept
    out = Path(os.path.abspath(out))
    with _builders_turn(out):
        found = _finished(out, settings.fingerprint(seed))
        if found is not None:
            return ZooReport(out, seed, True, found)
        _refuse_foreign(out)
        building = out.with_name(f".{out.name}.building")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            scores = _train_all(building, settings, seed, say)
            _write_manifest(building, settings.fingerprint(seed), seed, scores)
            _replace(building, out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    for stage in settings.experts:
        if scores[stage.skill][stage.skill] < GOOD_ACCURACY:
            logger.warning(
                "zoo: expert %s reached %.2f on its own skill, below %.2f; another seed may do better",
                stage.skill,
                scores[stage.skill][stage.skill],
                GOOD_ACCURACY,
            )
    return ZooReport(out, seed, False, scores)


@contextmanager
def _builders_turn(out: Path) -> Iterator[None]:
    """Create the parent of `out` and holds the lock of `out`; the operating system releases it if the process dies."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = (out.parent / f".{out.name}.lock").open("w")
    except OSError as problem:
        raise EvomergeError(f"{out.parent}: cannot be written: {problem.strerror}") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _finished(out: Path, wanted: str) -> dict[str, dict[str, float]] | None:
    """The scores in the manifest of a finished zoo with the fingerprint `wanted`; None if there is none."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != wanted or manifest["files"] != _hashes(out):
            return None
        scores: dict[str, dict[str, float]] = manifest["scores"]
        return {model: scores[model] for model in manifest["models"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refuse_foreign(out: Path) -> None:
    """Raise `EvomergeError` unless `out` is missing, empty or a zoo, so that nothing else is ever deleted."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise EvomergeError(f"zoo: {out} already exists and is not a zoo (it has no {MANIFEST}); choose another folder")


def _train_all(folder: Path, settings: ZooSettings, seed: int, progress: Progress) -> dict[str, dict[str, float]]:
    """Train every model into `folder`: the base, then the experts in parallel. Returns model -> skill -> accuracy."""
    models = [BASE, *(stage.skill for stage in settings.experts)]
    for names in (models[:1], models[1:]):
        progress(f"training {', '.join(names)}")
        _run_workers([Job(name, folder, seed, settings) for name in names], progress)
    scores = {}
    for name in models:
        file = folder / f"{name}.scores.json"
        scores[name] = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        (folder / f"{name}.log").unlink()
    return scores


def _run_workers(jobs: Sequence[Job], progress: Progress) -> None:
    """Run one process per job, all at once; their lines go to `progress`. Never leaves a process running."""
    read_end, write_end = os.pipe()
    workers: list[subprocess.Popen[bytes]] = []
    with os.fdopen(read_end, encoding="utf-8") as lines:
        try:
            try:
                for job in jobs:
                    with (job.folder / f"{job.model}.log").open("wb") as log:
                        command = [sys.executable, "-m", "evomerge.zoo.worker", job.to_json()]
                        workers.append(
                            subprocess.Popen(  # noqa: S603
                                command, stdin=subprocess.DEVNULL, stdout=write_end, stderr=log, env=_environment()
                            )
                        )
            finally:
                # the workers hold the pipe's write end, so reading ends when the last of them does
                os.close(write_end)
            for line in lines:
                progress(line.rstrip("\n"))
            for job, worker in zip(jobs, workers, strict=True):
                if worker.wait() != 0:
                    log_text = (job.folder / f"{job.model}.log").read_text(encoding="utf-8", errors="replace")
                    raise EvomergeError(
                        f"zoo: training {job.model} failed with exit code {worker.returncode}:\n"
                        f"{log_text[-_LOG_TAIL_CHARACTERS:].strip()}"
                    )
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()


def _environment() -> dict[str, str]:
    """The caller's environment with one thread, no accelerator and no network."""
    search_path = [str(Path(evomerge.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MKL_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, search_path)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _write_manifest(folder: Path, fingerprint: str, seed: int, scores: Mapping[str, Mapping[str, float]]) -> None:
    manifest: dict[str, Json] = {
        "fingerprint": fingerprint,
        "seed": seed,
        "models": list(scores),
        "scores": scores,
        "files": _hashes(folder),
    }
    atomic_write_json(folder / MANIFEST, manifest)


def _hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file in the model folders."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*"))
        if path.is_file()
    }


def _replace(building: Path, out: Path) -> None:
    """Replace `out` by `building`; a crash in between leaves no `out` rather than a mixture."""
    if out.exists():
        outdated = out.with_name(f".{out.name}.outdated")
        shutil.rmtree(outdated, ignore_errors=True)
        os.replace(out, outdated)
        shutil.rmtree(outdated)
    os.replace(building, out)
    fsync_folder(out.parent)
