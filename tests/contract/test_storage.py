"""What every storage promises."""

import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Barrier

import pytest

from errata.errors import InputError, KeyExistsError, KeyMissingError, StorageError, UnsafeStorageError
from registry.storage.base import Entry, Storage, check_create_if_absent, open_storage, read_clock
from registry.storage.memory import MemoryStorage

RACERS = 16


@pytest.mark.parametrize("data", [b"", b"one", bytes(range(256)) * 8_192], ids=["empty", "short", "2 MiB"])
def test_what_was_created_is_read(storage: Storage, data: bytes) -> None:
    assert not storage.exists("a/b")
    storage.create("a/b", data)
    assert storage.read("a/b") == data
    assert storage.exists("a/b")


def test_reopening_finds_the_same_values(open_again: Callable[[], Storage]) -> None:
    first = open_again()
    first.create("a/ü ñ.json", b"1")
    assert open_again().read("a/ü ñ.json") == b"1"
    assert open_storage(first.url).read("a/ü ñ.json") == b"1"


def test_a_missing_key_is_named(storage: Storage) -> None:
    with pytest.raises(KeyMissingError, match="a/b"):
        storage.read("a/b")
    storage.create("a", b"1")
    with pytest.raises(KeyMissingError):
        storage.read("a/b")


def test_a_key_is_created_once(storage: Storage) -> None:
    storage.create("a", b"first")
    with pytest.raises(KeyExistsError, match="a"):
        storage.create("a", b"second")
    assert storage.read("a") == b"first"


def test_the_clock_is_read_where_answers_get_lost(storage: Storage) -> None:
    """The request is repeated, and what it finds in its way is its own."""

    class Forgetful:
        url, find, read, delete = storage.url, storage.find, storage.read, storage.delete

        def create(self, key: str, data: bytes) -> None:
            storage.create(key, data)
            raise KeyExistsError(key)

    read_clock(Forgetful())  # type: ignore[arg-type]
    check_create_if_absent(Forgetful())  # type: ignore[arg-type]
    assert list(storage.list("")) == []


def test_a_deleted_key_is_free_again(storage: Storage) -> None:
    storage.delete("a")
    storage.create("a", b"first")
    storage.delete("a")
    storage.delete("a")
    assert not storage.exists("a")
    storage.create("a", b"second")
    assert storage.read("a") == b"second"


def test_a_listing_has_the_keys_under_a_string_prefix_in_order(storage: Storage) -> None:
    keys = ["a/b/2", "a/b/10", "a/b-c", "a/bc/1", "b", "a/b/deep/er"]
    for key in keys:
        storage.create(key, key.encode())
    entries = list(storage.list("a/b"))
    assert [entry.key for entry in entries] == sorted(keys[:4] + keys[5:])
    assert [entry.size for entry in entries] == [len(entry.key) for entry in entries]
    assert all(abs(datetime.now(UTC) - entry.modified) < timedelta(minutes=5) for entry in entries)
    assert [entry.key for entry in storage.list("a/b/")] == ["a/b/10", "a/b/2", "a/b/deep/er"]
    assert len(list(storage.list(""))) == len(keys)
    assert list(storage.list("none/")) == []


def test_folders_are_listed_without_what_is_below(storage: Storage) -> None:
    for key in ["streams/main/commits/0", "streams/main/objects/1", "streams/beta/commits/0", "streams/file", "other/x"]:
        storage.create(key, b"")
    assert list(storage.list_folders("streams/")) == ["beta", "main"]
    assert list(storage.list_folders("")) == ["other", "streams"]
    assert list(storage.list_folders("none/")) == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".", "a/.hidden", "a\\b"])
def test_keys_cannot_leave_the_root(storage: Storage, key: str) -> None:
    with pytest.raises(StorageError, match="key"):
        storage.create(key, b"1")
    with pytest.raises(StorageError, match="key"):
        storage.read(key)


def test_of_many_that_create_one_key_one_wins(open_again: Callable[[], Storage]) -> None:
    racers = [open_again() for _ in range(RACERS)]
    for attempt in range(5):
        barrier = Barrier(RACERS)

        def race(number: int, barrier: Barrier = barrier, key: str = f"commits/{attempt}") -> bool:
            barrier.wait()
            try:
                racers[number].create(key, f"racer {number}".encode() * 1_000)
            except KeyExistsError:
                return False
            return True

        with ThreadPoolExecutor(RACERS) as pool:
            won = [number for number, win in enumerate(pool.map(race, range(RACERS))) if win]
        assert len(won) == 1
        assert racers[0].read(f"commits/{attempt}") == f"racer {won[0]}".encode() * 1_000


def test_the_probe_accepts_it_and_leaves_nothing(storage: Storage) -> None:
    check_create_if_absent(storage)
    assert list(storage.list("")) == []


class _Careless(MemoryStorage):
    """Like servers that accept If-None-Match and ignore it."""

    def create(self, key: str, data: bytes) -> None:
        self.delete(key)
        super().create(key, data)


class _Lying(MemoryStorage):
    """Answers that the key exists, and overwrites it nevertheless."""

    def create(self, key: str, data: bytes) -> None:
        if self.exists(key):
            self.delete(key)
            super().create(key, data)
            raise KeyExistsError(key)
        super().create(key, data)


@pytest.mark.parametrize("kind", [_Careless, _Lying])
def test_the_probe_refuses_a_storage_that_overwrites(kind: type[MemoryStorage]) -> None:
    storage = kind()
    with pytest.raises(UnsafeStorageError, match="second creation"):
        check_create_if_absent(storage)
    entries: Iterator[Entry] = storage.list("")
    assert list(entries) == []


@pytest.mark.parametrize("url", ["gs://bucket", "", "s3://", "s3:///prefix"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="root: expected"):
        open_storage(url)


def test_one_value_is_found_as_a_listing_shows_it(storage: Storage) -> None:
    assert storage.find("a/b") is None
    storage.create("a/b", b"four")
    found = storage.find("a/b")
    assert found == next(storage.list("a/")) and found is not None and (found.key, found.size) == ("a/b", 4)


def test_a_renewed_value_is_young_and_the_same(storage: Storage) -> None:
    storage.create("a", b"first")
    before = storage.find("a")
    assert before is not None
    end = time.monotonic() + 5.0
    while (now := storage.find("a")) is not None and now.modified == before.modified and time.monotonic() < end:
        time.sleep(0.2)  # S3 tells whole seconds
        storage.renew("a")
    assert now is not None and now.modified > before.modified
    assert storage.read("a") == b"first"
    with pytest.raises(KeyExistsError):
        storage.create("a", b"second")
    with pytest.raises(KeyMissingError):
        storage.renew("b")


def test_the_clock_is_the_storages_own_and_leaves_nothing(storage: Storage) -> None:
    first = read_clock(storage)
    storage.create("a", b"1")
    made = storage.find("a")
    assert made is not None and first <= made.modified <= read_clock(storage)
    assert [entry.key for entry in storage.list("")] == ["a"]


def test_what_dead_writers_left_is_swept_and_nothing_else(storage: Storage, tmp_path: Path) -> None:
    storage.create("streams/a/objects/x", b"whole")
    left = tmp_path / "root" / "streams" / "a" / "objects" / f".{uuid.uuid4().hex}.tmp"
    local = not storage.url.partition("://")[1]
    if local:
        left.write_bytes(b"half of a text")
    assert storage.sweep(datetime.now(UTC) - timedelta(hours=1)) == 0, "it may belong to somebody at work"
    assert storage.sweep(datetime.now(UTC) + timedelta(hours=1)) == int(local)
    assert not left.exists() and storage.read("streams/a/objects/x") == b"whole"


def test_a_value_comes_from_a_file_and_goes_to_one(storage: Storage, tmp_path: Path) -> None:
    with (tmp_path / "large").open("w+b") as file:
        file.write(b"many bytes")
        storage.create_from("large", file)
        with pytest.raises(KeyExistsError):
            storage.create_from("large", file)
    assert storage.read("large") == b"many bytes"
    draft = tmp_path / "draft"
    place = storage.fetch_file("large", draft)
    assert place.read_bytes() == b"many bytes" and (place == draft) == draft.exists()
    with pytest.raises(KeyMissingError):
        storage.fetch_file("none", draft)


def test_a_value_that_takes_several_requests_is_whole(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.storage.s3._ONE_REQUEST", 4)
    (tmp_path / "large").write_bytes(b"many bytes")
    with (tmp_path / "large").open("rb") as file:
        storage.create_from("larger", file)
    with (tmp_path / "large").open("rb") as file, pytest.raises(KeyExistsError):
        storage.create_from("larger", file)
    assert storage.read("larger") == b"many bytes"
