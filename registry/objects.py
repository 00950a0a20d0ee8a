"""Content-addressed objects: the key of an object is the sha256 of its bytes, so it is written once and checked on every read."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from errata.edits import canonical_json, digest_of
from errata.errors import ErasedError, KeyExistsError, KeyMissingError, ObjectCorruptError, StorageError
from registry.erased import ErasureMap
from registry.storage.base import Entry, Storage

_PARSED = 500
"""Rows parsed at once."""
_HEX = frozenset("0123456789abcdef")


class ObjectStore:
    """Objects under one prefix of a storage.

    Args:
        prefix: where they lie, e.g. `streams/main/objects`.
    """

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
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
