import random
from pathlib import Path

import numpy as np
import pytest

from evomerge.core import JournalError, Split
from evomerge.search import (
    ItemStore,
    Journal,
    JournalReader,
    RunDirectory,
    RunRecorder,
    event,
    first_event,
    read_journal,
)
from evomerge.search import journal as journal_module

ITEMS = (("a", 3), ("b", 2))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for index in range(20):
        journal.append(event("asked", id=f"c{index}", values=[index / 7, 0.1]), event("told", ids=[f"c{index}"]))
    journal.close()
    return path


def test_events_are_read_back_as_written(written: Path) -> None:
    events = read_journal(written)
    assert len(events) == 40
    assert events[2]["values"] == [1 / 7, 0.1], "floats do not come back exactly"
    assert [record["seq"] for record in events] == list(range(40))


def test_first_event(written: Path, tmp_path: Path) -> None:
    assert first_event(written)["id"] == "c0"
    assert first_event(tmp_path / "none.jsonl") == {}
    with pytest.raises(JournalError, match="is a folder"):
        first_event(tmp_path)


def test_every_truncated_journal_is_recovered_up_to_the_cut(written: Path) -> None:
    content = written.read_bytes()
    for size in range(0, len(content), 17):
        written.write_bytes(content[:size])
        journal = Journal(written)
        events = list(journal.replay())
        assert len(events) == content[:size].count(b"\n")
        journal.append(event("asked", id="new", values=[]))
        journal.close()
        assert read_journal(written)[-1]["id"] == "new", "the torn record was not cut off before the next write"


def test_flipped_bits_are_never_silently_wrong(written: Path) -> None:
    content = written.read_bytes()
    original = read_journal(written)
    instants = random.Random(1)
    for _ in range(2000):
        position, bit = instants.randrange(len(content)), 1 << instants.randrange(8)
        damaged = bytearray(content)
        damaged[position] ^= bit
        written.write_bytes(damaged)
        try:
            events = read_journal(written)
        except JournalError:
            continue
        assert events == original[: len(events)]
        assert len(events) >= len(original) - 1, "more than the last record was dropped as torn"


def test_a_record_completed_while_being_read_is_not_damage(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader saw half of the last line, and the writer carried on before the reader checked whether more follows."""
    content = written.read_bytes()
    written.write_bytes(content[:-9])

    def parse(line: bytes) -> dict[str, object] | None:
        if not line.endswith(b"\n"):
            written.write_bytes(content)
        return original(line)

    original = journal_module._parse
    monkeypatch.setattr(journal_module, "_parse", parse)
    reader = JournalReader(written)
    assert len(reader.new_events()) == 39
    assert len(reader.new_events()) == 1


def test_repeated_missing_and_moved_lines_are_refused(written: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for mangled in (
        [*lines[:5], lines[4], *lines[5:]],
        [*lines[:5], *lines[6:]],
        [*lines[:5], lines[6], lines[5], *lines[7:]],
    ):
        written.write_bytes(b"".join(mangled))
        with pytest.raises(JournalError, match="missing, repeated or moved"):
            Journal(written)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(event("run", version=99))
    journal.close()
    with pytest.raises(JournalError, match="has journal format 99"):
        read_journal(tmp_path / "journal.jsonl")


def test_a_record_too_large_to_read_back_is_not_written(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_RECORD_BYTES", 100)
    journal = Journal(written)
    empty = len(b'{"error":"","event":"evaluated","id":"x","seq":40}')
    with pytest.raises(JournalError, match="record `evaluated` of x has 101 bytes, more than the maximum of 100"):
        journal.append(event("told", ids=[]), event("evaluated", id="x", error="e" * (101 - empty)))
    journal.append(event("evaluated", id="x", error="e" * (100 - empty)))
    journal.close()
    assert len(read_journal(written)) == 41


def test_opening_a_run_reads_its_journal_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = RunRecorder(RunDirectory(tmp_path))
    recorder.record(*(event("told", ids=[]) for _ in range(20)))
    recorder.close()
    n_read = []
    parse = journal_module._parse
    monkeypatch.setattr(journal_module, "_parse", lambda line: n_read.append(1) or parse(line))
    RunRecorder(RunDirectory(tmp_path)).close()
    assert len(n_read) == 20


def test_a_full_disk_loses_nothing(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(written)
    before = written.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(JournalError, match="No space left on device"):
        journal.append(event("asked", id="x", values=[]))
    monkeypatch.undo()
    assert written.read_bytes() == before
    journal.append(event("asked", id="y", values=[]))
    assert read_journal(written)[-1]["id"] == "y"


def _rows(store: ItemStore, count: int) -> list[tuple[int, str]]:
    store.declare(Split.SEARCH, ITEMS)
    places = [
        store.write(Split.SEARCH, {"a": np.full(3, row, np.float32), "b": np.full(2, row / 2, np.float32)})
        for row in range(count)
    ]
    store.commit()
    return places


def test_item_rows_are_read_back_and_damage_is_detected(tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    places = _rows(store, 4)
    scores = store.read(Split.SEARCH, *places[3])
    assert scores["a"].tolist() == [3, 3, 3]
    assert scores["b"].tolist() == [1.5, 1.5]
    store.close()
    file = tmp_path / "items.search.f32"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(JournalError, match="row 3 is missing or damaged"):
        store.read(Split.SEARCH, *places[3])


def test_a_row_missing_from_the_journal_is_cut_off(tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    _rows(store, 4)
    store.close()
    store.trim(Split.SEARCH, 3)
    assert (tmp_path / "items.search.f32").stat().st_size == 3 * 20
    with pytest.raises(JournalError, match="the journal refers to 5 rows"):
        store.trim(Split.SEARCH, 5)


def test_scores_with_different_columns_are_refused(tmp_path: Path) -> None:
    store = ItemStore(tmp_path)
    store.declare(Split.SEARCH, ITEMS)
    with pytest.raises(JournalError, match="have columns"):
        store.write(Split.SEARCH, {"a": np.zeros(4, np.float32), "b": np.zeros(2, np.float32)})
