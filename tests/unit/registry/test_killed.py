"""A process that is killed anywhere in the life of a batch: whoever comes next finishes the work, once.

The batch is applied in forked processes that end with os._exit, without any clean-up, before or after their n-th storage operation;
n goes over all of them. The same is done for every system call inside the creation of one local file.
"""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from registry.commit import commit
from registry.storage.base import Entry, Storage
from registry.storage.local import LocalStorage
from registry.stream import Stream

Make = Callable[..., Any]
KILLED = 77


class Deadly:
    """A storage that ends the process at its n-th operation (from 1): before doing it, or after."""

    def __init__(self, storage: Storage, at: int, when: str) -> None:
        self._storage, self._at, self._when, self._count = storage, at, when, 0
        self.url = storage.url

    def _do(self, name: str, *values: Any) -> Any:
        self._count += 1
        if self._count == self._at and self._when == "before":
            os._exit(KILLED)
        try:
            result = getattr(self._storage, name)(*values)
            return list(result) if name.startswith("list") else result
        finally:
            if self._count == self._at:
                os._exit(KILLED)

    def read(self, key: str) -> bytes:
        return bytes(self._do("read", key))

    def create(self, key: str, data: bytes) -> None:
        self._do("create", key, data)

    def delete(self, key: str) -> None:
        self._do("delete", key)

    def exists(self, key: str) -> bool:
        return bool(self._do("exists", key))

    def find(self, key: str) -> Entry | None:
        found = self._do("find", key)
        assert found is None or isinstance(found, Entry)
        return found

    def renew(self, key: str) -> None:
        self._do("renew", key)

    def list(self, prefix: str) -> Iterator[Entry]:
        return iter(self._do("list", prefix))

    def list_folders(self, prefix: str) -> Iterator[str]:
        return iter(self._do("list_folders", prefix))


def fork(job: Callable[[], None]) -> int:
    """Run a job in a process of its own; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def apply_inbox(storage: Storage, cache: Path | None, employ: Make, checkpoint: bool = False) -> None:
    """The life of a batch without a model: each inbox file becomes an object and a commit, then leaves the inbox."""
    stream = Stream(storage, "main", cache)
    for entry in list(storage.list(stream.key("inbox/"))):
        raw = storage.read(entry.key)
        digest = stream.objects.put(raw)
        use = stream.index.find_file(digest)
        if use is None or not use.done:
            records = [(Edit.model_validate(json.loads(line)), "live") for line in raw.splitlines()]
            parent = stream.head
            draft = employ(stream).draft(records)
            use = draft.files[0].model_copy(update={"digest": digest, "name": entry.key.rpartition("/")[2]})
            rows = [{**row, "file": digest} for row in stream.objects.get_rows(draft.batch)]
            outcomes = [{**row, "file": digest} if "file" in row else row for row in stream.objects.get_rows(draft.outcomes)]
            names = {"batch": stream.objects.put_rows(rows), "outcomes": stream.objects.put_rows(outcomes), "files": (use,)}
            commit(stream, draft.model_copy(update=names), parent)
            if checkpoint:
                stream.checkpoints.write(stream.index)
        stream.remove_consumed((use.model_copy(update={"name": entry.key.rpartition("/")[2]}),))


@pytest.fixture
def prepare(tmp_path: Path, start: Make, edit: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[LocalStorage, Path]]:
    """Makes a root with one commit and two inbox files: one replaces what is live and adds, one repeats and adds. Always the same."""
    # These processes are killed, the machine is not: waiting for the device would only make the test slow.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    place, template = tmp_path / "place", tmp_path / "template"
    storage, cache = LocalStorage(place / "root"), place / "cache"
    clerk = start(storage, cache_dir=cache)
    commit(clerk.stream, clerk.draft([(edit("Ada", "Paris", name="a"), "live")]), clerk.stream.head)
    for file, edits in {
        "1.jsonl": [edit("Ada", "Rome", name="a"), edit("Bob", "Oslo", name="b")],
        "2.jsonl": [edit("Ada", "Rome", name="a"), edit("Cleo", "Bern", name="c")],
    }.items():
        storage.create(clerk.stream.key(f"inbox/{file}"), b"".join(e.model_dump_json().encode() + b"\n" for e in edits))
    clerk.stream.index.close()
    shutil.copytree(place, template)

    def prepare() -> tuple[LocalStorage, Path]:
        shutil.rmtree(place)
        shutil.copytree(template, place)
        return storage, cache

    return prepare


def assert_all_applied_once(storage: Storage, cache: Path | None) -> None:
    stream = Stream(storage, "main", cache)
    statuses = {row.occurrence: row.status for row in stream.index.find_rows("live", "replaced", "superseded")}
    assert statuses == {"a@1": "replaced", "a@2": "live", "b@2": "live", "c@3": "live"}
    assert stream.index.counts() == {"live": 3, "replaced": 1, "duplicate": 1}
    assert stream.head.seq == stream.head.champion == 3
    assert list(storage.list(stream.key("inbox/"))) == []
    for seq in range(1, 4):
        assert all(stream.objects.get(use.digest) for use in stream.log.read(seq).files)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("checkpoint", [pytest.param(False, marks=pytest.mark.long), True])
def test_killed_at_any_storage_operation(prepare: Make, employ: Make, when: str, checkpoint: bool) -> None:
    for at in itertools.count(1):
        storage, cache = prepare()
        status = fork(lambda at=at, s=storage, c=cache: apply_inbox(Deadly(s, at, when), c, employ, checkpoint))
        assert status in (0, KILLED)
        # What a reader sees in between is a whole version: it opens, and every object it names is intact.
        seen = Stream(storage, "main", None)
        assert seen.objects.get(seen.head.manifest)
        assert seen.index.counts().get("live", 0) == {1: 1, 2: 2, 3: 3}[seen.head.seq]
        apply_inbox(storage, cache, employ)
        assert_all_applied_once(storage, cache)
        assert_all_applied_once(storage, None)
        if status == 0:
            break
    assert at > 40, "the batch has more operations than that: none may have been missed"


def test_killed_again_and_again(prepare: Make, employ: Make) -> None:
    """Each run dies a little later than the one before, on one and the same root."""
    storage, cache = prepare()
    for at in itertools.count(1):
        if fork(lambda at=at: apply_inbox(Deadly(storage, at, "after"), cache, employ, checkpoint=True)) == 0:
            break
    assert_all_applied_once(storage, cache)
    assert_all_applied_once(storage, None)


@pytest.mark.parametrize("call", ["open", "write", "fsync", "fchmod", "link", "unlink", "mkdir"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_inside_the_creation_of_a_file(tmp_path: Path, call: str, when: str) -> None:
    """The file is whole or absent, creating it again works, and no temporary file is ever listed."""
    data = b"payload " * 100_000

    def create_and_die(storage: LocalStorage, at: int) -> None:
        if call == "write":
            # Half of the bytes reach the file.
            storage._write = lambda path, _: (path.write_bytes(data[: len(data) // 2]), os._exit(KILLED))  # type: ignore[method-assign]
        else:
            real, calls = getattr(os, call), itertools.count(1)

            def deadly(*values: Any, **options: Any) -> Any:
                last = next(calls) == at
                if last and when == "before":
                    os._exit(KILLED)
                result = real(*values, **options)
                if last:
                    os._exit(KILLED)
                return result

            setattr(os, call, deadly)
        storage.create("objects/deep/x", data)

    killed = 0
    for at in itertools.count(1):
        storage = LocalStorage(tmp_path / str(at))
        status = fork(lambda at=at, s=storage: create_and_die(s, at))
        listed = [(entry.key, entry.size) for entry in storage.list("")]
        if storage.exists("objects/deep/x"):
            assert storage.read("objects/deep/x") == data
            assert listed == [("objects/deep/x", len(data))]
        else:
            assert listed == []
            storage.create("objects/deep/x", data)
            assert storage.read("objects/deep/x") == data
        killed += status == KILLED
        if status == 0 or call == "write":
            break
    assert killed, f"os.{call} is part of the creation"
