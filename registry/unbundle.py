"""A bundle becomes a stream again: everything in it is checked before anything is written; see `registry/bundle.py`."""

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from errata.edits import canonical_json, digest_of
from errata.errors import ConflictError, FormatError, InputError, ObjectCorruptError
from registry.bundle import NEEDED, Bundled, Contents, Progress, Title
from registry.erased import announce, finish_erasures
from registry.events import Commit, ErasureCommit, InitCommit, read_commit, read_formatted
from registry.history import list_named
from registry.log import CommitLog
from registry.objects import ObjectStore
from registry.shared import BaseRef, has_base, put_base_file, put_base_record, put_moments, put_profile
from registry.storage.base import Storage
from registry.stream import claim_name

_HEX = "[0-9a-f]{64}"
_NAME = re.compile(
    rf"bundle\.json|contents\.json|objects/{_HEX}|commits/[0-9]{{8}}\.json|shared/moments/{_HEX}|shared/profiles/{_HEX}/{_HEX}\.json|"
    rf"shared/bases/{_HEX}\.json|shared/bases/{_HEX}/[A-Za-z0-9][A-Za-z0-9._-]*\.(json|safetensors|txt|model|jinja)"
)
"""All that may be in a bundle: no path leads out of it, and nothing in it can be run."""
_ORDER = ("bundle.json", "shared", "objects", "contents.json", "commits")
_UNREADABLE = (tarfile.TarError, EOFError, OSError, zlib.error)
_M = TypeVar("_M", bound=BaseModel)


class _Checked(NamedTuple):
    title: Title
    contents: Contents
    bases: dict[str, BaseRef]
    members: int


def read_bundle(storage: Storage, source: Path, name: str | None = None, on_progress: Progress | None = None) -> Bundled:
    """Make the stream of a bundle in a root. Safe to repeat after an interruption.

    Args:
        name: of the stream here; None keeps its own.

    Raises:
        InputError: no bundle, one with names that are none of a bundle's, or a stream of that name is there.
        ObjectCorruptError: something in it is not what its digest says. Nothing was written.
        FormatError: written by a newer Errata.
    """
    checked = _check_bundle(source)
    title, made = checked.title, name or checked.title.stream
    claim_name(storage, made, title.versions)
    log, objects = CommitLog(storage, f"streams/{made}/commits"), ObjectStore(storage, f"streams/{made}/objects")
    _check_leftovers(storage, made, title, source)
    known = {digest for digest in checked.bases if has_base(storage, digest)}
    first: bytes | None = None
    for done, (parts, data) in enumerate(_read_members(source)):
        match parts:
            case ["shared", "moments", _]:
                put_moments(storage, data)
            case ["shared", "profiles", base, _]:
                put_profile(storage, base, data)
            case ["shared", "bases", base, file] if base not in known:
                put_base_file(storage, base, file, data)
            case ["objects", digest]:
                _check_digest(data, digest, f"{source}: objects/{digest}")
                objects.put(data)
            case ["contents.json"]:
                for ref in checked.bases.values():
                    put_base_record(storage, ref)
            case ["commits", file]:
                seq = int(file.removesuffix(".json"))
                if seq == 0:
                    first = data
                else:
                    commit = read_commit(data, file)
                    if isinstance(commit, ErasureCommit):
                        announce(storage, f"streams/{made}/", seq, commit.erased)
                    _append(log, seq, data)
        if on_progress:
            on_progress(done + 1, checked.members)
    if first is None:
        raise InputError(f"{source}: expected a first commit, found none; did the file change meanwhile?")
    _append(log, 0, first)
    finish_erasures(storage, f"streams/{made}/")  # what they deleted is not in the bundle
    return Bundled(made, title.seq + 1, len(checked.contents.objects), checked.contents.omitted)


def _check_bundle(source: Path) -> _Checked:
    """Everything about a bundle that can be known without writing it."""
    title: Title | None = None
    contents: Contents | None = None
    bases: dict[str, BaseRef] = {}
    seen: set[str] = set()
    rank, members, tip = 0, 0, ""
    seq = -1
    for parts, data in _read_members(source):
        where, key = f"{source}: {'/'.join(parts)}", "/".join(parts)
        if key in seen or _ORDER.index(parts[0]) < rank or (title is None and parts[0] != "bundle.json"):
            raise InputError(f"{where}: expected each entry once and in order, found it too late or twice")
        rank, members = _ORDER.index(parts[0]), members + 1
        seen.add(key)
        match parts:
            case ["bundle.json"]:
                title = _parse(Title, canonical_json(read_formatted(data, where)), where)
            case ["shared", "bases", file]:
                ref = _parse(BaseRef, data, where)
                if f"{ref.digest}.json" != file:
                    raise ObjectCorruptError(f"{where}: expected the base of this name, found {ref.digest}")
                bases[ref.digest] = ref
            case ["shared", "bases", base, file]:
                wanted = bases[base].files.get(file) if base in bases else None
                if wanted is None:
                    raise InputError(f"{where}: expected a file that its base names, found another")
                _check_digest(data, wanted, where)
            case ["shared", "profiles", _, file]:
                _check_digest(data, file.removesuffix(".json"), where)
                if moments := _find_moments(data, where):
                    _require(seen, f"shared/moments/{moments}", where)
            case ["shared", "moments", digest] | ["objects", digest]:
                _check_digest(data, digest, where)
            case ["contents.json"]:
                contents = _parse(Contents, data, where)
                for digest in contents.objects:
                    _require(seen, f"objects/{digest}", where)
            case ["commits", file]:
                commit = read_commit(data, where)
                seq += 1
                if (file, commit.seq, commit.parent) != (f"{seq:08d}.json", seq, tip):
                    raise ObjectCorruptError(f"{where}: expected commit {seq} on {tip or 'nothing'}, found {commit.seq} on {commit.parent}")
                tip = digest_of(data)
                _check_named(commit, contents, bases, seen, where)
    if title is None or contents is None or (seq, tip) != (title.seq, title.head):
        raise InputError(f"{source}: expected a whole bundle, found one that is cut off" if title else f"{source}: expected a bundle")
    for ref in bases.values():
        for file in ref.files:
            _require(seen, f"shared/bases/{ref.digest}/{file}", str(source))
    return _Checked(title, contents, bases, members)


def _check_named(commit: Commit, contents: Contents | None, bases: dict[str, BaseRef], seen: set[str], where: str) -> None:
    """That a bundle holds what a commit names."""
    omitted = {item.digest for item in contents.omitted if item.what not in NEEDED} | {*contents.replaced} if contents else set()
    for _, digest in [*list_named(commit), ("manifest", commit.manifest or "")]:
        if digest and digest not in omitted:
            _require(seen, f"objects/{digest}", where)
    if isinstance(commit, InitCommit):
        base = str(commit.base["digest"])
        if base not in bases:
            raise InputError(f"{where}: expected its base {base[:12]} in the bundle, found none")
        _require(seen, f"shared/profiles/{base}/{commit.profile}.json", where)


def _check_leftovers(storage: Storage, name: str, title: Title, source: Path) -> None:
    """What an interrupted try has left may only be of this bundle."""
    prefix = f"streams/{name}/commits/"
    found = {entry.key.removeprefix(prefix) for entry in storage.list(prefix)}
    if not found:
        return
    for parts, data in _read_members(source):
        if parts[0] == "commits" and parts[1] in found:
            if storage.read(prefix + parts[1]) != data:
                break
            found.remove(parts[1])
    if found:
        raise InputError(
            f"stream {name!r} in {storage.url}: expected nothing, or what an interrupted try has left of this bundle (head {title.seq}), "
            f"found other commits, such as {min(found)}; take another name with --as"
        )


def _append(log: CommitLog, seq: int, data: bytes) -> None:
    try:
        log.append_bytes(seq, data)
    except ConflictError as error:
        raise InputError(f"unbundle: {error}") from None


def _read_members(source: Path) -> Iterator[tuple[list[str], bytes]]:
    """Name and bytes of every entry, in order."""
    try:
        with tarfile.open(source, "r:*") as tar:
            for entry in tar:
                if not entry.isreg() or not _NAME.fullmatch(entry.name):
                    raise InputError(f"{source}: expected only what belongs into a bundle, found {entry.name!r}; nothing was written")
                file = tar.extractfile(entry)
                data = file.read() if file else b""
                if len(data) != entry.size:
                    raise InputError(f"{source}: expected {entry.size} bytes of {entry.name}, found {len(data)}: the file is cut off")
                yield entry.name.split("/"), data
    except _UNREADABLE as error:
        raise InputError(f"{source}: expected a bundle that can be read, found a fault ({error})") from None


def _check_digest(data: bytes, wanted: str, where: str) -> None:
    if (found := digest_of(data)) != wanted:
        raise ObjectCorruptError(f"{where}: expected bytes with sha256 {wanted}, found {len(data)} bytes with {found}; nothing was written")


def _require(seen: set[str], key: str, where: str) -> None:
    if key not in seen:
        raise InputError(f"{where}: expected {key} in the bundle, found none; nothing was written")


def _find_moments(profile: bytes, where: str) -> str | None:
    """The second moments that a profile names; None for an editor without any."""
    try:
        found = json.loads(profile)["solve"].get("moments")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{where}: expected a profile with a solve part, found none") from None
    return None if found is None else str(found)


def _parse(model: type[_M], data: bytes, where: str) -> _M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise FormatError(f"{where}: expected a {model.__name__.lower()}, found {error.errors()[0]['msg']}") from None
