"""Streams: made once, found by name, and the names people use for what is in them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.errors import FormatError, InputError, ObjectCorruptError, UnknownNameError, UnsafeStorageError
from registry.commit import commit
from registry.events import InitCommit
from registry.storage.memory import MemoryStorage
from registry.stream import create_stream, list_streams, open_stream

Make = Callable[..., Any]


def test_a_new_stream_is_found_by_its_name(tmp_path: Path, init: Make) -> None:
    root = str(tmp_path / "root")
    made = create_stream(root, "main", init(), {"format": 1}, tmp_path / "cache")
    create_stream(root, "beta.2", init(), {"format": 1})
    found = open_stream(root, "main", tmp_path / "cache")
    assert found.head == made.head
    assert (found.head.seq, found.head.base, found.head.profile, found.head.champion) == (0, "b" * 64, "c" * 64, 0)
    assert found.objects.get_json(found.head.manifest) == {"format": 1}
    assert list_streams(root) == ["beta.2", "main"]
    (tmp_path / "root/streams/only-an-inbox/inbox").mkdir(parents=True)
    assert list_streams(root) == ["beta.2", "main"]


def test_an_unknown_stream_names_those_there_are(tmp_path: Path, init: Make) -> None:
    root = str(tmp_path)
    with pytest.raises(UnknownNameError, match=r"errata.json, found none; `errata init` makes one"):
        open_stream(root, "main")
    create_stream(root, "main", init(), {})
    with pytest.raises(UnknownNameError, match=r"expected one of .*\(main\), found 'mian'"):
        open_stream(root, "mian")


def test_a_stream_is_made_once(init: Make) -> None:
    storage = MemoryStorage()
    create_stream(storage, "main", init(), {})
    with pytest.raises(InputError, match="expected a new name in .*, found 'main', made by ann"):
        create_stream(storage, "main", init(actor="bob"), {})


@pytest.mark.parametrize("name", ["", "Main", "../x", "a/b", "-a", "a" * 64])
def test_names_that_are_none_are_refused(init: Make, name: str) -> None:
    with pytest.raises(InputError, match="stream: expected"):
        create_stream(MemoryStorage(), name, init(), {})


def test_a_storage_that_overwrites_gets_no_stream(init: Make) -> None:
    class Careless(MemoryStorage):
        def create(self, key: str, data: bytes) -> None:
            self.delete(key)
            super().create(key, data)

    storage = Careless()
    with pytest.raises(UnsafeStorageError):
        create_stream(storage, "main", init(), {})
    assert list(storage.list("")) == []


def test_a_root_of_a_newer_errata_is_not_touched(init: Make) -> None:
    storage = MemoryStorage()
    storage.create("errata.json", b'{"format":2,"versions":{"errata":"0.7.0"}}')
    for use in (lambda: open_stream(storage, "main"), lambda: create_stream(storage, "main", init(), {})):
        with pytest.raises(FormatError, match=r"found 2; it was written by errata 0.7.0: install that version"):
            use()
    assert [entry.key for entry in storage.list("")] == ["errata.json"]


def test_a_first_commit_needs_its_base(init: Make) -> None:
    content = {**init().model_dump(), "base": {"source": "gpt2"}}
    with pytest.raises(ValueError, match="base: expected its digest"):
        InitCommit.model_validate(content)


def test_commits_have_names(start: Make, edit: Make) -> None:
    clerk = start()
    for number in range(3):
        commit(clerk.stream, clerk.draft([(edit(f"p{number}"), "live")]), clerk.stream.head)
    found = {ref: clerk.stream.resolve_commit(ref) for ref in ("0", "3", "head", "head~1", "head~3")}
    assert found == {"0": 0, "3": 3, "head": 3, "head~1": 2, "head~3": 0}
    for ref in ("4", "head~4", "-1", "HEAD", "", "v2", "٣"):
        with pytest.raises(UnknownNameError, match="expected 0 to 3, head or head~1"):
            clerk.stream.resolve_commit(ref)


def test_edits_have_names(start: Make, edit: Make) -> None:
    clerk = start()
    batch = [(edit(f"p{number}", name=name), "live") for number, name in enumerate(["abc", "abd", "abcd", "x"])]
    commit(clerk.stream, clerk.draft(batch), clerk.stream.head)
    found = {ref: clerk.stream.resolve_edit(ref).id for ref in ("abc", "abd", "abcd", "x", "x@1")}
    assert found == {"abc": "abc", "abd": "abd", "abcd": "abcd", "x": "x", "x@1": "x"}
    with pytest.raises(UnknownNameError, match="starts with 'ab', found abc, abcd, abd"):
        clerk.stream.resolve_edit("ab")
    for ref in ("y", "", "x@2"):
        with pytest.raises(UnknownNameError, match="found"):
            clerk.stream.resolve_edit(ref)
    record = clerk.stream.read_record(clerk.stream.resolve_edit("abd"))
    assert record.edit == batch[1][0]
    assert record.origin == "in.jsonl:2"


def test_an_occurrence_is_the_record_that_was_judged(start: Make, edit: Make) -> None:
    """A stale record of the same id in the same batch shares its name and comes after it."""
    clerk = start()
    draft = clerk.draft([(edit("Ada", "Paris", name="a"), "live"), (edit("Ada", "Rome", name="a"), "stale")])
    commit(clerk.stream, draft, clerk.stream.head)
    assert [(row.position, row.status) for row in clerk.stream.index.find_occurrences("a")] == [(0, "live"), (1, "stale")]
    assert clerk.stream.resolve_edit("a@1").status == "live"


def test_a_damaged_batch_is_an_error_and_not_another_history(start: Make, edit: Make) -> None:
    storage = MemoryStorage()
    clerk = start(storage)
    made = commit(clerk.stream, clerk.draft([(edit(), "live")]), clerk.stream.head)
    key = f"streams/main/objects/{made.batch}"
    damaged = storage.read(key).replace(b"Paris", b"Perth")
    storage.delete(key)
    storage.create(key, damaged)
    with pytest.raises(ObjectCorruptError, match=made.batch):
        open_stream(storage, "main")


def test_importing_it_brings_no_heavy_library() -> None:
    heavy = ("torch", "boto3", "mlflow", "prefect", "numpy")
    code = f"import sys, registry.commit, registry.stream; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
