"""The commit: what it requires, and what two writers at once see."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from errata.errors import ConflictError, KeyMissingError, StorageError
from registry.commit import CHECKPOINT_EVERY, commit
from registry.events import CalibrationCommit, CompactionCommit, read_commit, write_commit
from registry.history import list_named, open_history
from registry.storage.local import LocalStorage
from registry.storage.memory import MemoryStorage
from registry.stream import Stream
from registry.undoing import compare_live

Make = Callable[..., Any]
COMMON: dict[str, Any] = {"actor": "ann", "host": "here", "versions": {"errata": "0.1.0"}, "time": datetime(2026, 11, 1, tzinfo=UTC)}


def test_repeating_a_commit_that_landed_succeeds(start: Make, edit: Make) -> None:
    clerk = start()
    parent = clerk.stream.head
    draft = clerk.draft([(edit(), "live")])
    assert commit(clerk.stream, draft, parent) == draft
    assert commit(clerk.stream, draft, parent) == draft
    later = clerk.draft([(edit("Bob"), "live")])
    commit(clerk.stream, later, clerk.stream.head)
    assert commit(clerk.stream, draft, parent) == draft
    assert clerk.stream.head.seq == 2
    assert clerk.stream.index.counts() == {"live": 2}


def test_a_lost_answer_is_no_conflict(start: Make, edit: Make) -> None:
    """The storage repeated the request by itself, and was told that the key exists: by its own first try."""

    class Repeating(MemoryStorage):
        def create(self, key: str, data: bytes) -> None:
            super().create(key, data)
            if "/commits/" in key:
                super().create(key, data)

    clerk = start(Repeating())
    draft = clerk.draft([(edit(), "live")])
    assert commit(clerk.stream, draft, clerk.stream.head) == draft


def test_the_second_of_two_writers_is_told(start: Make, edit: Make, employ: Make) -> None:
    storage = MemoryStorage()
    first = start(storage)
    second = employ(Stream(storage, "main", None))
    parent = second.stream.head
    draft = second.draft([(edit("Ada", "Rome"), "live")])
    commit(first.stream, first.draft([(edit("Ada", "Paris"), "live")]), first.stream.head)
    with pytest.raises(ConflictError, match=r"found commit 1 \(edits by ann on here\) after it"):
        commit(second.stream, draft, parent)
    # The next try starts from the new head, and its edit replaces the other's.
    second.stream.refresh()
    commit(second.stream, second.draft([(edit("Ada", "Rome"), "live")]), second.stream.head)
    assert second.stream.index.counts() == {"live": 1, "replaced": 1}


def test_writers_in_processes_lose_and_double_nothing(tmp_path: Path, start: Make, edit: Make, employ: Make) -> None:
    """Four processes with five edits each, one commit per edit, all at once: 20 commits, each edit live once."""
    storage = LocalStorage(tmp_path / "root")
    start(storage, cache_dir=tmp_path / "cache")

    def write(writer: int) -> None:
        # Two of the four share a cache file.
        clerk = employ(Stream(storage, "main", tmp_path / f"cache{writer // 2}"))
        for number in range(5):
            while True:
                head = clerk.stream.refresh()
                try:
                    commit(clerk.stream, clerk.draft([(edit(f"person {writer} {number}"), "live")]), head)
                    break
                except ConflictError:
                    continue

    run_forked([lambda writer=writer: write(writer) for writer in range(4)])
    stream = Stream(storage, "main", None)
    assert stream.head.seq == 20
    assert stream.index.counts() == {"live": 20}
    for writer in range(2):
        assert Stream(storage, "main", tmp_path / f"cache{writer}").index.counts() == {"live": 20}


def run_forked(jobs: list[Callable[[], None]]) -> None:
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                job()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * len(jobs)


@pytest.mark.parametrize("name", ["batch", "outcomes", "manifest", "pairs", "report", "files"])
def test_every_named_object_must_be_there(start: Make, edit: Make, name: str) -> None:
    clerk = start()
    draft = clerk.draft([(edit(), "live")])
    missing = "f" * 64
    value: Any = missing
    if name == "pairs":
        value = (*draft.pairs, missing)
    if name == "files":
        value = (draft.files[0].model_copy(update={"digest": missing}),)
    with pytest.raises(KeyMissingError, match=f"expected {name.removesuffix('s')}.* {missing}, found none"):
        commit(clerk.stream, draft.model_copy(update={name: value}), clerk.stream.head)
    assert clerk.stream.refresh().seq == 0


def test_a_line_is_consumed_once(start: Make, edit: Make) -> None:
    clerk = start()
    made = commit(clerk.stream, clerk.draft([(edit(), "live"), (edit("Bob"), "live")]), clerk.stream.head)
    again = clerk.draft([(edit("Cleo"), "live")]).model_copy(update={"files": made.files})
    with pytest.raises(StorageError, match="expected new lines of 1.jsonl, found 1-2; 1-2 are consumed"):
        commit(clerk.stream, again, clerk.stream.head)


def test_an_edit_is_not_live_twice(start: Make, edit: Make) -> None:
    clerk = start()
    careless = clerk.draft([(edit("Ada", "Rome", name="b"), "live")])
    commit(clerk.stream, clerk.draft([(edit("Ada", "Paris", name="a"), "live")]), clerk.stream.head)
    head = clerk.stream.head
    # Prepared as if the stream were empty: its outcomes replace nothing.
    batch = [row.model_copy(update={"occurrence": "b@2"}) for row in clerk.stream.read_batch(careless)]
    outcomes = [row.model_copy(update={"occurrence": "b@2"}) for row in clerk.stream.read_outcomes(careless)]
    objects = clerk.stream.objects
    fields = {
        "seq": 2,
        "parent": head.digest,
        "batch": objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in batch),
        "outcomes": objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in outcomes),
    }
    with pytest.raises(StorageError, match="expected b@2 to replace a@1, found both live"):
        commit(clerk.stream, careless.model_copy(update=fields), head)
    with pytest.raises(StorageError, match="expected the pairs of b@2 among its pairs"):
        commit(clerk.stream, careless.model_copy(update={**fields, "pairs": ()}), head)
    assert clerk.stream.refresh() == head


def test_a_rejection_changes_no_manifest(start: Make, edit: Make) -> None:
    clerk = start()
    draft = clerk.draft([(edit(), "rejected")])
    other = clerk.stream.objects.put_json({"format": 1, "other": True})
    with pytest.raises(StorageError, match="expected the previous manifest"):
        commit(clerk.stream, draft.model_copy(update={"manifest": other}), clerk.stream.head)


def test_only_known_occurrences_change(start: Make, edit: Make) -> None:
    clerk = start()
    commit(clerk.stream, clerk.draft([(edit(name="a"), "quarantined")]), clerk.stream.head)
    row = next(clerk.stream.index.find_rows("quarantined"))
    with pytest.raises(StorageError, match="expected an occurrence z@1, found none"):
        commit(clerk.stream, clerk.draft_drop([row._replace(id="z")]), clerk.stream.head)


def test_a_checkpoint_that_fails_harms_nothing(start: Make, edit: Make) -> None:
    class Full(MemoryStorage):
        def create(self, key: str, data: bytes) -> None:
            if "/checkpoints/" in key:
                raise StorageError("no space left on device")
            super().create(key, data)

    storage = Full()
    clerk = start(storage)
    for number in range(CHECKPOINT_EVERY + 1):
        commit(clerk.stream, clerk.draft([(edit(f"p{number}"), "live")]), clerk.stream.head)
    assert Stream(storage, "main", None).index.counts() == {"live": CHECKPOINT_EVERY + 1}


def test_consumed_files_leave_the_inbox_but_a_new_one_of_that_name_stays(start: Make, edit: Make) -> None:
    storage = MemoryStorage()
    clerk = start(storage)
    draft = clerk.draft([(edit(), "live")])
    raw = clerk.stream.objects.get(draft.files[0].digest)
    key = clerk.stream.key("inbox/1.jsonl")
    storage.create(key, raw)
    assert clerk.stream.remove_consumed(draft.files) == [], "not committed yet"
    commit(clerk.stream, draft, clerk.stream.head)
    storage.delete(key)
    storage.create(key, b"something new")
    assert clerk.stream.remove_consumed(draft.files) == []
    storage.delete(key)
    storage.create(key, raw)
    assert clerk.stream.remove_consumed(draft.files) == ["1.jsonl"]
    assert clerk.stream.remove_consumed(draft.files) == []


def draft_compaction(stream: Stream, rows: list[Any], **fields: Any) -> CompactionCommit:
    head, objects = stream.head, stream.objects
    listed = [{"op": "add", "pairs": row.pairs, "rows": [row.row]} for row in rows]
    content: dict[str, Any] = {
        "of": head.accepted,
        "live": objects.put_json(listed),
        "manifest": objects.put_json({"format": 1, "sums": 1}),
    }
    return CompactionCommit(**{"seq": head.seq + 1, "parent": head.digest, "promoted": True, **COMMON, **content, **fields})


def draft_calibration(stream: Stream, **fields: Any) -> CalibrationCommit:
    head = stream.head
    manifest = stream.objects.put_json({"format": 1, "base": head.base, "profile": "d" * 64})
    content: dict[str, Any] = {"of": head.accepted, "profile": "d" * 64, "manifest": manifest, "promoted": True}
    return CalibrationCommit(**{"seq": head.seq + 1, "parent": head.digest, **COMMON, **content, **fields})


def test_a_calibration_moves_the_profile_and_no_edit(start: Make, edit: Make) -> None:
    clerk = start()
    stream = clerk.stream
    commit(stream, clerk.draft([(edit("Ada"), "live"), (edit("Cid"), "quarantined")]), stream.head)
    rows, counts, before = list(stream.index.find_rows("live")), stream.index.counts(), stream.head
    with pytest.raises(StorageError, match="expected the state of the newest accepted commit 1, found that of 0"):
        commit(stream, draft_calibration(stream, of=0), stream.head)
    with pytest.raises(StorageError, match="expected a manifest on base b+ and profile e+, found another"):
        commit(stream, draft_calibration(stream, profile="e" * 64), stream.head)
    with pytest.raises(StorageError, match="expected the 1 pairs of the live edits"):
        commit(stream, draft_calibration(stream, live=stream.objects.put_json([])), stream.head)
    draft = commit(stream, draft_calibration(stream), stream.head)
    head = stream.head
    assert (head.seq, head.accepted, head.base, head.profile, head.manifest) == (2, 2, before.base, "d" * 64, draft.manifest)
    assert stream.index.counts() == counts and list(stream.index.find_rows("live")) == rows
    assert read_commit(write_commit(draft), "here") == draft
    listed = stream.objects.put_json([{"op": "add", "pairs": rows[0].pairs, "rows": [rows[0].row]}])
    summed = commit(stream, draft_calibration(stream, live=listed), stream.head)
    assert ("live list", listed) in list_named(summed), "bundles and collectors of garbage must know it"
    commit(stream, clerk.draft_rollback(1, profile=before.profile), stream.head)
    assert (stream.head.profile, list(stream.index.find_rows("live"))) == (before.profile, rows)


def test_a_compaction_sums_what_is_live_and_changes_no_edit(start: Make, edit: Make) -> None:
    clerk = start()
    stream = clerk.stream
    for name in ("Ada", "Bob"):
        commit(stream, clerk.draft([(edit(name), "live")]), stream.head)
    commit(stream, clerk.draft([(edit("Ada", "Rome"), "live"), (edit("Cid"), "quarantined")]), stream.head)
    rows, counts = list(stream.index.find_rows("live")), stream.index.counts()
    replaced = list(stream.index.find_rows("replaced"))
    for wrong in (rows[:1], [*rows, rows[0]], [rows[0], *replaced], []):
        with pytest.raises(StorageError, match="expected the 2 pairs of the live edits"):
            commit(stream, draft_compaction(stream, wrong), stream.head)
    with pytest.raises(StorageError, match="expected the state of the newest accepted commit 3, found that of 2"):
        commit(stream, draft_compaction(stream, rows, of=2), stream.head)
    with pytest.raises(KeyMissingError, match="expected live list as object"):
        commit(stream, draft_compaction(stream, rows, live="a" * 64), stream.head)
    draft = commit(stream, draft_compaction(stream, rows[::-1]), stream.head)
    head = stream.head
    assert (head.seq, head.accepted, head.champion, head.manifest) == (4, 4, 4, draft.manifest)
    assert stream.index.counts() == counts and list(stream.index.find_rows("live")) == rows
    assert read_commit(write_commit(draft), "here") == draft
    assert ("live list", draft.live) in list_named(draft), "bundles and collectors of garbage must know it"
    # Back across it: nobody leaves, nobody comes back.
    assert compare_live(stream, 3) == []
    commit(stream, clerk.draft_rollback(3), stream.head)
    assert list(stream.index.find_rows("live")) == rows
    assert open_history(stream.storage, "main").list_live(2) != rows == open_history(stream.storage, "main").list_live(5)
