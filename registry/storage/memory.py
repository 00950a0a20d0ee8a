"""Storage in this process's memory, for tests and for trying things out. `memory://name` is the same place wherever it is opened."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import BinaryIO

from errata.errors import KeyExistsError, KeyMissingError
from registry.storage.base import MEMORY_SCHEME, Entry, check_key


class MemoryStorage:
    """A dictionary behind a lock; safe between threads, invisible to other processes."""

    def __init__(self, url: str = MEMORY_SCHEME) -> None:
        self.url = url
        self._values: dict[str, tuple[bytes, datetime]] = {}
        self._lock = Lock()

    def read(self, key: str) -> bytes:
        try:
            return self._values[check_key(key)][0]
        except KeyError:
            raise KeyMissingError(f"{self.url}: expected a value under {key!r}, found none") from None

    def create(self, key: str, data: bytes) -> None:
        check_key(key)
        with self._lock:
            if key in self._values:
                raise KeyExistsError(f"{self.url}: expected no value under {key!r}, found one")
            self._values[key] = bytes(data), datetime.now(UTC)

    def create_from(self, key: str, file: BinaryIO) -> None:
        file.seek(0)
        self.create(key, file.read())

    def fetch_file(self, key: str, draft: Path) -> Path:
        draft.write_bytes(self.read(key))
        return draft

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._values.pop(key, None)

    def exists(self, key: str) -> bool:
        return check_key(key) in self._values

    def find(self, key: str) -> Entry | None:
        found = self._values.get(check_key(key))
        return Entry(key, len(found[0]), found[1]) if found else None

    def renew(self, key: str) -> None:
        with self._lock:
            if check_key(key) not in self._values:
                raise KeyMissingError(f"{self.url}: expected a value under {key!r}, found none")
            self._values[key] = self._values[key][0], datetime.now(UTC)

    def sweep(self, before: datetime) -> int:
        return 0

    def list(self, prefix: str) -> Iterator[Entry]:
        with self._lock:
            found = [Entry(key, len(data), modified) for key, (data, modified) in self._values.items() if key.startswith(prefix)]
        yield from sorted(found, key=lambda entry: entry.key)

    def list_folders(self, prefix: str) -> Iterator[str]:
        with self._lock:
            rests = [key.removeprefix(prefix) for key in self._values if key.startswith(prefix)]
        yield from sorted({rest.split("/", 1)[0] for rest in rests if "/" in rest})


_OPEN: dict[str, MemoryStorage] = {}
"""What has been opened by name: a place in memory has no other home than the process."""


def open_memory(url: str) -> MemoryStorage:
    return _OPEN.setdefault(url, MemoryStorage(url))
