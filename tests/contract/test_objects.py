"""Objects over every storage: whole, intact, or an error."""

from collections.abc import Callable

import pytest

from errata.edits import digest_of
from errata.errors import KeyMissingError, ObjectCorruptError, StorageError
from registry.objects import ObjectStore
from registry.storage.base import Storage


@pytest.fixture
def objects(storage: Storage) -> ObjectStore:
    return ObjectStore(storage, "objects")


def test_an_object_is_found_by_its_digest(objects: ObjectStore) -> None:
    digest = objects.put(b"some bytes")
    assert digest == digest_of(b"some bytes")
    assert objects.exists(digest)
    assert objects.get(digest) == b"some bytes"
    assert objects.put(b"some bytes") == digest


def test_a_missing_object_is_named(objects: ObjectStore) -> None:
    with pytest.raises(KeyMissingError, match="a" * 64):
        objects.get("a" * 64)
    assert not objects.exists("a" * 64)


def test_damage_is_noticed_and_mended_by_the_next_put(objects: ObjectStore, storage: Storage) -> None:
    digest = objects.put(b"some bytes")
    storage.delete(f"objects/{digest}")
    storage.create(f"objects/{digest}", b"some bytez")
    with pytest.raises(ObjectCorruptError, match=digest):
        objects.get(digest)
    assert objects.put(b"some bytes") == digest
    assert objects.get(digest) == b"some bytes"


def test_rows_and_values_come_back_with_any_text(objects: ObjectStore) -> None:
    # Line and paragraph separators of Unicode, which are no line ends in JSONL.
    rows = [{"text": "a\u2028b\u2029c\x85d\ne"}, {"text": "Ωμέγα 😀", "n": 1}, {}]
    assert objects.get_rows(objects.put_rows(rows)) == rows
    assert objects.get_rows(objects.put_rows([])) == []
    assert objects.get_json(objects.put_json({"b": None, "a": [1, 2.5]})) == {"a": [1, 2.5], "b": None}


def test_one_value_has_one_digest(objects: ObjectStore) -> None:
    assert objects.put_json({"a": 1, "b": "e\u0301"}) == objects.put_json({"b": "\u00e9", "a": 1})


def test_what_is_no_json_or_no_digest_is_refused(objects: ObjectStore) -> None:
    with pytest.raises(StorageError, match="expected JSON"):
        objects.get_json(objects.put(b"\x00\x01"))
    with pytest.raises(StorageError, match="sha256"):
        objects.get("../commits/00000000.json")


def test_two_writers_of_one_object_both_succeed(open_again: Callable[[], Storage]) -> None:
    first, second = ObjectStore(open_again(), "objects"), ObjectStore(open_again(), "objects")
    second.exists = lambda digest: False  # type: ignore[method-assign]
    assert first.put(b"same") == second.put(b"same")


def test_what_is_put_again_is_renewed(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch, storage: Storage) -> None:
    renewed: list[str] = []
    monkeypatch.setattr(type(storage), "renew", lambda _, key: renewed.append(key))
    digest = objects.put(b"some bytes")
    assert renewed == []
    objects.put(b"some bytes")
    assert renewed == [f"objects/{digest}"]
    assert [(entry.key, entry.size) for entry in objects.list_all()] == [(digest, 10)]
    objects.delete(digest)
    assert objects.find(digest) is None
