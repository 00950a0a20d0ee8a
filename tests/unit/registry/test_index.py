"""The SQLite cache: deletable, shared between processes, and lookups whose cost does not grow with history."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import digest_subject
from registry.commit import commit
from registry.index import Index
from registry.storage.memory import MemoryStorage
from registry.stream import Stream, open_stream

Make = Callable[..., Any]


@pytest.fixture
def storage(start: Make, edit: Make, tmp_path: Path) -> MemoryStorage:
    """A stream of 40 live edits whose cache lies in `tmp_path`."""
    storage = MemoryStorage()
    clerk = start(storage, cache_dir=tmp_path)
    for number in range(8):
        draft = clerk.draft([(edit(f"person {number}-{i}", name=f"p{number}-{i}"), "live") for i in range(5)])
        commit(clerk.stream, draft, clerk.stream.head)
    clerk.stream.index.close()
    return storage


def cache_file(folder: Path) -> Path:
    return next((folder / "streams").glob("main-*.sqlite"))


@pytest.mark.parametrize("damage", ["delete", "garbage", "truncate", "older schema"])
def test_the_cache_can_be_lost(storage: MemoryStorage, tmp_path: Path, damage: str) -> None:
    path = cache_file(tmp_path)
    if damage == "delete":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"no database" * 1_000)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA user_version = 99")
        db.close()
    stream = open_stream(storage, "main", tmp_path)
    assert stream.index.counts() == {"live": 40}
    assert len(list(stream.index.find_rows("live"))) == 40
    assert stream.head.seq == 8


def test_a_cache_that_cannot_be_kept_costs_time_only(storage: MemoryStorage, tmp_path: Path, employ: Make, edit: Make) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert open_stream(storage, "main", tmp_path / "file").index.counts() == {"live": 40}
    stream = open_stream(storage, "main", tmp_path)
    stream.index._db.execute(f"PRAGMA max_page_count = {stream.index._db.execute('PRAGMA page_count').fetchone()[0]}")
    batch = [(edit(f"new {i}"), "live") for i in range(200)]
    assert commit(stream, employ(stream).draft(batch), stream.head).seq == 9
    assert stream.index.counts() == {"live": 240}
    assert open_stream(storage, "main", tmp_path).index.counts() == {"live": 240}


def test_the_cache_of_another_stream_at_the_same_place_is_not_believed(
    storage: MemoryStorage, tmp_path: Path, start: Make, edit: Make
) -> None:
    for entry in list(storage.list("")):
        storage.delete(entry.key)
    clerk = start(storage, cache_dir=tmp_path)
    assert clerk.stream.head.seq == 0
    assert clerk.stream.index.counts() == {}
    commit(clerk.stream, clerk.draft([(edit("Zoe"), "live")]), clerk.stream.head)
    assert clerk.stream.index.counts() == {"live": 1}


def test_two_openers_share_one_cache_and_apply_a_commit_once(storage: MemoryStorage, tmp_path: Path, employ: Make, edit: Make) -> None:
    first, second = (open_stream(storage, "main", tmp_path) for _ in range(2))
    commit(first, employ(first).draft([(edit("Zoe"), "live"), (edit("Yan"), "withheld")]), first.head)
    assert second.refresh() == first.head
    assert second.index.counts() == first.index.counts() == {"live": 41, "withheld": 1}


def test_opening_again_reads_only_what_is_new(storage: MemoryStorage, tmp_path: Path) -> None:
    read: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(storage, name)

        def read(self, key: str) -> bytes:
            read.append(key)
            return storage.read(key)

    Stream(Counting(), "main", tmp_path)  # type: ignore[arg-type]
    assert read == ["streams/main/commits/00000008.json", "streams/main/commits/00000009.json"]


def test_a_sample_is_bounded_repeatable_and_fair(storage: MemoryStorage, tmp_path: Path) -> None:
    index = open_stream(storage, "main", tmp_path).index
    sample = index.sample_live(10, seed=3)
    assert sample == index.sample_live(10, seed=3) == open_stream(storage, "main").index.sample_live(10, seed=3)
    assert len({row.key for row in sample}) == 10
    assert sample == sorted(sample, key=lambda row: (row.seq, row.position))
    assert len(index.sample_live(1_000, seed=3)) == 40
    drawn = {row.key for seed in range(60) for row in index.sample_live(10, seed)}
    assert len(drawn) == 40, "every live edit is drawn by some seed"


def test_a_sample_stays_mostly_the_same_as_edits_arrive(storage: MemoryStorage, employ: Make, edit: Make) -> None:
    stream = open_stream(storage, "main")
    before = {row.key for row in stream.index.sample_live(20, seed=0)}
    commit(stream, employ(stream).draft([(edit(f"new {i}"), "live") for i in range(4)]), stream.head)
    assert len(before & {row.key for row in stream.index.sample_live(20, seed=0)}) >= 16


def test_a_sample_of_some_commits(storage: MemoryStorage) -> None:
    index = open_stream(storage, "main").index
    sample = index.sample_between(2, 4, 6, seed=1)
    assert sample == index.sample_between(2, 4, 6, seed=1) and len({row.key for row in sample}) == 6
    assert {row.seq for row in index.sample_between(2, 4, 100, seed=1)} == {2, 3, 4}
    assert len(index.sample_between(2, 4, 100, seed=1)) == 15 and index.sample_between(9, 20, 5, seed=1) == []
    drawn = {row.key for seed in range(60) for row in index.sample_between(2, 4, 6, seed)}
    assert len(drawn) == 15, "every edit of these commits is drawn by some seed"


LOOKUPS: dict[str, tuple[Callable[[Index], Any], str]] = {
    "id": (lambda index: index.find_edit("p1-1"), "PRIMARY KEY (id=?)"),
    "history": (lambda index: index.find_occurrences("p1-1"), "PRIMARY KEY (id=?)"),
    "slot": (lambda index: index.find_slot("x"), "INDEX live_by_slot (slot=?)"),
    "subject": (lambda index: index.find_subject("0" * 32), "INDEX live_by_subject (subject=?)"),
    "sample": (lambda index: index.sample_live(5, seed=0), "INDEX live_by_lot (lot"),
    "prefix": (lambda index: index.complete("p1"), "PRIMARY KEY (id>? AND id<?)"),
    "status": (lambda index: next(index.find_rows("live")), "INDEX by_status (status=? AND (seq,position)>(?,?))"),
    "delta": (lambda index: index.dump(since=7), "INDEX by_touched (touched>?)"),
}


@pytest.mark.parametrize("lookup", LOOKUPS)
def test_no_lookup_grows_with_history(storage: MemoryStorage, lookup: str) -> None:
    index = open_stream(storage, "main").index
    look, expected = LOOKUPS[lookup]
    seen: list[str] = []
    index._db.set_trace_callback(seen.append)
    look(index)
    index._db.set_trace_callback(None)
    plans = [index._db.execute(f"EXPLAIN QUERY PLAN {query}").fetchall()[0][-1] for query in seen if "FROM edits" in query]
    assert plans
    assert all(f"SEARCH edits USING {expected}" in plan for plan in plans), plans


def test_pages_do_not_lose_rows(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.index._PAGE", 7)
    rows = list(open_stream(storage, "main").index.find_rows("live", "replaced"))
    assert [(row.seq, row.position) for row in rows] == [(seq, position) for seq in range(1, 9) for position in range(5)]


def test_live_edits_of_one_subject_are_found_whatever_the_case(storage: MemoryStorage, employ: Make, edit: Make) -> None:
    stream = open_stream(storage, "main")
    commit(
        stream, employ(stream).draft([(edit("ÉMILE", name="x"), "live"), (edit("Émile", name="y", prompt="{} plays"), "live")]), stream.head
    )
    assert [row.id for row in stream.index.find_subject(digest_subject("e\u0301mile"))] == ["x", "y"]
