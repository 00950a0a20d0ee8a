"""What the streams of one root have in common: base models, second moments and profiles. Knows bytes and files, no tensors.

shared/bases/<digest>/<file>                        a folder base's files, copied once
shared/bases/<digest>.json                          its BaseRef, written last: a copy that was cut short is never seen
shared/moments/<sha256>                             second moments
shared/moments-parts/<plan>/…                       what they are made of while they are measured: `registry.shards`
shared/profiles/<base digest>/<sha256>.json         profiles, in canonical JSON
"""

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from errata.edits import canonical_json, digest_of
from errata.errors import FormatError, InputError, KeyExistsError, ObjectCorruptError
from registry.objects import ObjectStore
from registry.storage.base import Storage

_BASE_FILES = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})
"""What a base is loaded from. Other files of a model folder hold the same weights again (`*.bin`, `*.gguf`) or are for people."""


class BaseRef(BaseModel):
    """Where a base model comes from and how it is recognised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    kind: Literal["builtin", "folder", "hub"]
    source: str
    """The hub id; otherwise where the files came from, for people: nothing reads it again."""
    revision: str | None = None
    """Pinned commit of a hub id."""
    digest: str
    """`errata.modeling.loading.digest_model` of it, wherever it is loaded from."""
    files: dict[str, str] = {}
    """File name → sha256 of the stored copy; empty for the hub, which keeps the files itself."""

    @property
    def named(self) -> dict[str, str | None]:
        """As a commit has it."""
        return {"kind": self.kind, "source": self.source, "revision": self.revision, "digest": self.digest}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "hub" and not self.revision:
            raise ValueError(f"revision: expected the pinned commit of the hub model {self.source!r}, found none")
        return self


def put_base(storage: Storage, ref: BaseRef, folder: Path | None = None) -> BaseRef:
    """Store a base once; the reference as it is stored.

    A base that is there already is left as it is. Safe to repeat after an interruption.

    Args:
        ref: its `files` are filled in here.
        folder: where the files are; not needed for a hub base.

    Raises:
        InputError: the folder holds no model.
        StorageError: not stored.
    """
    if has_base(storage, ref.digest):
        return get_base(storage, ref.digest)
    files = {}
    if ref.kind != "hub":
        for path in _list_files(ref, folder):
            data = path.read_bytes()
            files[path.name] = digest_of(data)
            put_base_file(storage, ref.digest, path.name, data)
    put_base_record(storage, ref.model_copy(update={"files": files}))
    return get_base(storage, ref.digest)


def has_base(storage: Storage, digest: str) -> bool:
    return storage.exists(_record_key(digest))


def put_base_file(storage: Storage, digest: str, name: str, data: bytes) -> None:
    """Store one file of a base whose record (`put_base_record`) follows."""
    _put_file(storage, f"{_folder_key(digest)}/{name}", data)


def put_base_record(storage: Storage, ref: BaseRef) -> None:
    """Make a base known whose files are stored; one that is known already is left as it is."""
    with suppress(KeyExistsError):
        storage.create(_record_key(ref.digest), canonical_json(ref))


def get_base_file(storage: Storage, ref: BaseRef, name: str) -> bytes:
    """
    Raises:
        KeyMissingError: the file is gone.
        ObjectCorruptError: it is not the one that was stored.
    """
    key, expected = f"{_folder_key(ref.digest)}/{name}", ref.files[name]
    data = storage.read(key)
    if (found := digest_of(data)) != expected:
        raise ObjectCorruptError(f"{storage.url}/{key}: expected bytes with sha256 {expected}, found {len(data)} with {found}")
    return data


def get_base(storage: Storage, digest: str) -> BaseRef:
    """
    Raises:
        KeyMissingError: no such base in this root.
        FormatError: the record is not one that this version reads.
    """
    key = _record_key(digest)
    try:
        return BaseRef.model_validate_json(storage.read(key))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "record"
        raise FormatError(f"{storage.url}/{key}: expected a base of format 1, found a mismatch at {where}: {first['msg']}") from None


def fetch_base(storage: Storage, digest: str, cache: Path) -> Path:
    """A local folder with the base's files: the storage's own where it is a folder, else a copy in the cache, downloaded once.

    Raises:
        KeyMissingError: no such base, or one of its files is gone.
        InputError: a hub base, which is loaded by id and revision.
        ObjectCorruptError: a downloaded file is not the one that was stored.
    """
    ref = get_base(storage, digest)
    if ref.kind == "hub":
        raise InputError(f"base {digest[:12]}: expected one with files, found the hub model {ref.source!r} at revision {ref.revision}")
    if "://" not in storage.url:
        return Path(storage.url) / _folder_key(digest)
    shelf = cache / "bases"
    folder = shelf / digest
    if folder.is_dir():
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=shelf))
    try:
        for name in ref.files:
            (draft / name).write_bytes(get_base_file(storage, ref, name))
        draft.chmod(0o755)  # mkdtemp's folders are private
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # neither was it another process that finished first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def put_moments(storage: Storage, data: bytes) -> str:
    """Store second moments; their digest."""
    return ObjectStore(storage, "shared/moments").put(data)


def has_moments(storage: Storage, digest: str) -> bool:
    return ObjectStore(storage, "shared/moments").exists(digest)


def get_moments(storage: Storage, digest: str) -> bytes:
    """
    Raises:
        KeyMissingError: none with this digest.
        ObjectCorruptError: the bytes are not those that were stored.
    """
    return ObjectStore(storage, "shared/moments").get(digest)


def fetch_moments(storage: Storage, digest: str, cache: Path) -> bytes | Path:
    """As `get_moments`; large ones as a local file, downloaded to the cache once where the storage is elsewhere. Raises likewise."""
    return ObjectStore(storage, "shared/moments", cache / "moments").fetch(digest)


def put_profile(storage: Storage, base: str, data: bytes) -> str:
    """Store a profile of the base with this digest; the profile's digest.

    Args:
        data: the profile in canonical JSON, so that its sha256 is its digest.
    """
    digest = digest_of(data)
    _put_file(storage, _profile_key(base, digest), data)
    return digest


def get_profile(storage: Storage, base: str, digest: str) -> bytes:
    """
    Raises:
        KeyMissingError: the base has no such profile here.
        ObjectCorruptError: the bytes are not those that were stored.
    """
    key = _profile_key(base, digest)
    data = storage.read(key)
    if (found := digest_of(data)) != digest:
        raise ObjectCorruptError(f"{storage.url}/{key}: expected bytes with this sha256, found {len(data)} bytes with {found}")
    return data


def list_profiles(storage: Storage, base: str) -> list[str]:
    """Digests of the profiles that are stored for a base."""
    prefix = f"shared/profiles/{base}/"
    return sorted(entry.key.removeprefix(prefix).removesuffix(".json") for entry in storage.list(prefix))


def _list_files(ref: BaseRef, folder: Path | None) -> list[Path]:
    if folder is None or not folder.is_dir():
        raise InputError(f"base {ref.source!r}: expected a folder to copy, found {folder}")
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _BASE_FILES and not path.name.startswith("."))
    names = {path.name for path in files}
    if "config.json" not in names or not any(path.suffix == ".safetensors" for path in files):
        raise InputError(f"base {folder}: expected config.json and *.safetensors, found {', '.join(sorted(names)) or 'neither'}")
    return files


def _put_file(storage: Storage, key: str, data: bytes) -> None:
    """Store a file that no record names yet. What an interrupted copy of other bytes left under the key is replaced."""
    try:
        storage.create(key, data)
    except KeyExistsError:
        if storage.read(key) != data:
            storage.delete(key)
            storage.create(key, data)


def _folder_key(digest: str) -> str:
    return f"shared/bases/{digest}"


def _record_key(digest: str) -> str:
    return f"{_folder_key(digest)}.json"


def _profile_key(base: str, digest: str) -> str:
    return f"shared/profiles/{base}/{digest}.json"
