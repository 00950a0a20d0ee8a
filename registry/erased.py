"""What was erased from a stream, and what stands in for it. Whoever reads objects meets it here, and in no other place.

An erasure is announced (`erasures/<seq>-<digest>`, the digest of its record, which is an object), committed, carried out, and marked as
done (`….done`). Before the commit nothing is deleted. After it whoever opens the stream carries out what is not done.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json, digest_of
from errata.errors import ErasedError, KeyExistsError, KeyMissingError
from registry.storage.base import Storage

_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})")
_DONE = ".done"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gone(_Record):
    """One object that is deleted."""

    digest: str
    by: str | None = None
    """The object that stands in for it: the same without what was erased."""
    what: str


class Waiting(_Record):
    """One inbox file that is replaced."""

    name: str
    digest: str
    by: str | None = None
    """The object with the lines that are left, if any."""


class ErasureRecord(_Record):
    """The `erased` object of an erasure commit."""

    format: int = 1
    seq: int
    """The commit's number."""
    ids: tuple[str, ...]
    commits: tuple[int, ...]
    """Accepted commits in whose state one of the edits was: it is not there any more."""
    reports: tuple[int, ...]
    """Commits whose report lost answers."""
    objects: tuple[Gone, ...]
    keys: tuple[str, ...]
    """Checkpoints and hints, as keys under the stream: they are made again."""
    inbox: tuple[Waiting, ...] = ()


class Erasure(NamedTuple):
    """An erasure that was announced."""

    digest: str
    record: ErasureRecord
    done: bool


class ErasureMap:
    """Which objects of a stream were erased. It is read only when an object is missed.

    Args:
        prefix: the stream's own, ending in `/`.
    """

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage, self._prefix = storage, prefix
        self._known: dict[str, tuple[str | None, int]] = {}

    def follow(self, digest: str) -> str | None:
        """The digest that stands in for a missing object; None where nobody erased it.

        Raises:
            ErasedError: nothing stands in for it.
        """
        if digest not in self._known:
            for erasure in read_erasures(self._storage, self._prefix):
                self._known |= {gone.digest: (gone.by, erasure.record.seq) for gone in erasure.record.objects}
        if digest not in self._known:
            return None
        by, seq = self._known[digest]
        if by is None:
            raise ErasedError(f"object {digest}: erased by commit {seq}, since it carried an edit that was erased")
        return by


def read_erasures(storage: Storage, prefix: str, *, undone: bool = False) -> Iterator[Erasure]:
    """The erasures of a stream, oldest first; with `undone` only those that are not carried out."""
    keys = [entry.key.removeprefix(f"{prefix}erasures/") for entry in storage.list(f"{prefix}erasures/")]
    for name in keys:
        found = _NAME.fullmatch(name)
        if found and not (undone and f"{name}{_DONE}" in keys):
            record = ErasureRecord.model_validate(json.loads(storage.read(f"{prefix}objects/{found[2]}")))
            yield Erasure(found[2], record, f"{name}{_DONE}" in keys)


def announce(storage: Storage, prefix: str, seq: int, digest: str) -> None:
    """Note that the record `digest` is about to be committed as commit `seq`."""
    _create(storage, _place(prefix, seq, digest))


def finish_erasures(storage: Storage, prefix: str) -> list[int]:
    """Carry out the erasures that are committed and not done; the numbers of their commits. Safe to repeat, and in two places at once."""
    finished = []
    for erasure in read_erasures(storage, prefix, undone=True):
        record, place = erasure.record, _place(prefix, erasure.record.seq, erasure.digest)
        try:
            commit = json.loads(storage.read(f"{prefix}commits/{record.seq:08d}.json"))
        except KeyMissingError:
            continue  # about to be committed, or never
        if commit.get("erased") != erasure.digest:
            storage.delete(place)  # another commit came first
            continue
        for waiting in record.inbox:
            _replace_waiting(storage, prefix, waiting)
        for key in record.keys:
            storage.delete(f"{prefix}{key}")
        for gone in record.objects:
            # What is sent again, once this is done, may have the same bytes: whoever was slower must leave it alone.
            if storage.exists(f"{place}{_DONE}"):
                break
            storage.delete(f"{prefix}objects/{gone.digest}")
        _create(storage, f"{place}{_DONE}")
        finished.append(record.seq)
    return finished


def _replace_waiting(storage: Storage, prefix: str, waiting: Waiting) -> None:
    key = f"{prefix}inbox/{waiting.name}"
    try:
        if digest_of(storage.read(key)) != waiting.digest:
            return  # another file under its name
    except KeyMissingError:
        return
    if waiting.by is not None:
        data = storage.read(f"{prefix}objects/{waiting.by}")
        with contextlib.suppress(KeyExistsError):  # an earlier try
            storage.create(f"{prefix}inbox/{waiting.name.removesuffix('.jsonl')}-{waiting.by[:12]}.jsonl", data)
    storage.delete(key)


def _place(prefix: str, seq: int, digest: str) -> str:
    return f"{prefix}erasures/{seq:08d}-{digest}"


def _create(storage: Storage, key: str) -> None:
    with contextlib.suppress(KeyExistsError):
        storage.create(key, canonical_json({"format": 1}))
