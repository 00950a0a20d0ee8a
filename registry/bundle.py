"""A stream in one file: its commits, the objects they name, and the base, moments and profile they need. A tar that `tar tf` shows.

bundle.json                                      whose it is, and the head it ends at
shared/{bases,moments,profiles}/…                as in a root
objects/<sha256>
contents.json                                    which objects there are, and which could not be had
commits/00000000.json …                          in order

A bundle is read twice: first every name and digest is checked, then it is written, objects first. The first commit, which makes a stream
exist, comes last: until then there is no stream, and the same bundle may be unpacked again.
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json
from errata.errors import ErasedError, InputError, KeyMissingError, ObjectCorruptError, StorageError
from registry.events import InitCommit
from registry.fold import Head
from registry.history import History, list_layers, list_named
from registry.shared import get_base, get_base_file, get_moments, get_profile
from registry.storage.base import Storage

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

NEEDED = ("batch", "outcomes")
"""Without these a stream cannot be opened."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Title(_Record):
    """`bundle.json`."""

    format: int = 1
    stream: str
    seq: int
    """Of the head."""
    head: str
    """Digest of the head's bytes."""
    versions: dict[str, str]
    """Of the first commit's writer."""


class Omission(_Record):
    """An object that a commit names and that could not be had."""

    commit: int
    what: str
    digest: str
    fault: str


class Contents(_Record):
    """`contents.json`."""

    objects: tuple[str, ...]
    omitted: tuple[Omission, ...] = ()
    replaced: tuple[str, ...] = ()
    """Objects that commits name and that were erased; others stand in for them."""


class Bundled(NamedTuple):
    """What went into a bundle, or came out of one."""

    stream: str
    commits: int
    objects: int
    omitted: tuple[Omission, ...]


class _Named(NamedTuple):
    commit: int
    what: str


def write_bundle(history: History, target: Path, *, everything: bool = False, on_progress: Progress | None = None) -> Bundled:
    """Write a stream into a new file, which is there whole or not at all.

    Args:
        target: gzipped where its name ends in `.gz` or `.tgz`.
        everything: also objects that no commit names.

    Raises:
        InputError: the file exists.
        ObjectCorruptError, KeyMissingError: a commit, a batch, outcomes or something shared is damaged or missing. Other objects that are,
            are left out and named.
    """
    if target.exists():
        raise InputError(f"bundle: expected a new file, found {target}")
    title, named, shared, replaced = _survey(history)
    for digest in _list_objects(history) if everything else ():
        named.setdefault(digest, _Named(title.seq, "object"))
    objects: list[str] = []
    omitted: list[Omission] = []
    with _replace_whole(target) as draft, tarfile.open(draft, "w:gz" if target.suffix in (".gz", ".tgz") else "w") as tar:
        _add(tar, "bundle.json", canonical_json(title))
        for base, profile in sorted(shared):
            _add_shared(tar, history.storage, base, profile)
        for done, (digest, place) in enumerate(sorted(named.items())):
            try:
                _add(tar, f"objects/{digest}", history.objects.get(digest))
                objects.append(digest)
            except (KeyMissingError, ObjectCorruptError) as error:
                if place.what in NEEDED:
                    raise
                absent = "erased" if isinstance(error, ErasedError) else "missing"
                fault = absent if isinstance(error, KeyMissingError) else "damaged"
                omitted.append(Omission(commit=place.commit, what=place.what, digest=digest, fault=fault))
            if on_progress:
                on_progress(done + 1, len(named))
        _add(tar, "contents.json", canonical_json(Contents(objects=tuple(objects), omitted=tuple(omitted), replaced=replaced)))
        for seq in range(title.seq + 1):
            _add(tar, f"commits/{seq:08d}.json", history.log.read_bytes(seq))
    return Bundled(history.name, title.seq + 1, len(objects), tuple(omitted))


def _survey(history: History) -> tuple[Title, dict[str, _Named], set[tuple[str, str]], tuple[str, ...]]:
    """What a stream consists of: its title, object → who names it, the profiles it has been under, as (base, profile), and the objects
    that are named and for which others stand in."""
    replaced: set[str] = set()
    named: dict[str, _Named] = {}
    shared: set[tuple[str, str]] = set()
    head: Head | None = None
    versions: dict[str, str] = {}
    for commit, position in history.walk():
        head = position
        for what, digest in list_named(commit):
            if (found := history.follow(digest)) != digest:
                replaced.add(digest)
            named.setdefault(found, _Named(commit.seq, what))
        if isinstance(commit, InitCommit):
            versions = commit.versions
            shared.add((str(commit.base["digest"]), commit.profile))
        if commit.manifest and commit.manifest not in named:
            named[commit.manifest] = _Named(commit.seq, "manifest")
            try:
                manifest = history.objects.get_json(commit.manifest)
            except (KeyMissingError, ObjectCorruptError):
                continue
            shared.add((manifest["base"], manifest["profile"]))
            for what, digest in list_layers(manifest):
                named.setdefault(history.follow(digest), _Named(commit.seq, what))
    broken = history.find_break(head)
    if head is None or broken is not None:
        raise ObjectCorruptError(f"bundle: expected a whole log, found it broken: {broken.reason if broken else 'no first commit'}")
    return Title(stream=history.name, seq=head.seq, head=head.digest, versions=versions), named, shared, tuple(sorted(replaced))


def _list_objects(history: History) -> Iterator[str]:
    prefix = history.key("objects/")
    return (entry.key.removeprefix(prefix) for entry in history.storage.list(prefix))


def _add_shared(tar: tarfile.TarFile, storage: Storage, base: str, profile: str) -> None:
    taken = set(tar.getnames())
    ref, data = get_base(storage, base), get_profile(storage, base, profile)
    moments = json.loads(data)["solve"].get("moments")  # not every editor has any
    if f"shared/bases/{base}.json" not in taken:
        _add(tar, f"shared/bases/{base}.json", canonical_json(ref))
        for name in sorted(ref.files):
            _add(tar, f"shared/bases/{base}/{name}", get_base_file(storage, ref, name))
    if moments and f"shared/moments/{moments}" not in taken:
        _add(tar, f"shared/moments/{moments}", get_moments(storage, moments))
    _add(tar, f"shared/profiles/{base}/{profile}.json", data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644  # no time, no owner: equal streams give equal bytes
    tar.addfile(entry, io.BytesIO(data))


@contextmanager
def _replace_whole(target: Path) -> Iterator[Path]:
    """A file beside `target` that takes its name when the block is through."""
    draft = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        draft = Path(name)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.rename(target)
    except OSError as error:
        raise StorageError(f"bundle: expected to write {target}: {error.strerror or error}") from error
    finally:
        if draft is not None:
            draft.unlink(missing_ok=True)
