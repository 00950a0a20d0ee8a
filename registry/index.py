"""The folded tables in a local SQLite file: where each edit stands, which slot is taken, which lines of the inbox are consumed.

It is a cache: deletable, rebuilt from a checkpoint and the log, and shared by the processes of one machine. Every commit is applied
in one transaction that first looks at the head the tables stand at, so that no commit is applied twice.
"""

import heapq
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from errata.edits import digest_of
from errata.errors import StorageError
from registry.fold import ASIDE, HELD, Changes, EditRow, Head, choose_moved, merge_use, move_row, settle_row, settles
from registry.rows import FileUse, Status

_SCHEMA_VERSION = 3
_COLUMNS = ", ".join(f'"{name}"' for name in EditRow._fields)
_SCHEMA = f"""
CREATE TABLE edits ({_COLUMNS}, lot INTEGER, touched INTEGER, PRIMARY KEY (id, seq, position)) WITHOUT ROWID;
CREATE TABLE files (digest TEXT PRIMARY KEY, content TEXT, touched INTEGER) WITHOUT ROWID;
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;
"""
_INDEXES = {
    "live_by_slot": "(slot) WHERE status = 'live'",
    "live_by_subject": "(subject) WHERE status = 'live'",
    "live_by_lot": "(lot) WHERE status = 'live'",
    "live_unwritten": "(seq, position) WHERE status = 'live' AND pairs IS NULL",
    "by_status": "(status, seq, position)",
    "by_touched": "(touched)",
}
_INSERT = f"INSERT OR REPLACE INTO edits VALUES ({', '.join('?' * (len(EditRow._fields) + 2))})"
_INSERT_FILE = "INSERT OR REPLACE INTO files VALUES (?, ?, ?)"
_SELECT = f"SELECT {_COLUMNS} FROM edits"
_PAGE = 1_000
_LAST = "\U0010ffff"
_PATIENCE = 30.0
"""Seconds to wait for another process's transaction."""


class Index:
    """The tables at some head.

    Args:
        path: the cache file; None keeps the tables in memory.

    Raises:
        StorageError: the file cannot be made.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._db: sqlite3.Connection
        self._connect()

    # Lookups. INDEXED BY: without statistics SQLite prefers the index of all live rows and reads every one.

    @property
    def head(self) -> Head | None:
        """The head the tables stand at; None while they are empty."""
        content = self._note("head")
        return Head.model_validate_json(content) if content else None

    def counts(self) -> dict[str, int]:
        """Occurrences by status, and how many records came to nothing, by outcome. Costs the same whatever the history."""
        return dict(self._db.execute("SELECT name, value FROM counts WHERE value > 0 ORDER BY name"))

    def find_edit(self, identity: str) -> EditRow | None:
        """Where an id stands: its live occurrence, else the newest that was judged, else the newest."""
        order = f"ORDER BY status = 'live' DESC, status NOT IN {ASIDE} DESC, seq DESC, position DESC LIMIT 1"
        return self._first(f"{_SELECT} WHERE id = ? {order}", identity)

    def find_occurrences(self, identity: str) -> list[EditRow]:
        """The history of an id, oldest first."""
        return self._all(f"{_SELECT} WHERE id = ? ORDER BY seq, position", identity)

    def find_slot(self, slot: str) -> EditRow | None:
        """The live edit in a conflict slot."""
        return self._first(f"{_SELECT} INDEXED BY live_by_slot WHERE status = 'live' AND slot = ?", slot)

    def find_subject(self, key: str) -> list[EditRow]:
        """The live edits of one subject by its `Edit.subject_key`, oldest first."""
        return self._all(f"{_SELECT} INDEXED BY live_by_subject WHERE status = 'live' AND subject = ? ORDER BY seq, position", key)

    def find_unwritten(self) -> list[EditRow]:
        """The live edits that have no pair and answer from memory, in order of arrival."""
        where = "WHERE status = 'live' AND pairs IS NULL"
        return self._all(f"{_SELECT} INDEXED BY live_unwritten {where} ORDER BY seq, position")

    def find_rows(self, *statuses: Status) -> Iterator[EditRow]:
        """All occurrences with one of the statuses, in order of arrival. Reads page by page, so commits may go on meanwhile."""
        return heapq.merge(*map(self._page_status, statuses), key=lambda row: (row.seq, row.position))

    def find_file(self, digest: str) -> FileUse | None:
        """What has been consumed of an inbox file with these bytes."""
        found = self._db.execute("SELECT content FROM files WHERE digest = ?", (digest,)).fetchone()
        return FileUse.model_validate_json(found[0]) if found else None

    def sample_live(self, size: int, seed: int) -> list[EditRow]:
        """At most `size` live edits, in order of arrival, uniform over `seed`, the same on every machine.

        Each occurrence has a lot, its digest; the sample is the `size` live ones whose lots follow the seed's. So it costs `size` rows
        whatever the number of live edits, and two neighbouring versions are asked about mostly the same edits.
        """
        start = _draw_lot(f"sample {seed}")
        query = f"{_SELECT} INDEXED BY live_by_lot WHERE status = 'live' AND lot {{}} ? ORDER BY lot LIMIT ?"
        rows = self._all(query.format(">="), start, size)
        rows += self._all(query.format("<"), start, size - len(rows))
        return sorted(rows, key=lambda row: (row.seq, row.position))

    def sample_between(self, first: int, last: int, size: int, seed: int) -> list[EditRow]:
        """As `sample_live`, among the live edits that commits `first` to `last` accepted. Reads the rows of all of them: for the watch, not
        for a batch."""
        order = "ORDER BY lot < ?, lot LIMIT ?"
        query = f"{_SELECT} INDEXED BY by_status WHERE status = 'live' AND seq BETWEEN ? AND ? {order}"
        rows = self._all(query, first, last, _draw_lot(f"sample {seed}"), size)
        return sorted(rows, key=lambda row: (row.seq, row.position))

    def complete(self, prefix: str, limit: int = 20) -> list[str]:
        """Ids that start with `prefix`, in order."""
        query = "SELECT DISTINCT id FROM edits WHERE id >= ? AND id < ? ORDER BY id LIMIT ?"
        return [found[0] for found in self._db.execute(query, (prefix, prefix + _LAST, limit))]

    # Changes

    def apply(self, head: Head, parent: str, changes: Changes) -> None:
        """Apply one commit, unless the tables no longer stand at its parent: then another process has applied it.

        Args:
            head: the head after the commit.
            parent: digest of the commit before, empty before the first.
        """
        with self._transaction():
            current = self.head
            if (current.digest if current else "") != parent:
                return
            for move in changes.moved:
                rows = self._all(f"{_SELECT} WHERE id = ? AND seq = ?", move.id, move.seq)
                for row in choose_moved(rows, move.status):
                    self._store(move_row(row, move), head.seq, before=row)
            for added in changes.added:
                for row in self._all(f"{_SELECT} WHERE id = ? AND status IN {HELD}", added.id):
                    if settles(added, row):
                        self._store(settle_row(row, added), head.seq, before=row)
                self._store(added, head.seq)
            for use in changes.files:
                self._store_file(merge_use(self.find_file(use.digest), use), head.seq)
            for name, number in changes.tallies.items():
                self._count(name, number)
            self._write_note("head", head.model_dump_json())

    def load(self, head: Head, counts: dict[str, int], rows: Iterable[EditRow | FileUse]) -> None:
        """Replace everything by the tables of a checkpoint; of rows with one key the last one counts. Rows are taken as they come, and
        whatever is raised on the way leaves the tables as they were."""

        def keep_files() -> Iterator[EditRow]:
            for row in rows:
                if isinstance(row, FileUse):
                    self._store_file(row, head.seq)
                else:
                    yield row

        with self._transaction():
            self._empty()
            # Made once over all rows, an index costs a fraction of what it costs row by row.
            for name in _INDEXES:
                self._db.execute(f"DROP INDEX {name}")
            self._db.executemany(_INSERT, ((*row, _draw_lot(row.occurrence), head.seq) for row in keep_files()))
            self._make_indexes()
            for name, value in counts.items():
                self._count(name, value)
            self._write_note("head", head.model_dump_json())

    def dump(self, since: int) -> tuple[Head, dict[str, int], list[EditRow | FileUse]]:
        """Head, counts, and the rows that commits after `since` touched, all of one moment."""
        with self._transaction():
            head = self.head
            if head is None:
                raise StorageError(f"index {self._path}: expected tables to dump, found none")
            rows: list[EditRow | FileUse] = list(self._all(f"{_SELECT} WHERE touched > ?", since))
            for found in self._db.execute("SELECT content FROM files WHERE touched > ?", (since,)):
                rows.append(FileUse.model_validate_json(found[0]))
            return head, self.counts(), rows

    def clear(self) -> None:
        """Forget everything: it belongs to another history."""
        with self._transaction():
            self._empty()

    def discard(self) -> None:
        """Begin with a new file: the old one is damaged."""
        self._db.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._connect()

    @property
    def checkpoint(self) -> str | None:
        """The newest checkpoint that these tables came from or were written to, as its JSON."""
        return self._note("checkpoint")

    @checkpoint.setter
    def checkpoint(self, content: str) -> None:
        self._write_note("checkpoint", content)

    def close(self) -> None:
        self._db.close()

    # SQLite

    def _connect(self) -> None:
        try:
            if self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            # Prefect runs tasks in threads; each opens its own stream, but may close it in another.
            self._db = sqlite3.connect(self._path or ":memory:", timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA secure_delete = ON")  # what is erased must not linger in free pages
            self._prepare()
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageError(f"index {self._path}: expected to open it: {error}") from error
        except sqlite3.DatabaseError:
            # No database, or a damaged one. In memory neither can be.
            self.discard()

    def _prepare(self) -> None:
        if self._db.execute("PRAGMA user_version").fetchone()[0] == _SCHEMA_VERSION:
            return
        with self._transaction():
            if self._db.execute("PRAGMA user_version").fetchone()[0] == _SCHEMA_VERSION:
                return
            for (table,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                self._db.execute(f'DROP TABLE "{table}"')
            for statement in filter(str.strip, _SCHEMA.split(";")):
                self._db.execute(statement)
            self._make_indexes()
            self._db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _make_indexes(self) -> None:
        for name, columns in _INDEXES.items():
            self._db.execute(f"CREATE INDEX {name} ON edits {columns}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _page_status(self, status: Status) -> Iterator[EditRow]:
        after = (-1, -1)
        query = f"{_SELECT} WHERE status = ? AND (seq, position) > (?, ?) ORDER BY seq, position LIMIT {_PAGE}"
        while rows := self._all(query, status, *after):
            yield from rows
            after = rows[-1].seq, rows[-1].position

    def _all(self, query: str, *values: object) -> list[EditRow]:
        return [EditRow(*found) for found in self._db.execute(query, values)]

    def _first(self, query: str, *values: object) -> EditRow | None:
        found = self._db.execute(query, values).fetchone()
        return EditRow(*found) if found else None

    def _store(self, row: EditRow, seq: int, before: EditRow | None = None) -> None:
        if before is not None:
            self._count(before.status, -1)
        self._count(row.status, 1)
        self._insert(row, seq)

    def _insert(self, row: EditRow, seq: int) -> None:
        self._db.execute(_INSERT, (*row, _draw_lot(row.occurrence), seq))

    def _store_file(self, use: FileUse, seq: int) -> None:
        self._db.execute(_INSERT_FILE, (use.digest, use.model_dump_json(), seq))

    def _count(self, name: str, number: int) -> None:
        self._db.execute("INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value", (name, number))

    def _empty(self) -> None:
        for table in ("edits", "files", "counts", "notes"):
            self._db.execute(f"DELETE FROM {table}")

    def _note(self, name: str) -> str | None:
        found = self._db.execute("SELECT content FROM notes WHERE name = ?", (name,)).fetchone()
        return str(found[0]) if found else None

    def _write_note(self, name: str, content: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, content))


def _draw_lot(name: str) -> int:
    """A number below 2**60 that is as good as random and always the same for one name."""
    return int(digest_of(name.encode())[:15], 16)
