"""Content-addressed objects: the key of an object is the sha256 of its bytes, so it is written once and checked on every read."""

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from errata.edits import canonical_json, digest_of
from errata.errors import ErasedError, KeyExistsError, KeyMissingError, ObjectCorruptError, StorageError
from registry.erased import ErasureMap
from registry.storage.base import Entry, Storage

_LARGE = 2**26
"""Bytes from which on an object is a file rather than bytes in memory, where its reader can use one."""
_STALE = 2 * 86_400.0
"""Seconds after which a local copy that nobody has asked for goes."""
_PARSED = 500
"""Rows parsed at once."""
_HEX = frozenset("0123456789abcdef")


class ObjectStore:
    """Objects under one prefix of a storage.

    Args:
        prefix: where they lie, e.g. `streams/main/objects`.
        shelf: local folder for large ones of a storage that is elsewhere; without one they are read as all others are.
    """

    def __init__(self, storage: Storage, prefix: str, shelf: Path | None = None) -> None:
        self._storage = storage
        self._shelf = shelf
        self._prefix = prefix.rstrip("/")
        self._erased = ErasureMap(storage, self._prefix.removesuffix("objects"))

    def get(self, digest: str) -> bytes:
        """
        Raises:
            ErasedError: there is none any more, on purpose. Where it held other edits, too, what stands in for it is read instead.
            KeyMissingError: there is no such object.
            ObjectCorruptError: its bytes are not those that were stored.
        """
        try:
            data = self._storage.read(self._key(digest))
        except KeyMissingError:
            if (by := self._erased.follow(digest)) is None:
                raise
            return self.get(by)
        if (found := digest_of(data)) != digest:
            raise ObjectCorruptError(
                f"{self._storage.url}/{self._key(digest)}: expected bytes with this sha256, found {len(data)} bytes with {found}"
            )
        return data

    def fetch(self, digest: str) -> bytes | Path:
        """As `get`; a large one as a local file, which is not to be changed: the storage's own, or one on the shelf, where it is
        downloaded to and checked once. Raises as `get`."""
        found = self._storage.find(self._key(digest))
        if found is None or found.size < _LARGE or self._shelf is None:
            return self.get(digest)
        kept = self._shelf / digest
        if kept.is_file():
            with suppress(FileNotFoundError):
                os.utime(kept)
                return kept
        with _fetched(self._storage, self._key(digest), self._shelf) as path:
            if (wrong := _digest_file(path)) != digest:
                raise ObjectCorruptError(f"{self._storage.url}/{self._key(digest)}: expected bytes with this sha256, found {wrong}")
            if path.parent != self._shelf:
                return path
            path.rename(kept)
        drop_stale(self._shelf)
        return kept

    def put_from(self, write: Callable[[BinaryIO], object]) -> str:
        """As `put`, of what `write` writes; what is large goes through a file."""
        shelf = self._make_shelf()
        with tempfile.SpooledTemporaryFile(max_size=_LARGE, dir=str(shelf) if shelf else None) as spool:
            file = cast(BinaryIO, spool)
            write(file)
            size = file.tell()
            file.seek(0)
            if size < _LARGE:
                return self.put(file.read())
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # asks for what is there from Python 3.11 on
            key = self._key(digest)
            if self._storage.exists(key):
                with suppress(KeyMissingError), _fetched(self._storage, key, shelf) as path:
                    if _digest_file(path) == digest:
                        self._storage.renew(key)
                        return digest
                self._storage.delete(key)
            with suppress(KeyExistsError):
                self._storage.create_from(key, file)
            return digest

    def _make_shelf(self) -> Path | None:
        if self._shelf is not None:
            self._shelf.mkdir(parents=True, exist_ok=True)
        return self._shelf

    def put(self, data: bytes) -> str:
        """Store bytes; their digest. On return an intact copy is stored, whether by this call or an earlier one: what lies there
        already is read and, if damaged, replaced, and its age begins anew, so that it is not collected as garbage meanwhile."""
        digest = digest_of(data)
        key = self._key(digest)
        if not self._storage.exists(key):  # an erased one that comes again is stored again
            try:
                self._storage.create(key, data)
                return digest
            except KeyExistsError:
                pass  # Another writer stored the same bytes meanwhile, or a repeated request met its own first try.
        try:
            if digest_of(self._storage.read(key)) == digest:
                self._storage.renew(key)
                return digest
            self._storage.delete(key)
        except KeyMissingError:
            pass  # Collected since we looked.
        with suppress(KeyExistsError):
            self._storage.create(key, data)
        return digest

    def exists(self, digest: str) -> bool:
        """Whether it, or what stands in for it, can be read."""
        if self._storage.exists(self._key(digest)):
            return True
        try:
            by = self._erased.follow(digest)
        except ErasedError:
            return False
        return by is not None and self.exists(by)

    def locate(self, digest: str) -> str:
        """The digest of what is read for `digest`: its own, but where it was erased.

        Raises:
            ErasedError, KeyMissingError: as `get`.
        """
        if self._storage.exists(self._key(digest)):
            return digest
        if (by := self._erased.follow(digest)) is None:
            raise KeyMissingError(f"{self._storage.url}/{self._key(digest)}: expected an object, found none")
        return self.locate(by)

    def find(self, digest: str) -> Entry | None:
        """Size and age of an object; None if there is none."""
        return self._storage.find(self._key(digest))

    def renew(self, digest: str) -> None:
        """Begin an object's age anew. Raises KeyMissingError: there is none."""
        self._storage.renew(self._key(digest))

    def delete(self, digest: str) -> None:
        """Remove an object; one that is absent is no error."""
        self._storage.delete(self._key(digest))

    def list_all(self) -> Iterator[Entry]:
        """All objects in the order of their digests, which stand in place of the keys."""
        for entry in self._storage.list(f"{self._prefix}/"):
            yield replace(entry, key=entry.key.removeprefix(f"{self._prefix}/"))

    def get_json(self, digest: str) -> Any:
        return self._parse(digest, self.get(digest))

    def put_json(self, value: Any) -> str:
        return self.put(canonical_json(value))

    def get_rows(self, digest: str) -> list[dict[str, Any]]:
        """The rows of a JSONL object, in order."""
        return list(self.iterate_rows(digest))

    def iterate_rows(self, digest: str) -> Iterator[dict[str, Any]]:
        """As `get_rows`, without all rows in memory at once."""
        lines = [line for line in self.get(digest).split(b"\n") if line]
        for start in range(0, len(lines), _PARSED):
            # Parsed together, since most of the time goes into beginning.
            yield from self._parse(digest, b"[" + b",".join(lines[start : start + _PARSED]) + b"]")

    def put_rows(self, rows: Iterable[dict[str, Any]]) -> str:
        return self.put(b"".join(canonical_json(row) + b"\n" for row in rows))

    def _parse(self, digest: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise StorageError(f"object {digest}: expected JSON, found {data[:40]!r} ({error})") from None

    def _key(self, digest: str) -> str:
        if len(digest) != 64 or not _HEX.issuperset(digest):
            raise StorageError(f"object: expected a sha256 in 64 hex digits, found {digest!r}")
        return f"{self._prefix}/{digest}"


def drop_stale(folder: Path) -> None:
    """Remove what lies in a folder of local copies and was not used for two days; what is open somewhere stays until it is closed."""
    end = time.time() - _STALE
    for path in folder.iterdir() if folder.is_dir() else ():
        with suppress(OSError):
            if path.stat().st_mtime < end:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _fetched(storage: Storage, key: str, shelf: Path | None) -> Iterator[Path]:
    """A local file with the value, at once on the shelf or the storage's own. One on the shelf goes unless it was renamed."""
    with tempfile.TemporaryDirectory(prefix=".fetch-") if shelf is None else nullcontext(str(shelf)) as folder:
        draft = Path(folder) / f".{uuid.uuid4().hex}"
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield storage.fetch_file(key, draft)
        finally:
            draft.unlink(missing_ok=True)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_metadata(data: bytes) -> dict[str, Any]:
    """What a safetensors object of ours says of itself; nothing for anything else."""
    try:
        length = int.from_bytes(data[:8], "little")
        found = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["errata"])
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}
