"""The work order of one batch: what is to be written on which head. An object of the stream, so that stages pass its digest only."""

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json
from registry.events import BatchRow, FileUse, Outcome
from registry.objects import ObjectStore


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Planned(_Record):
    """One edit to write."""

    row: BatchRow
    replaces: tuple[str, ...] = ()
    """Live occurrences whose pairs are subtracted when this one is added."""


class Order(_Record):
    """One batch, decided up to what only the model can tell."""

    seq: int
    """The number its commit will have."""
    parent: str
    """Digest of the head commit it builds on."""
    manifest: str
    """The head's manifest."""
    additions: tuple[Planned, ...]
    rows: tuple[BatchRow, ...]
    """Records that are settled without the model, refused ones apart."""
    settled: tuple[Outcome, ...]
    files: tuple[FileUse, ...]
    """All lines considered."""
    under: str
    """Digest of the settings it is judged under."""

    def store(self, objects: ObjectStore) -> str:
        """The digest it can be read back by."""
        return objects.put(canonical_json(self))

    @classmethod
    def load(cls, objects: ObjectStore, digest: str) -> "Order":
        return cls.model_validate_json(objects.get(digest))
