"""The local folder: read-only files, nothing partial, and what a full disk does."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.errors import KeyExistsError, KeyMissingError, StorageError, UnsafeStorageError
from registry.commit import commit
from registry.storage.local import LocalStorage
from registry.stream import Stream

Make = Callable[..., Any]
RACERS = 16


def test_files_are_read_only_and_stand_where_the_key_says(tmp_path: Path) -> None:
    LocalStorage(tmp_path).create("streams/main/x", b"1")
    path = tmp_path / "streams/main/x"
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert [entry.name for entry in path.parent.iterdir()] == ["x"], "no temporary file is left"


def test_hidden_files_of_others_are_not_listed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("inbox/a.jsonl", b"1")
    (tmp_path / "inbox/.a.jsonl.swp").write_bytes(b"2")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git/config").write_bytes(b"3")
    assert [entry.key for entry in storage.list("")] == ["inbox/a.jsonl"]
    assert list(storage.list_folders("")) == ["inbox"]


def test_of_many_processes_one_creates(tmp_path: Path) -> None:
    gate, opener = os.pipe()
    children = []
    for number in range(RACERS):
        child = os.fork()
        if child == 0:
            status = 3
            try:
                os.close(opener)
                os.read(gate, 1)  # Returns for all at once, when the parent closes the other end.
                LocalStorage(tmp_path).create("commits/1", f"racer {number}".encode() * 10_000)
                status = 0
            except KeyExistsError:
                status = 1
            finally:
                os._exit(status)
        children.append(child)
    os.close(opener)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    os.close(gate)
    assert sorted(statuses) == [0] + [1] * (RACERS - 1)
    assert LocalStorage(tmp_path).read("commits/1") == f"racer {statuses.index(0)}".encode() * 10_000


@pytest.mark.parametrize("call", ["fsync", "link", "mkdir"])
def test_a_full_disk_leaves_nothing_partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    storage = LocalStorage(tmp_path / "root")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match=r"expected to store 4 bytes as .*/objects/x: No space left on device"):
            storage.create("objects/x", b"1234")
        with pytest.raises(KeyMissingError):
            storage.read("objects/x")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    storage.create("objects/x", b"1234")
    assert storage.read("objects/x") == b"1234"


def test_a_disk_that_is_full_at_any_moment_of_a_commit_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Make, edit: Make, employ: Make
) -> None:
    """From its n-th file on, nothing can be written; then there is space again, and the batch is applied once."""
    for room in range(8):
        storage, cache = LocalStorage(tmp_path / f"root{room}"), tmp_path / f"cache{room}"
        clerk = start(storage, cache_dir=cache)
        commit(clerk.stream, clerk.draft([(edit("Ada", "Paris"), "live")]), clerk.stream.head)
        real, files = LocalStorage._write, []

        def write(self: LocalStorage, path: Path, source: Any, files: Any = files, room: int = room, real: Any = real) -> None:
            if len(files) >= room:
                path.write_bytes(source.getvalue()[: len(source.getvalue()) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            files.append(path)
            real(self, path, source)

        failed = False
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "_write", write)
            try:
                commit(clerk.stream, clerk.draft([(edit("Ada", "Rome"), "live")]), clerk.stream.head)
            except StorageError as error:
                failed = True
                assert "No space left" in str(error)
        stream = Stream(storage, "main", cache)
        assert stream.head.seq == (1 if failed else 2), "a commit that could not be written is none"
        assert stream.index.counts() == ({"live": 1} if failed else {"live": 1, "replaced": 1})
        if failed:
            commit(stream, employ(stream).draft([(edit("Ada", "Rome"), "live")]), stream.head)
        assert Stream(storage, "main", None).index.counts() == {"live": 1, "replaced": 1}
        if not failed:
            break
    assert room == 7, "raw file, pairs, batch, outcomes, manifest, clock, commit"


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(UnsafeStorageError, match="hard links"):
        LocalStorage(tmp_path).create("x", b"1")


def test_a_folder_in_the_way_is_an_error_with_its_path(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.create("a", b"1")
    with pytest.raises(StorageError, match=str(tmp_path / "a")):
        storage.create("a/b", b"2")
