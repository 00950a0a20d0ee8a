"""Storage in a local folder (or a mounted one with hard links): one read-only file per key, whole or absent at any moment.

A value is written to a hidden temporary file in the key's own folder, flushed to the device, and then *linked* to its name: a link
is atomic and fails when the name is taken, also between processes. Hidden names are never listed and never keys.
"""

import contextlib
import errno
import io
import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from errata.errors import KeyExistsError, KeyMissingError, StorageError, UnsafeStorageError
from registry.storage.base import Entry, check_key, is_hidden

_READ_ONLY = 0o444
_PIECE = 2**20
"""Bytes copied at once."""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}


class LocalStorage:
    """A folder; made when the first value is created."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root).expanduser().absolute()
        self.url = str(self._root)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise KeyMissingError(f"expected a file {path}, found none") from None
        except OSError as error:
            raise StorageError(f"expected to read {path}: {error.strerror}") from error

    def create(self, key: str, data: bytes) -> None:
        self.create_from(key, io.BytesIO(data))

    def create_from(self, key: str, file: BinaryIO) -> None:
        path = self._path(key)
        if path.exists():
            raise KeyExistsError(f"expected no file {path}, found one")
        temporary, size = path.parent / f".{uuid.uuid4().hex}.tmp", file.seek(0, io.SEEK_END)
        try:
            self._make_folder(path.parent)
            try:
                self._write(temporary, file)
                self._link(temporary, path)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    temporary.unlink()
            self._flush_folder(path.parent)
        except OSError as error:
            raise StorageError(f"expected to store {size} bytes as {path}: {error.strerror}") from error

    def fetch_file(self, key: str, draft: Path) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise KeyMissingError(f"expected a file {path}, found none")
        return path

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StorageError(f"expected to delete {path}: {error.strerror}") from error

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def find(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))

    def renew(self, key: str) -> None:
        path = self._path(key)
        try:
            os.utime(path)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyMissingError(f"expected a file {path}, found none") from None
        except OSError as error:
            raise StorageError(f"expected to renew {path}: {error.strerror}") from error

    def sweep(self, before: datetime) -> int:
        swept = 0
        for path in self._root.rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before.timestamp():
                    path.unlink()
                    swept += 1
        return swept

    def list(self, prefix: str) -> Iterator[Entry]:
        top = self._root / prefix.rpartition("/")[0]
        found = []
        for folder, _, names in os.walk(top):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and not is_hidden(key):
                    # A file may go between being listed and being looked at: then it is not listed.
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        found.append(Entry(key, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC)))
        yield from sorted(found, key=lambda entry: entry.key)

    def list_folders(self, prefix: str) -> Iterator[str]:
        top = self._root / prefix
        if top.is_dir():
            yield from sorted(path.name for path in top.iterdir() if path.is_dir() and not is_hidden(path.name))

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder whose own entry is durable, too: else a value could vanish together with its folder."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        self._flush_folder(folder.parent)

    def _write(self, path: Path, source: BinaryIO) -> None:
        source.seek(0)
        with path.open("xb") as file:
            shutil.copyfileobj(source, file, _PIECE)
            file.flush()
            # Some mounted file systems know no permissions; read-only is a guard against accidents, not a promise.
            with contextlib.suppress(PermissionError):
                os.fchmod(file.fileno(), _READ_ONLY)
            os.fsync(file.fileno())

    def _link(self, temporary: Path, path: Path) -> None:
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise KeyExistsError(f"expected no file {path}, found one") from None
        except OSError as error:
            if error.errno in _NO_LINKS:
                raise UnsafeStorageError(
                    f"{self._root}: expected a file system with hard links, which create-if-absent needs; found none ({error.strerror})"
                ) from error
            raise

    def _flush_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
