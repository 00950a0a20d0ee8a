"""A stream's log and objects as they lie in storage, without the folded tables: for those who doubt them, or move them.

`Stream` stands on every batch and outcomes object being intact. What reads here goes on where one is not.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from errata.errors import FormatError, KeyMissingError, ObjectCorruptError
from registry.events import AcceptedCommit, Commit, ErasureCommit, SummingCommit
from registry.fold import EditRow, Head, advance_head, derive_changes, split_occurrence
from registry.index import Index
from registry.log import CommitLog
from registry.objects import ObjectStore
from registry.rows import BatchRow, FileUse, Outcome, read_rows
from registry.storage.base import Storage, open_storage
from registry.stream import check_stream

_RECENT = 16
"""Outcomes objects kept in memory: replaced edits are looked up where they were written."""


class Break(NamedTuple):
    """Where a log ends although it should go on."""

    seq: int
    """The first commit that cannot be read."""
    reason: str


class History:
    """The commits of one stream and their objects. Build it with `open_history`."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name
        self.objects = ObjectStore(storage, self.key("objects"))
        self.log = CommitLog(storage, self.key("commits"))
        self._recall = lru_cache(_RECENT)(self._read_outcomes)

    def key(self, name: str) -> str:
        """The storage key of something of this stream."""
        return f"streams/{self.name}/{name}"

    def follow(self, digest: str) -> str:
        """What is read for a digest that a commit names: its own, but where it was erased and something stands in for it."""
        try:
            return self.objects.locate(digest)
        except KeyMissingError:
            return digest

    def walk(self) -> Iterator[tuple[Commit, Head]]:
        """Every commit with the head after it, oldest first. Ends at the newest one, or silently where the log is broken: `find_break`
        tells the two apart."""
        head: Head | None = None
        while True:
            try:
                found = self.log.read_next(head.seq, head.digest) if head else self.log.read_next(-1, "")
            except (FormatError, ObjectCorruptError):
                return
            if found is None:
                return
            head = advance_head(head, *found)
            yield found[0], head

    def find_break(self, head: Head | None) -> Break | None:
        """Why the log does not go on after `head`, the last that `walk` gave; None where it simply ends there."""
        seq, digest = (head.seq, head.digest) if head else (-1, "")
        try:
            if self.log.read_next(seq, digest) is not None:
                return None
        except (FormatError, ObjectCorruptError) as error:
            return Break(seq + 1, str(error))
        prefix = self.key("commits/")
        later = [entry.key for entry in self.storage.list(prefix) if entry.key > f"{prefix}{seq + 1:08d}.json"]
        if not later:
            return None
        return Break(seq + 1, f"expected commit {seq + 1}, found none, but {len(later)} later ones up to {later[-1].rpartition('/')[2]}")

    def read_batch(self, commit: Commit) -> list[BatchRow]:
        """Raises KeyMissingError, ObjectCorruptError, FormatError: missing, damaged, or no batch."""
        return read_rows(BatchRow, self.objects.get_rows(commit.batch), f"batch of {commit.name}") if commit.batch else []

    def read_outcomes(self, commit: Commit) -> list[Outcome]:
        """Raises KeyMissingError, ObjectCorruptError, FormatError: missing, damaged, or no outcomes."""
        return self._recall(commit.outcomes, commit.name) if commit.outcomes else []

    def find_pair(self, occurrence: str) -> tuple[str, int]:
        """Where the pair of an occurrence lies: digest of the pairs object, and the row, as the commit says that accepted it.

        Raises:
            KeyMissingError, ObjectCorruptError: that commit or its outcomes are missing or damaged.
            FormatError: it accepted no such edit.
        """
        commit = self.log.read(split_occurrence(occurrence)[1])
        for outcome in self.read_outcomes(commit):
            if (outcome.occurrence, outcome.outcome) == (occurrence, "live") and outcome.pairs and outcome.row is not None:
                return outcome.pairs, outcome.row
        raise FormatError(f"{commit.name}: expected it to accept {occurrence}, found no such outcome")

    def list_live(self, seq: int) -> list[EditRow]:
        """The edits that were live after commit `seq`, from the log alone.

        Raises:
            KeyMissingError, ObjectCorruptError, FormatError: a commit, batch or outcomes object up to there is missing or damaged.
        """
        index = Index(None)
        try:
            for commit, head in self.walk():
                if commit.seq > seq:
                    break
                index.apply(head, commit.parent, derive_changes(commit, self.read_batch(commit), self.read_outcomes(commit)))
            return list(index.find_rows("live"))
        finally:
            index.close()

    def _read_outcomes(self, digest: str, name: str) -> list[Outcome]:
        return read_rows(Outcome, self.objects.get_rows(digest), f"outcomes of {name}")


def open_history(root: str | Storage, name: str) -> History:
    """The history of a stream.

    Raises:
        UnknownNameError: no such stream; the message names those there are.
        FormatError: the root was written by a newer Errata.
    """
    storage = open_storage(root) if isinstance(root, str) else root
    check_stream(storage, name)
    return History(storage, name)


def list_named(commit: Commit) -> list[tuple[str, str]]:
    """What a commit names itself, as (what it is, digest), its manifest apart."""
    uses: tuple[FileUse, ...] = commit.files
    named: list[tuple[str, str | None]] = [
        ("batch", commit.batch),
        ("outcomes", commit.outcomes),
        *(("pairs", digest) for digest in commit.pairs),
    ]
    named += [("live list", commit.live)] if isinstance(commit, SummingCommit) else []
    named += [("report", commit.report), *(("file", use.digest) for use in uses)]
    named += [("erased", commit.erased)] if isinstance(commit, ErasureCommit) else []
    return [(what, digest) for what, digest in named if digest]


def list_layers(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a version consists of, as (what it is, digest). An artifact follows from the pairs and can be made again; one above it cannot.
    What an adapter was once trained on (`built_on`) is none of it."""
    for number, layer in enumerate(manifest.get("layers", ())):
        yield from (("artifact above" if number and what == "artifact" else what, digest) for what, digest in list_layer(layer))


def list_layer(layer: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What one layer consists of, wherever it stands."""
    state = layer.get("state", {})
    named = [("artifact", digest) for digest in (layer.get("artifact"), *layer.get("parts", ()))]
    named += [("snapshot", digest) for digest in (state.get("snapshot"), *state.get("parts", ()))]
    named += [("change list", digest) for digest in state.get("pairs_since", ())]
    yield from ((what, digest) for what, digest in named if digest)


def is_accepted(commit: Commit) -> bool:
    """Whether a commit has a manifest of its own."""
    return isinstance(commit, AcceptedCommit) or commit.seq == 0
