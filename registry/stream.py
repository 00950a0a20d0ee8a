"""A stream: one lineage of edits on one base model. Opens its log, objects and tables, and finds things by the names people use."""

import logging
import re
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from errata.edits import Edit, canonical_json, digest_of
from errata.errors import InputError, KeyExistsError, KeyMissingError, StorageError, UnknownNameError
from registry.checkpoints import Checkpoints
from registry.erased import finish_erasures
from registry.events import FORMAT, Commit, InitCommit, read_formatted
from registry.fold import ASIDE, EditRow, Head, advance_head, derive_changes, split_occurrence
from registry.index import Index
from registry.log import CommitLog
from registry.objects import ObjectStore
from registry.rows import BatchRow, FileUse, Outcome, read_rows
from registry.storage.base import Storage, check_create_if_absent, open_storage

ROOT_FILE = "errata.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_HEAD = re.compile(r"head(?:~([0-9]{1,8}))?")
_SHOWN = 5

_log = logging.getLogger(__name__)


class Stream:
    """One stream of a root. Build it with `open_stream` or `create_stream`.

    Attributes:
        storage: the root that holds it.
        objects: its content-addressed objects.
        log: its commits.
        index: the folded tables, at `head` after every `refresh`.
        checkpoints: the folded tables as kept in storage.
    """

    def __init__(self, storage: Storage, name: str, cache_dir: Path | None) -> None:
        self.storage, self.name = storage, name
        self.objects = ObjectStore(storage, self.key("objects"), cache_dir / "objects" if cache_dir else None)
        self.log = CommitLog(storage, self.key("commits"))
        self.checkpoints = Checkpoints(storage, self.key("checkpoints"), self.objects)
        place = digest_of(f"{storage.url} {name}".encode())[:16]
        self._cache = cache_dir / "streams" / f"{name}-{place}.sqlite" if cache_dir else None
        self.index = self._open_index()
        self._trusted = False
        self._head = self.refresh()
        self.finish_erasures()

    @property
    def head(self) -> Head:
        """The newest commit at the last `refresh`."""
        return self._head

    def key(self, name: str) -> str:
        """The storage key of something of this stream, e.g. `inbox/monday.jsonl`."""
        return f"streams/{self.name}/{name}"

    def refresh(self) -> Head:
        """Read the log up to its head and fold it into the tables.

        Raises:
            UnknownNameError: the stream has no commit.
            FormatError: written by a newer Errata, or of an unknown kind.
            ObjectCorruptError: a commit or an object it names is damaged.
            StorageError: the storage cannot be used.
        """
        try:
            self._head = self._fold()
        except sqlite3.OperationalError as error:
            if self._cache is None:
                raise StorageError(f"index in memory: {error}") from error
            self._report_cache(error)
            self.index.close()
            self.index = Index(None)
            self._head = self._fold()
        except sqlite3.DatabaseError:
            self.index.discard()
            self._head = self._fold()
        return self._head

    def finish_erasures(self) -> None:
        """Carry out what an interrupted `errata erase` has left."""
        try:
            for seq in finish_erasures(self.storage, self.key("")):
                _log.info("the erasure of commit %d is carried out", seq)
        except StorageError as error:
            _log.warning("an erasure is not carried out yet, the next command tries again: %s", error)

    def read_batch(self, commit: Commit) -> list[BatchRow]:
        """The records that a commit considered, in order of arrival."""
        return read_rows(BatchRow, self.objects.get_rows(commit.batch), f"batch of {commit.name}") if commit.batch else []

    def read_outcomes(self, commit: Commit) -> list[Outcome]:
        """What became of them."""
        return read_rows(Outcome, self.objects.get_rows(commit.outcomes), f"outcomes of {commit.name}") if commit.outcomes else []

    def read_edits(self, rows: Iterable[EditRow]) -> Iterator[Edit]:
        """The edits behind rows of the edit table, in their order. Neighbours of one batch cost one read."""
        digest, batch = "", dict[int, dict[str, Any]]()
        for row in rows:
            if row.batch != digest:
                digest, batch = row.batch, {record["position"]: record["edit"] for record in self.objects.get_rows(row.batch)}
            yield Edit.model_validate(batch[row.position])

    def read_record(self, row: EditRow) -> BatchRow:
        """The record behind a row of the edit table, with its text."""
        for record in self.objects.get_rows(row.batch):
            if record["position"] == row.position:
                return read_rows(BatchRow, [record], f"batch of commit {row.seq}")[0]
        raise StorageError(f"batch {row.batch}: expected a record at position {row.position}, found none")

    def resolve_commit(self, ref: str) -> int:
        """The commit that `12`, `head` or `head~1` means.

        Raises:
            UnknownNameError: no such commit.
        """
        back = _HEAD.fullmatch(ref)
        seq = self.head.seq - int(back[1] or 0) if back else int(ref) if re.fullmatch(r"[0-9]{1,8}", ref) else -1
        if not 0 <= seq <= self.head.seq:
            raise UnknownNameError(f"commit: expected 0 to {self.head.seq}, head or head~1 in stream {self.name!r}, found {ref!r}")
        return seq

    def resolve_edit(self, prefix: str) -> EditRow:
        """The edit that an id, the beginning of one, or an occurrence `<id>@<seq>` means.

        Raises:
            UnknownNameError: none or several.
        """
        if "@" in prefix:
            return self._resolve_occurrence(prefix)
        row = self.index.find_edit(prefix)
        if row is not None:
            return row
        ids = self.index.complete(prefix, _SHOWN + 1) if prefix else []
        if len(ids) != 1:
            found = f"{', '.join(ids[:_SHOWN])}{', …' if len(ids) > _SHOWN else ''}" if ids else "none"
            raise UnknownNameError(f"edit: expected one id in stream {self.name!r} that starts with {prefix!r}, found {found}")
        return self.resolve_edit(ids[0])

    def remove_consumed(self, files: tuple[FileUse, ...]) -> list[str]:
        """Remove inbox files that have no line left; the names that were removed.

        A file that has been written anew under its old name meanwhile is left alone. The consumed bytes are an object of the stream.
        """
        removed = []
        for use in files:
            key = self.key(f"inbox/{use.name}")
            found = self.index.find_file(use.digest)
            if found is None or not found.done:
                continue
            try:
                same = digest_of(self.storage.read(key)) == use.digest
            except KeyMissingError:
                continue
            if same:
                self.storage.delete(key)
                removed.append(use.name)
        return removed

    def _open_index(self) -> Index:
        """The tables. A cache file that cannot be used (no space, no permission, locked for long) costs time, never the stream."""
        try:
            return Index(self._cache)
        except StorageError as error:
            self._report_cache(error)
            return Index(None)

    def _report_cache(self, error: Exception) -> None:
        _log.warning("%s cannot be used, the tables are built in memory: %s", self._cache, error)

    def _fold(self) -> Head:
        if not self._trusted:
            self._drop_foreign_tables()
            self._trusted = True
        if self.index.head is None:
            self.checkpoints.load_newest(self.index, self.log)
        while True:
            head = self.index.head
            found = self.log.read_next(head.seq, head.digest) if head else self.log.read_next(-1, "")
            if found is None:
                break
            commit, digest = found
            changes = derive_changes(commit, self.read_batch(commit), self.read_outcomes(commit))
            self.index.apply(advance_head(head, commit, digest), commit.parent, changes)
        if head is None:
            raise UnknownNameError(f"stream {self.name!r}: expected a first commit in {self.storage.url}, found none")
        return head

    def _drop_foreign_tables(self) -> None:
        """A cache file may stem from a stream that stood at the same place before: its head is then not in this log."""
        head = self.index.head
        if head is None:
            return
        try:
            same = digest_of(self.log.read_bytes(head.seq)) == head.digest
        except KeyMissingError:
            same = False
        if not same:
            self.index.clear()

    def _resolve_occurrence(self, name: str) -> EditRow:
        identity, seq = split_occurrence(name)
        rows = [row for row in self.index.find_occurrences(identity) if row.seq == seq]
        if not rows:
            raise UnknownNameError(f"edit: expected an occurrence in stream {self.name!r}, found no {name!r}")
        # Records of one batch that were never judged share the name of the one that was, and may come after it.
        return max(rows, key=lambda row: (row.status not in ASIDE, row.pairs is not None, row.position))


def open_stream(root: str | Storage, name: str, cache_dir: Path | None = None) -> Stream:
    """Open a stream at its head.

    Args:
        root: folder, `s3://bucket/prefix`, or a storage.
        cache_dir: where local indexes may be kept; None keeps this one in memory.

    Raises:
        UnknownNameError: no such stream; the message names those there are.
        FormatError: the root was written by a newer Errata.
    """
    storage = open_storage(root) if isinstance(root, str) else root
    check_stream(storage, name)
    return Stream(storage, name, cache_dir)


def check_stream(storage: Storage, name: str) -> None:
    """Raises UnknownNameError, FormatError: see `open_stream`."""
    _check_root(storage)
    if not _NAME.fullmatch(name) or not storage.exists(first_commit(name)):
        known = ", ".join(list_streams(storage)) or "none; `errata init` makes one"
        raise UnknownNameError(f"stream: expected one of {storage.url} ({known}), found {name!r}")


def claim_name(storage: Storage, name: str, versions: dict[str, str]) -> None:
    """Make sure that a new stream of this name may begin here; the root is made where there is none.

    Raises:
        InputError: the name is taken, or is no name.
        UnsafeStorageError: two writers could overwrite each other there.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"stream: expected up to 63 of a-z, 0-9, '.', '_', '-', the first a letter or digit; found {name!r}")
    check_create_if_absent(storage)
    try:
        storage.create(ROOT_FILE, canonical_json({"format": FORMAT, "versions": versions}))
    except KeyExistsError:
        _check_root(storage)
    if storage.exists(first_commit(name)):
        made = CommitLog(storage, f"streams/{name}/commits").read(0).actor
        raise InputError(f"stream: expected a new name in {storage.url}, found {name!r}, made by {made}")


def create_stream(root: str | Storage, name: str, init: InitCommit, manifest: dict[str, object], cache_dir: Path | None = None) -> Stream:
    """Make a stream: its first commit names the base, the profile and the editors, and an empty manifest.

    Args:
        init: the first commit; its `manifest` is set here.
        manifest: the manifest of the untouched base.

    Raises:
        InputError: the name is taken, or is no name.
        UnsafeStorageError: two writers could overwrite each other there.
    """
    storage = open_storage(root) if isinstance(root, str) else root
    claim_name(storage, name, init.versions)
    log = CommitLog(storage, f"streams/{name}/commits")
    if any(entry.key != first_commit(name) for entry in storage.list(f"streams/{name}/commits/")):
        raise InputError(
            f"stream: expected nothing of {name!r} in {storage.url}, found commits without a first one: what an interrupted "
            "`errata unbundle` left; repeat it, or take another name"
        )
    objects = ObjectStore(storage, f"streams/{name}/objects")
    log.append(init.model_copy(update={"manifest": objects.put_json(manifest)}))
    return Stream(storage, name, cache_dir)


def list_streams(root: str | Storage) -> list[str]:
    """The streams of a root, in order."""
    storage = open_storage(root) if isinstance(root, str) else root
    return [name for name in storage.list_folders("streams/") if storage.exists(first_commit(name))]


def first_commit(name: str) -> str:
    """The key of what makes a stream exist."""
    return f"streams/{name}/commits/00000000.json"


def _check_root(storage: Storage) -> None:
    try:
        read_formatted(storage.read(ROOT_FILE), f"{storage.url}/{ROOT_FILE}")
    except KeyMissingError:
        raise UnknownNameError(f"root: expected {storage.url}/{ROOT_FILE}, found none; `errata init` makes one") from None
