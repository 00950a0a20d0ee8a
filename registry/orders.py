"""Work orders: what is to be written or taken back, and on which head. Objects of the stream, so that stages pass their digest only."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json
from registry.objects import ObjectStore
from registry.rows import BatchRow, FileUse, Outcome


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Planned(_Record):
    """One edit to write."""

    row: BatchRow
    replaces: tuple[str, ...] = ()
    """Live occurrences whose pairs are subtracted when this one is added."""


class _Stored(_Record):
    seq: int
    """The number its commit will have."""
    parent: str
    """Digest of the head commit it builds on."""
    manifest: str
    """The head's manifest."""

    def store(self, objects: ObjectStore) -> str:
        """The digest it can be read back by."""
        return objects.put(canonical_json(self))

    @classmethod
    def load(cls, objects: ObjectStore, digest: str) -> Self:
        return cls.model_validate_json(objects.get(digest))


class Source(_Record):
    """Where the edits of an order come from, if not from the inbox."""

    stream: str
    seq: int
    """Its newest commit."""


class Order(_Stored):
    """One batch, decided up to what only the model can tell."""

    additions: tuple[Planned, ...]
    rows: tuple[BatchRow, ...]
    """Records that are settled without the model, refused ones apart."""
    settled: tuple[Outcome, ...]
    files: tuple[FileUse, ...]
    """All lines considered."""
    under: str
    """Digest of the settings it is judged under."""
    source: Source | None = None
    """None for the inbox."""
    tier: Literal["memory", "weights"] = "weights"
    """Where its edits go: they answer from memory, or are written into the model."""


class WithdrawalOrder(_Stored):
    """Live edits to take back."""

    occurrences: tuple[str, ...]
    reason: str


class Held(_Record):
    """A live edit and the pair it has; None of one that answers from memory."""

    occurrence: str
    pairs: str | None
    row: int | None


class AdoptionOrder(_Stored):
    """The live edits are to be solved under another profile."""

    accepted: int
    """The commit whose state it is."""
    profile: str


class DistillationOrder(_Stored):
    """Live edits to distil into an adapter."""

    accepted: int
    """The commit whose state it stands on."""
    live: tuple[str, ...]
    """Occurrences, in order of arrival."""
    start: str | None
    """Digest of the adapter to go on from; None begins afresh."""


class RebaseOrder(_Stored):
    """Live edits to carry to another base or profile."""

    base: str
    profile: str
    editor: str
    live: tuple[Held, ...]
    """All of them, in order of arrival."""
    answered: tuple[str, ...]
    """Occurrences of those that the base already answers."""
    drop_answered: bool
