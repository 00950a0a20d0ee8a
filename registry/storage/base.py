"""The only door to stored bytes: whole values under `/`-separated keys, created once, never changed in place.

What Errata needs of a storage is little: read, list, delete, and *create if absent*, atomic between any number of writers. The
commit log stands on the last one, so a storage is tried (`check_create_if_absent`) before anything is trusted to it.
"""

import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from errata.errors import InputError, KeyExistsError, StorageError, UnsafeStorageError

MEMORY_SCHEME = "memory://"
S3_SCHEME = "s3://"
PROBES = "probes/"
"""Values that are deleted right after they were stored; those that stay were left by processes that died."""


@dataclass(frozen=True)
class Entry:
    """One line of a listing: `size` in bytes, `modified` with its time zone."""

    key: str
    size: int
    modified: datetime


class Storage(Protocol):
    """A place that keeps bytes. Implementations: `local`, `s3`, `memory`; one contract suite holds them together."""

    @property
    def url(self) -> str:
        """How `open_storage` finds this place again."""
        ...

    def read(self, key: str) -> bytes:
        """The whole value.

        Raises:
            KeyMissingError: nothing is stored under `key`.
            StorageError: the storage cannot be reached or read.
        """
        ...

    def create(self, key: str, data: bytes) -> None:
        """Store a value under a new key; on return it is durable. Readers see all of it or nothing.

        A write whose answer got lost may be repeated by the implementation, so the value that is found there can be our own:
        who cares compares it.

        Raises:
            KeyExistsError: there is a value already; it is left alone.
            StorageError: not stored (no space, no permission, unreachable).
        """
        ...

    def create_from(self, key: str, file: BinaryIO) -> None:
        """As `create`, of a value that need not fit in memory: all of `file`, which can seek and is not
        used again. For values that their key tells: where
        several requests are needed (S3 above 5 GB), two writers may both believe that they created it.

        Raises:
            KeyExistsError, StorageError: as `create`.
        """
        ...

    def fetch_file(self, key: str, draft: Path) -> Path:
        """A local file that holds the value: the storage's own, not to be changed, else `draft`, written now.

        Raises:
            KeyMissingError, StorageError: as `read`.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a value; a key that is absent is no error."""
        ...

    def exists(self, key: str) -> bool: ...

    def find(self, key: str) -> Entry | None:
        """As a listing would show it; None where nothing is stored under `key`."""
        ...

    def renew(self, key: str) -> None:
        """Make `modified` the present, by the storage's own clock; the value stays as it is.

        Raises:
            KeyMissingError: nothing is stored under `key`.
        """
        ...

    def sweep(self, before: datetime) -> int:
        """Remove what writers that died before that time left half written, and no reader ever sees; how many."""
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """All values whose key starts with `prefix` (a string prefix, not a folder), in key order."""
        ...

    def list_folders(self, prefix: str) -> Iterator[str]:
        """Names of the folders directly under `prefix`, which is empty or ends with `/`, in order."""
        ...


def open_storage(url: str) -> Storage:
    """The storage at a folder, `s3://bucket/prefix` or `memory://name`. Nothing is read or written yet.

    Raises:
        InputError: a URL of another kind.
    """
    if url.startswith(S3_SCHEME):
        from registry.storage.s3 import S3Storage

        return S3Storage(url)
    if url.startswith(MEMORY_SCHEME):
        from registry.storage.memory import open_memory

        return open_memory(url)
    if "://" in url or not url:
        raise InputError(f"root: expected a folder or s3://bucket/prefix, found {url!r}")
    from registry.storage.local import LocalStorage

    return LocalStorage(url)


def check_key(key: str) -> str:
    """The key, if it is relative, without empty parts, and without parts that start with a dot (temporary files, `..`).

    Raises:
        StorageError: it is not.
    """
    if any(not part or part.startswith(".") or "\\" in part or "\0" in part for part in key.split("/")):
        raise StorageError(f"key: expected names joined by '/', none empty or starting with '.', found {key!r}")
    return key


def is_hidden(key: str) -> bool:
    """Whether a listing leaves the key out: it could not be read through `check_key`."""
    return any(not part or part.startswith(".") for part in key.split("/"))


def read_clock(storage: Storage) -> datetime:
    """What time it is for the storage: its own clock says how old its values are.

    Raises:
        StorageError: the storage cannot be written.
    """
    key = f"{PROBES}{uuid.uuid4().hex}"
    with suppress(KeyExistsError):  # nobody else's: a request whose answer got lost, and that was repeated
        storage.create(key, b"clock")
    try:
        found = storage.find(key)
    finally:
        storage.delete(key)
    if found is None:
        raise StorageError(f"{storage.url}: expected {key} right after it was stored, found none")
    return found.modified


def check_create_if_absent(storage: Storage) -> None:
    """Try what the commit log stands on: a key created twice must be refused the second time and keep its first value.

    Some servers accept the condition and ignore it; with those, two writers would both believe that they committed.

    Raises:
        UnsafeStorageError: the second creation succeeded.
        StorageError: the storage cannot be written.
    """
    key = f"{PROBES}{uuid.uuid4().hex}"
    try:
        with suppress(KeyExistsError):  # as above
            storage.create(key, b"first")
        try:
            storage.create(key, b"second")
        except KeyExistsError:
            if storage.read(key) == b"first":
                return
        raise UnsafeStorageError(
            f"{storage.url}: expected the second creation of one key to be refused, found it accepted; "
            "two writers could overwrite each other's commits here. Use a storage with conditional writes (If-None-Match)."
        )
    finally:
        storage.delete(key)
