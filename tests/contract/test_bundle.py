"""A stream in one file, between every storage and every other: whole, or not at all."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit, canonical_json, digest_of
from errata.errors import ErrataError, FormatError, InputError, ObjectCorruptError, StorageError
from registry.bundle import write_bundle
from registry.commit import commit
from registry.events import EditsCommit, InitCommit
from registry.history import open_history
from registry.rows import BatchRow, FileUse, Outcome
from registry.shared import BaseRef, fetch_base, get_moments, get_profile, put_base, put_moments, put_profile
from registry.storage.base import Storage
from registry.storage.memory import MemoryStorage
from registry.stream import Stream, create_stream, list_streams, open_stream
from registry.unbundle import read_bundle

COMMON: dict[str, Any] = {"actor": "ann", "host": "here", "versions": {"errata": "0.1.0"}, "time": datetime(2026, 11, 1, tzinfo=UTC)}
BASE = "b" * 64


def make_stream(storage: Storage, folder: Path, commits: int = 3) -> Stream:
    """A stream `main` with everything that a real one has but meaning."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    put_base(storage, BaseRef(kind="folder", source="somewhere", digest=BASE), folder)
    moments = put_moments(storage, b"moments")
    profile = put_profile(storage, BASE, canonical_json({"solve": {"moments": moments}}))
    init = InitCommit(
        seq=0, parent="", base={"kind": "folder", "digest": BASE}, profile=profile, editors=("d4s",), manifest="0" * 64, **COMMON
    )
    stream = create_stream(storage, "main", init, {"base": BASE, "profile": profile, "layers": []})
    for seq in range(1, commits):
        commit_edit(stream, seq, profile)
    return stream


def commit_edit(stream: Stream, seq: int, profile: str) -> None:
    objects, edit = stream.objects, Edit(subject=f"S{seq}", prompt="{} is", target_new="x")
    raw, pairs = objects.put(f"raw {seq}".encode()), objects.put(f"pairs {seq}".encode())
    state = {"snapshot": objects.put(b"sums"), "pairs_since": [objects.put(f"changes {seq}".encode())]}
    layers = [{"artifact": objects.put(f"artifact {seq}".encode()), "built_on": [], "state": state}]
    place = {"file": raw, "line": 1, "origin": f"{seq}.jsonl:1"}
    occurrence = f"{edit.edit_id}@{seq}"
    row = BatchRow(position=0, occurrence=occurrence, edit=edit, **place)
    outcome = Outcome(outcome="live", occurrence=occurrence, pairs=pairs, row=0, **place)
    draft = EditsCommit(
        seq=seq,
        parent=stream.head.digest,
        batch=objects.put_rows([row.model_dump(mode="json", exclude_none=True)]),
        outcomes=objects.put_rows([outcome.model_dump(mode="json", exclude_none=True)]),
        pairs=(pairs,),
        manifest=objects.put_json({"base": BASE, "profile": profile, "layers": layers}),
        report=objects.put(f"report {seq}".encode()),
        files=(FileUse(digest=raw, name=f"{seq}.jsonl", lines=((1, 1),), done=True),),
        promoted=True,
        **COMMON,
    )
    commit(stream, draft, stream.head)


@pytest.fixture
def source(tmp_path: Path) -> Stream:
    return make_stream(MemoryStorage(), tmp_path / "model")


@pytest.fixture
def bundle(source: Stream, tmp_path: Path) -> Path:
    path = tmp_path / "main.tar"
    write_bundle(open_history(source.storage, "main"), path)
    return path


def read_entries(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(entry.name, tar.extractfile(entry).read()) for entry in tar]  # type: ignore[union-attr]


def write_entries(path: Path, entries: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in entries:
            entry = tarfile.TarInfo(name) if isinstance(name, str) else name
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def list_keys(storage: Storage) -> set[str]:
    return {entry.key for entry in storage.list("") if not entry.key.startswith("probes/")}


@pytest.mark.parametrize("name", ["main.tar", "main.tar.gz", "main.tgz"])
def test_a_stream_is_the_same_elsewhere(open_again: Callable[[], Storage], tmp_path: Path, name: str) -> None:
    """From the storage into a file, and from the file into another place of the same storage."""
    source = make_stream(open_again(), tmp_path / "model")
    made = write_bundle(open_history(source.storage, "main"), tmp_path / name)
    assert (made.stream, made.commits, made.omitted) == ("main", 3, ())
    target = MemoryStorage()
    assert read_bundle(target, tmp_path / name) == made
    moved = open_stream(target, "main")
    assert moved.head == source.head
    assert list(moved.index.find_rows("live")) == list(source.index.find_rows("live"))
    assert [moved.log.read_bytes(seq) for seq in range(3)] == [source.log.read_bytes(seq) for seq in range(3)]
    for entry in source.storage.list(source.key("objects/")):
        assert target.read(entry.key) == source.storage.read(entry.key)
    folder = fetch_base(target, BASE, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == b"weights" * 100
    profile = get_profile(target, BASE, moved.head.profile)
    assert get_moments(target, json.loads(profile)["solve"]["moments"]) == b"moments"


def test_any_storage_takes_it(storage: Storage, bundle: Path, source: Stream) -> None:
    made = read_bundle(storage, bundle, "other")
    assert made.stream == "other"
    assert list_streams(storage) == ["other"]
    assert open_stream(storage, "other").head == source.head
    # And beside it once more: what they share is there already.
    read_bundle(storage, bundle)
    assert list_streams(storage) == ["main", "other"]


def test_equal_streams_give_equal_files(source: Stream, bundle: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.tar"
    write_bundle(open_history(source.storage, "main"), again)
    assert again.read_bytes() == bundle.read_bytes()


def test_everything_means_objects_that_no_commit_names(source: Stream, tmp_path: Path) -> None:
    stray = source.objects.put(b"nobody names me")
    for everything in (False, True):
        write_bundle(open_history(source.storage, "main"), tmp_path / f"{everything}.tar", everything=everything)
        assert (f"objects/{stray}" in dict(read_entries(tmp_path / f"{everything}.tar"))) is everything


def test_a_file_or_a_stream_that_is_there_is_left_alone(source: Stream, bundle: Path) -> None:
    before = bundle.read_bytes(), list_keys(source.storage)
    with pytest.raises(InputError, match="new file"):
        write_bundle(open_history(source.storage, "main"), bundle)
    with pytest.raises(InputError, match="new name"):
        read_bundle(source.storage, bundle)
    assert (bundle.read_bytes(), list_keys(source.storage)) == before


def test_a_bundle_that_cannot_be_written_leaves_no_file(source: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr(tarfile.TarFile, "addfile", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_bundle(open_history(source.storage, "main"), folder / "main.tar")
    assert list(folder.iterdir()) == []


def damage(stream: Stream, digest: str) -> None:
    stream.storage.delete(stream.key(f"objects/{digest}"))
    stream.storage.create(stream.key(f"objects/{digest}"), b"damaged")


def test_what_cannot_be_had_is_left_out_and_named(source: Stream, tmp_path: Path) -> None:
    report, artifact = source.log.read(1).report or "", digest_of(b"artifact 2")
    damage(source, report)
    source.storage.delete(source.key(f"objects/{artifact}"))
    made = write_bundle(open_history(source.storage, "main"), tmp_path / "main.tar")
    assert {(item.commit, item.what, item.digest, item.fault) for item in made.omitted} == {
        (1, "report", report, "damaged"),
        (2, "artifact", artifact, "missing"),
    }
    target = MemoryStorage()
    assert read_bundle(target, tmp_path / "main.tar").omitted == made.omitted
    assert open_stream(target, "main").head == source.head


@pytest.mark.parametrize("what", ["batch", "outcomes"])
def test_a_stream_that_could_not_be_opened_is_not_bundled(source: Stream, tmp_path: Path, what: str) -> None:
    damage(source, getattr(source.log.read(1), what))
    with pytest.raises(ObjectCorruptError):
        write_bundle(open_history(source.storage, "main"), tmp_path / "main.tar")
    assert not (tmp_path / "main.tar").exists()


def test_a_broken_log_is_not_bundled(source: Stream, tmp_path: Path) -> None:
    source.storage.delete(source.key("commits/00000001.json"))
    with pytest.raises(ObjectCorruptError, match="expected commit 1, found none"):
        write_bundle(open_history(source.storage, "main"), tmp_path / "main.tar")


FORGERIES: dict[str, Callable[[str], bool]] = {
    "an object": lambda name: name.startswith("objects/"),
    "a commit": lambda name: name == "commits/00000001.json",
    "the newest commit": lambda name: name == "commits/00000002.json",
    "the weights of the base": lambda name: name.endswith(".safetensors"),
    "the moments": lambda name: name.startswith("shared/moments"),
    "the profile": lambda name: name.startswith("shared/profiles"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_what_was_tampered_with_is_refused_before_anything_is_written(bundle: Path, tmp_path: Path, what: str) -> None:
    entries = read_entries(bundle)
    index = next(index for index, (name, _) in enumerate(entries) if FORGERIES[what](name))
    name, data = entries[index]
    entries[index] = name, data.replace(b'"ann"', b'"eve"') if b'"ann"' in data else data[:-1] + b"?"
    assert entries[index][1] != data
    storage = MemoryStorage()
    with pytest.raises((InputError, StorageError)):
        read_bundle(storage, write_entries(tmp_path / "forged.tar", entries))
    assert list_keys(storage) == set()


@pytest.mark.parametrize("what", [*FORGERIES, "the title", "the contents"])
def test_what_is_left_out_is_missed(bundle: Path, tmp_path: Path, what: str) -> None:
    picks = {**FORGERIES, "the title": lambda name: name == "bundle.json", "the contents": lambda name: name == "contents.json"}
    entries = read_entries(bundle)
    index = next(index for index, (name, _) in enumerate(entries) if picks[what](name))
    storage = MemoryStorage()
    with pytest.raises((InputError, StorageError)):
        read_bundle(storage, write_entries(tmp_path / "less.tar", entries[:index] + entries[index + 1 :]))
    assert list_keys(storage) == set()


def make_link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


TRICKS: list[str | tarfile.TarInfo] = [
    "/etc/passwd",
    "../outside.json",
    f"objects/../{'a' * 64}",
    f"objects/{'a' * 64}/../../x",
    f"shared/bases/{BASE}/../../../x.json",
    f"shared/bases/{BASE}/.hidden.json",
    f"shared/bases/{BASE}/modeling.py",
    "commits/1.json",
    "C:\\x.json",
    make_link(f"objects/{'a' * 64}", "/etc/passwd", tarfile.SYMTYPE),
    make_link(f"objects/{'a' * 64}", "bundle.json", tarfile.LNKTYPE),
    make_link("commits/00000000.json", "", tarfile.CHRTYPE),
]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick if isinstance(trick, str) else f"{trick.name[:10]}-{trick.type!r}")
def test_paths_and_links_that_lead_elsewhere_are_refused(bundle: Path, tmp_path: Path, trick: str | tarfile.TarInfo) -> None:
    for entries in ([(trick, b""), *read_entries(bundle)], [*read_entries(bundle), (trick, b"")]):
        storage = MemoryStorage()
        with pytest.raises(InputError, match="belongs into a bundle"):
            read_bundle(storage, write_entries(tmp_path / "tricky.tar", entries))
        assert list_keys(storage) == set()


def test_entries_twice_or_out_of_order_are_refused(bundle: Path, tmp_path: Path) -> None:
    entries = read_entries(bundle)
    for order in ([*entries, entries[-1]], [entries[-1], *entries[:-1]], [entries[0], *entries]):
        with pytest.raises(InputError, match="once and in order"):
            read_bundle(MemoryStorage(), write_entries(tmp_path / "odd.tar", order))


@pytest.mark.parametrize("share", [0, 0.1, 0.4, 0.7])
@pytest.mark.parametrize("name", ["main.tar", "main.tar.gz"])
def test_a_file_that_is_cut_off_or_none_is_refused(source: Stream, tmp_path: Path, share: float, name: str) -> None:
    path = tmp_path / name
    write_bundle(open_history(source.storage, "main"), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    storage = MemoryStorage()
    with pytest.raises(ErrataError):
        read_bundle(storage, path)
    assert list_keys(storage) == set()


def test_a_newer_bundle_names_what_it_needs(bundle: Path, tmp_path: Path) -> None:
    entries = read_entries(bundle)
    title = json.loads(entries[0][1]) | {"format": 2, "versions": {"errata": "9.0"}}
    with pytest.raises(FormatError, match=r"errata 9\.0"):
        read_bundle(MemoryStorage(), write_entries(tmp_path / "newer.tar", [("bundle.json", canonical_json(title)), *entries[1:]]))


class Dying(MemoryStorage):
    """A storage that is cut off after some writes."""

    left = 10**9

    def create(self, key: str, data: bytes) -> None:
        if not key.startswith("probes/"):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
        super().create(key, data)


def test_interrupted_anywhere_there_is_no_stream_and_it_can_be_repeated(bundle: Path, source: Stream) -> None:
    whole = Dying()
    read_bundle(whole, bundle)
    writes = 10**9 - whole.left
    assert writes > 15
    for count in range(writes):
        storage = Dying()
        storage.left = count
        with pytest.raises(KeyboardInterrupt):
            read_bundle(storage, bundle)
        assert list_streams(storage) == []
        storage.left = 10**9
        read_bundle(storage, bundle)
        assert open_stream(storage, "main").head == source.head
        assert list_keys(storage) == list_keys(whole)


def test_what_another_bundle_left_behind_is_in_the_way(bundle: Path, source: Stream, tmp_path: Path) -> None:
    longer = make_stream(MemoryStorage(), tmp_path / "model-2", commits=5)
    path = tmp_path / "longer.tar"
    write_bundle(open_history(longer.storage, "main"), path)
    storage = Dying()
    storage.create("streams/main/commits/00000004.json", longer.log.read_bytes(4))
    with pytest.raises(InputError, match="--as"):
        read_bundle(storage, bundle)
    with pytest.raises(InputError, match="unbundle"):
        create_stream(storage, "main", _as_init(source), {"layers": []})
    assert list_streams(storage) == []
    read_bundle(storage, path)
    assert open_stream(storage, "main").head == longer.head


def _as_init(stream: Stream) -> InitCommit:
    init = stream.log.read(0)
    assert isinstance(init, InitCommit)
    return init
