"""The commit log over every storage: one commit per number, found without trusting a listing."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from errata.edits import digest_of
from errata.errors import ConflictError, FormatError, KeyMissingError, ObjectCorruptError
from registry.events import Commit, InitCommit, RejectionCommit, write_commit
from registry.log import CommitLog
from registry.storage.base import Entry, Storage
from registry.stream import Stream, create_stream

COMMON: dict[str, Any] = {"host": "here", "versions": {"errata": "0.1.0"}, "time": datetime(2026, 11, 1, tzinfo=UTC), "manifest": "d" * 64}


def commit_after(parent: Commit | None, actor: str = "ann") -> Commit:
    if parent is None:
        return InitCommit(seq=0, parent="", base={"digest": "b" * 64}, profile="c" * 64, editors=("d4s",), actor=actor, **COMMON)
    digest = digest_of(write_commit(parent))
    return RejectionCommit(seq=parent.seq + 1, parent=digest, outcomes="e" * 64, actor=actor, **COMMON)


def append_chain(log: CommitLog, length: int) -> list[Commit]:
    commits: list[Commit] = []
    for _ in range(length):
        commits.append(commit_after(commits[-1] if commits else None))
        log.append(commits[-1])
    return commits


def test_a_commit_is_read_as_it_was_written(storage: Storage) -> None:
    log = CommitLog(storage, "commits")
    commits = append_chain(log, 3)
    assert [log.read(seq) for seq in range(3)] == commits
    assert log.read_next(-1, "") == (commits[0], digest_of(write_commit(commits[0])))
    assert log.read_next(1, commits[2].parent) == (commits[2], digest_of(write_commit(commits[2])))
    assert log.read_next(2, digest_of(write_commit(commits[2]))) is None
    with pytest.raises(KeyMissingError, match="00000003"):
        log.read(3)


def test_the_same_bytes_are_our_own_success_and_others_a_conflict(storage: Storage) -> None:
    log = CommitLog(storage, "commits")
    first = append_chain(log, 1)[0]
    ours, theirs = commit_after(first), commit_after(first, actor="bob")
    assert log.append(ours) == log.append(ours)
    with pytest.raises(ConflictError, match=r"commit 0 to be the newest, found commit 1 \(rejection by ann on here\)"):
        log.append(theirs)
    assert log.read(1) == ours


def test_of_many_writers_one_commits(open_again: Callable[[], Storage]) -> None:
    logs = [CommitLog(open_again(), "commits") for _ in range(16)]
    first = append_chain(logs[0], 1)[0]

    def write(number: int) -> bool:
        try:
            logs[number].append(commit_after(first, actor=f"writer {number}"))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        won = [number for number, success in enumerate(pool.map(write, range(16))) if success]
    assert len(won) == 1
    assert logs[0].read(1).actor == f"writer {won[0]}"


class _Late:
    """A storage whose listings show nothing yet."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(())


def test_the_head_is_found_whatever_a_listing_shows(storage: Storage) -> None:
    stream = create_stream(storage, "main", commit_after(None), {"format": 1})
    nothing = stream.objects.put_rows([])
    for seq in range(12):
        stream.log.append(commit_after(stream.log.read(seq)).model_copy(update={"outcomes": nothing}))
        if seq == 5:
            stream.refresh()
            checkpoint = stream.checkpoints.write(stream.index)
    newest = (12, digest_of(stream.log.read_bytes(12)))
    with_checkpoint, late = Stream(storage, "main", None).head, Stream(_Late(storage), "main", None).head  # type: ignore[arg-type]
    storage.delete(f"streams/main/checkpoints/{checkpoint.seq:08d}.json")
    without = Stream(storage, "main", None).head
    assert {(head.seq, head.digest) for head in (with_checkpoint, late, without, stream.refresh())} == {newest}


def test_a_broken_chain_is_noticed(storage: Storage) -> None:
    log = CommitLog(storage, "commits")
    first, second = append_chain(log, 2)
    forged = first.model_copy(update={"actor": "mallory"})
    storage.delete("commits/00000000.json")
    storage.create("commits/00000000.json", write_commit(forged))
    found = log.read_next(-1, "")
    assert found is not None
    with pytest.raises(ObjectCorruptError, match=f"expected parent {found[1]}, found {second.parent}"):
        log.read_next(0, found[1])


def test_a_commit_under_another_number_is_noticed(storage: Storage) -> None:
    log = CommitLog(storage, "commits")
    append_chain(log, 2)
    storage.create("commits/00000002.json", log.read_bytes(1))
    with pytest.raises(ObjectCorruptError, match="expected seq 2, found 1"):
        log.read(2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"format":2,"kind":"edits","versions":{"errata":"0.9.0"}}', "format 1 or older, found 2; it was written by errata 0.9.0"),
        (b'{"format":1,"kind":"prophecy","versions":{"errata":"0.3.0"}}', "found 'prophecy'; it was written by errata 0.3.0"),
        (b'{"format":1,"kind":"edits"}', "Field required"),
        (b'{"kind":"edits"}', "format number"),
        (b'{"format":1,', "expected JSON"),
    ],
)
def test_what_this_version_cannot_read_stops_it(storage: Storage, data: bytes, message: str) -> None:
    storage.create("commits/00000000.json", data)
    with pytest.raises(FormatError, match=message):
        CommitLog(storage, "commits").read(0)


def test_a_commit_holds_no_texts(storage: Storage) -> None:
    large = commit_after(None).model_copy(update={"reasons": ("because " * 10_000,)})
    with pytest.raises(FormatError, match="expected less than 64000 bytes"):
        CommitLog(storage, "commits").append(large)
    assert not storage.exists("commits/00000000.json")
