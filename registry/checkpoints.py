"""Checkpoints: the folded tables in storage, as immutable sorted segments, so that nobody needs to read the log from its beginning.

A checkpoint adds one segment, the rows touched since the checkpoint before, and merges the newest segments while they are of similar
size: a row is rewritten a number of times that grows with the logarithm of history, and never once its segment is full. So the work of
one checkpoint is bounded whatever the history. Newer segments overrule older ones.

It is a shortcut and never the truth: one that is missing, damaged or of another history is passed over.
"""

import contextlib
import heapq
import itertools
import logging
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from errata.edits import canonical_json, digest_of
from errata.errors import KeyExistsError, StorageError
from registry.events import FORMAT, read_formatted
from registry.fold import EditRow, Head
from registry.index import Index
from registry.log import CommitLog
from registry.objects import ObjectStore
from registry.rows import FileUse
from registry.storage.base import Storage

SEGMENT_ROWS = 20_000
"""A segment that would become larger is not merged any more."""

_log = logging.getLogger(__name__)


class Segment(BaseModel):
    """An object with `rows` rows of the tables, one JSON line each, sorted by key, each key once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    rows: int


class Checkpoint(BaseModel):
    """The tables after commit `seq`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    seq: int
    commit: str
    """Digest of that commit's bytes."""
    head: Head
    counts: dict[str, int]
    segments: tuple[Segment, ...]
    """Oldest first."""


class Checkpoints:
    """The checkpoints of one stream.

    Args:
        prefix: where they lie, e.g. `streams/main/checkpoints`.
        segment_rows: largest segment that a merge makes.
    """

    def __init__(self, storage: Storage, prefix: str, objects: ObjectStore, segment_rows: int = SEGMENT_ROWS) -> None:
        self._storage, self._objects = storage, objects
        self._prefix = prefix.rstrip("/")
        self._segment_rows = segment_rows

    def write(self, index: Index) -> Checkpoint:
        """Write the index's tables as they stand."""
        before = Checkpoint.model_validate_json(index.checkpoint) if index.checkpoint else None
        if before and not all(self._objects.exists(segment.digest) for segment in before.segments):
            before = None  # erased: segments name digests of texts
        head, counts, rows = index.dump(since=before.seq if before else -1)
        segments = list(before.segments) if before else []
        changed = [row for _, row in sorted(map(_keyed, rows), key=itemgetter(0))]
        for first in range(0, len(changed), self._segment_rows):
            segments.append(self._store(changed[first : first + self._segment_rows]))
            self._merge_newest(segments)
        checkpoint = Checkpoint(seq=head.seq, commit=head.digest, head=head, counts=counts, segments=tuple(segments))
        # Another process may have described the same tables, perhaps in other segments: both are right.
        with contextlib.suppress(KeyExistsError):
            self._storage.create(f"{self._prefix}/{head.seq:08d}.json", canonical_json(checkpoint.model_dump(mode="json")))
        index.checkpoint = checkpoint.model_dump_json()
        return checkpoint

    def load_newest(self, index: Index, log: CommitLog) -> Checkpoint | None:
        """Fill an index from the newest checkpoint of this log that can be used; None if there is none."""
        # A listing that is late costs time only: the log is read from an older checkpoint on.
        for key in sorted((entry.key for entry in self._storage.list(f"{self._prefix}/")), reverse=True):
            try:
                checkpoint = Checkpoint.model_validate(read_formatted(self._storage.read(key), key))
                if digest_of(log.read_bytes(checkpoint.seq)) != checkpoint.commit:
                    raise StorageError(f"{key}: expected commit {checkpoint.commit} at {checkpoint.seq}, found another")
                rows = (_parse(row) for segment in checkpoint.segments for row in self._objects.iterate_rows(segment.digest))
                index.load(checkpoint.head, checkpoint.counts, rows)
            except (StorageError, ValidationError) as error:
                _log.warning("checkpoint passed over: %s", error)
                continue
            index.checkpoint = checkpoint.model_dump_json()
            return checkpoint
        return None

    def _merge_newest(self, segments: list[Segment]) -> None:
        """Merge the last two while the older is less than twice the newer: sizes then at least double from newest to oldest."""
        while len(segments) > 1:
            older, newer = segments[-2:]
            if older.rows >= 2 * newer.rows or older.rows + newer.rows > self._segment_rows:
                return
            segments[-2:] = [self._store(_overlay(self._objects.get_rows(older.digest), self._objects.get_rows(newer.digest)))]

    def _store(self, rows: Iterable[dict[str, Any]]) -> Segment:
        listed = list(rows)
        return Segment(digest=self._objects.put_rows(listed), rows=len(listed))


def _overlay(older: list[dict[str, Any]], newer: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Two sorted lists of rows as one; where both have a key, the newer row."""
    tagged = heapq.merge(((_key(row), 1, row) for row in older), ((_key(row), 0, row) for row in newer), key=itemgetter(0, 1))
    for _, group in itertools.groupby(tagged, key=itemgetter(0)):
        yield next(group)[2]


def _keyed(row: EditRow | FileUse) -> tuple[tuple[Any, ...], dict[str, Any]]:
    content = {"file": row.model_dump(mode="json")} if isinstance(row, FileUse) else {"edit": row._asdict()}
    return _key(content), content


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    edit = row.get("edit")
    return ("edit", edit["id"], edit["seq"], edit["position"]) if edit else ("file", row["file"]["digest"])


def _parse(row: dict[str, Any]) -> EditRow | FileUse:
    return EditRow(**row["edit"]) if "edit" in row else FileUse.model_validate(row["file"])
