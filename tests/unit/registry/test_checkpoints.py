"""Checkpoints: a shortcut to the same tables, cheap to write, never needed."""

from collections.abc import Callable
from typing import Any

import pytest

from registry.checkpoints import Checkpoint, Checkpoints
from registry.commit import CHECKPOINT_EVERY, commit
from registry.storage.memory import MemoryStorage
from registry.stream import Stream

Make = Callable[..., Any]


class _Counting(MemoryStorage):
    """Remembers what was read and how much was written."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.written = 0

    def read(self, key: str) -> bytes:
        self.seen.append(key)
        return super().read(key)

    def create(self, key: str, data: bytes) -> None:
        super().create(key, data)
        self.written += len(data)


def grow(clerk: Any, edit: Make, commits: int, size: int = 1) -> None:
    for _ in range(commits):
        seq = clerk.stream.head.seq + 1
        commit(clerk.stream, clerk.draft([(edit(f"person {seq}-{i}"), "live") for i in range(size)]), clerk.stream.head)


def dump(stream: Stream) -> Any:
    head, counts, rows = stream.index.dump(since=-1)
    return head, counts, sorted(map(repr, rows))


def test_opening_without_a_cache_starts_from_the_newest_checkpoint(start: Make, edit: Make) -> None:
    storage = _Counting()
    clerk = start(storage)
    grow(clerk, edit, 2 * CHECKPOINT_EVERY + 3)
    assert [entry.key[-13:] for entry in storage.list("streams/main/checkpoints/")] == ["00000010.json", "00000020.json"]
    storage.seen.clear()
    again = Stream(storage, "main", None)
    assert dump(again) == dump(clerk.stream)
    commits = [key[-13:-5] for key in storage.seen if "/commits/" in key]
    assert commits == ["00000020", "00000021", "00000022", "00000023", "00000024"]


@pytest.mark.parametrize(
    "harm", ["no listing", "none left", "damaged", "newer format", "of another history", "segment lost", "segment damaged"]
)
def test_a_checkpoint_is_never_needed(start: Make, edit: Make, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    clerk = start(storage)
    grow(clerk, edit, 2 * CHECKPOINT_EVERY + 1)
    keys = [entry.key for entry in storage.list("streams/main/checkpoints/")]
    newest = Checkpoint.model_validate_json(storage.read(keys[-1]))
    segments = [f"streams/main/objects/{segment.digest}" for segment in newest.segments]

    def rewrite(key: str, data: bytes) -> None:
        storage.delete(key)
        storage.create(key, data)

    if harm == "no listing":
        monkeypatch.setattr(storage, "list", lambda prefix: iter(()))
    elif harm == "none left":
        for key in keys:
            storage.delete(key)
    elif harm == "damaged":
        rewrite(keys[-1], storage.read(keys[-1])[:-20])
    elif harm == "newer format":
        rewrite(keys[-1], storage.read(keys[-1]).replace(b'"format":1', b'"format":2'))
    elif harm == "of another history":
        rewrite(keys[-1], newest.model_copy(update={"commit": "0" * 64}).model_dump_json().encode())
    elif harm == "segment lost":
        storage.delete(segments[-1])
    else:
        rewrite(segments[-1], b"{}\n")
    assert dump(Stream(storage, "main", None)) == dump(clerk.stream)


def test_a_checkpoint_does_not_rewrite_what_is_old(start: Make, edit: Make) -> None:
    """With segments of at most 40 rows, the work of a checkpoint is the same after 60 of them as after 10."""
    storage = _Counting()
    clerk = start(storage)
    clerk.stream.checkpoints._segment_rows = 40
    costs, checkpoints = [], []
    for _ in range(60):
        grow(clerk, edit, 1, size=3)
        before = storage.written
        checkpoints.append(clerk.stream.checkpoints.write(clerk.stream.index))
        costs.append(storage.written - before - len(storage.read(f"streams/main/checkpoints/{checkpoints[-1].seq:08d}.json")))
    assert max(costs[10:]) <= 1.2 * max(costs[:10])
    settled = {segment.digest for segment in checkpoints[20].segments if segment.rows > 20}
    assert settled
    assert settled <= {segment.digest for segment in checkpoints[-1].segments}
    assert dump(Stream(storage, "main", None)) == dump(clerk.stream)


def test_few_segments_are_left_while_they_may_merge(start: Make, edit: Make) -> None:
    clerk = start()
    for _ in range(40):
        grow(clerk, edit, 1, size=2)
        last = clerk.stream.checkpoints.write(clerk.stream.index)
    sizes = [segment.rows for segment in last.segments]
    assert len(sizes) <= 8
    assert all(older >= 2 * newer for older, newer in zip(sizes, sizes[1:], strict=False))
    # A row is a file or an edit; each commit has two edits and a file.
    assert sum(sizes) == 40 * 3


def test_a_row_that_changed_counts_once_and_as_it_is_now(start: Make, edit: Make) -> None:
    storage = MemoryStorage()
    clerk = start(storage)
    for target in ("Paris", "Rome", "Oslo"):
        commit(clerk.stream, clerk.draft([(edit("Ada", target, name="a"), "live")]), clerk.stream.head)
        last = clerk.stream.checkpoints.write(clerk.stream.index)
    assert sum(segment.rows for segment in last.segments) == 3 + 3
    again = Stream(storage, "main", None)
    assert [row.status for row in again.index.find_occurrences("a")] == ["replaced", "replaced", "live"]


def test_writing_one_again_is_harmless(start: Make, edit: Make) -> None:
    storage = MemoryStorage()
    clerk = start(storage)
    grow(clerk, edit, 3)
    other = Stream(storage, "main", None)
    assert clerk.stream.checkpoints.write(clerk.stream.index) == clerk.stream.checkpoints.write(clerk.stream.index)
    Checkpoints(storage, "streams/main/checkpoints", other.objects).write(other.index)
    assert dump(Stream(storage, "main", None)) == dump(clerk.stream)
