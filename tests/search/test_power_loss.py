"""Power loss: anything not fsynced may be partly or completely gone, in any file. Whatever has been shown outside the process must still be there."""

import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.build import parse_config, resume_search, start_search
from evomerge.core import Evaluation
from evomerge.search import RunState, read_journal

SETTINGS: dict[str, Any] = {
    "seed": 9,
    "strategy": {"name": "nsga2", "population_size": 6},
    "evaluation": {"kind": "synthetic", "function": "zdt1", "dimension": 4, "n_items": 10, "failure_rate": 0.05},
    "cluster": {"kind": "local", "workers": 3},
    "budget": {"evaluations": 40},
    "finals": {"finalists": 2},
    "deterministic": True,
}
N_LOSSES = 25


class PowerLossError(Exception):
    """The machine has lost its power."""


class Disk:
    """What a disk is guaranteed to hold under a folder: contents as of each file's last fsync, names as of each folder's last.

    Replaces `os.fsync` and `os.replace`. `fail` rebuilds the folder as it may be found after a power loss: synced contents
    complete, any prefix of what was appended since, and renames and new names that were not synced either done or not.
    """

    def __init__(self, root: Path, off_at: int, rng: random.Random) -> None:
        self._root, self._off_at, self._rng = root, off_at, rng
        self._fsync, self._replace = os.fsync, os.replace
        self._synced: dict[int, bytes] = {}
        """inode -> content"""
        self._names: dict[Path, int] = {}
        """durable names -> inode"""
        self._n_syncs = 0
        self.off = False

    def fsync(self, descriptor: int) -> None:
        self._n_syncs += 1
        if self.off or self._n_syncs == self._off_at:
            self.off = True
            raise PowerLossError
        self._fsync(descriptor)
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not place.is_relative_to(self._root):
            return
        if place.is_dir():
            self._names = {path: inode for path, inode in self._names.items() if path.parent != place}
            self._names |= {path: path.stat().st_ino for path in place.iterdir() if path.is_file()}
        elif place.exists():
            self._synced[place.stat().st_ino] = place.read_bytes()

    def replace(self, source: Any, target: Any) -> None:
        if self.off:
            raise PowerLossError
        self._replace(source, target)

    def fail(self, into: Path) -> None:
        """Writes what is found once the power is back."""
        now = {path: path.stat().st_ino for path in self._root.rglob("*") if path.is_file()}
        contents = {inode: path.read_bytes() for path, inode in now.items()}
        for path in {*now, *self._names}:
            old, new = self._names.get(path), now.get(path)
            inode = self._rng.choice([old, new])
            if inode is None:
                continue
            sure, seen = self._synced.get(inode, b""), contents.get(inode, b"")
            if seen.startswith(sure):
                sure = seen[: self._rng.randint(len(sure), len(seen))]
            place = into / path.relative_to(self._root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(sure)


def start(folder: Path, observer: Callable[[RunState, Evaluation], None] | None = None) -> None:
    config = parse_config(dict(SETTINGS), folder=Path("/"))
    start_search(config, folder, config_text=yaml.safe_dump(SETTINGS), observers=[observer] if observer else [])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("power") / "undisturbed"
    start(run)
    return run


@pytest.mark.parametrize("number", range(N_LOSSES))
def test_after_a_power_loss_the_run_continues_as_if_nothing_had_happened(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rng = random.Random(number)
    run, found = tmp_path / "run", tmp_path / "found"
    run.mkdir()
    disk = Disk(run, rng.randint(1, 80), rng)
    told: list[tuple[str, str]] = []

    def observer(state: RunState, evaluation: Evaluation) -> None:
        if not disk.off:
            told.append((evaluation.candidate_id, evaluation.split.value))

    monkeypatch.setattr(os, "fsync", disk.fsync)
    monkeypatch.setattr(os, "replace", disk.replace)
    # results are fsynced in groups, so the number of fsyncs depends on the pace of the run; if it ends first, the power fails then
    with suppress(PowerLossError):
        start(run, observer)
    monkeypatch.undo()
    disk.fail(found)
    if not (found / "resolved.json").exists():
        assert told == [], "a result was shown, but the run cannot be resumed"
        shutil.rmtree(found, ignore_errors=True)
        start(found)
    else:
        journal = found / "journal.jsonl"
        kept = (
            [(r["id"], r["split"]) for r in read_journal(journal) if r["event"] == "evaluated"]
            if journal.exists()
            else []
        )
        assert set(told) <= set(kept), "a result that had been shown was lost"
        resume_search(found)
        after = [(r["id"], r["split"]) for r in read_journal(journal) if r["event"] == "evaluated"]
        assert after[: len(kept)] == kept
        assert len(set(after)) == len(after), "a result was paid for twice"
    assert (found / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
