"""What shards of a plan gave, on its way to second moments: a killed run goes on with what lies here. Knows bytes, no tensors.

shared/moments-parts/<plan>/<number>.json     the record of a shard, written after its sums
shared/moments-parts/<plan>/sums/<sha256>     Σ k kᵀ of one layer
shared/moments-parts/<plan>/moments           the digest of the moments that came of it; all else is deleted then
"""

from contextlib import suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from errata.edits import canonical_json
from errata.errors import KeyExistsError, KeyMissingError
from registry.objects import ObjectStore
from registry.storage.base import Storage


class ShardRecord(BaseModel):
    """What one shard gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: int
    tokens: int
    faults: int
    """Lines that could not be read."""
    sums: dict[int, str]
    """Layer → digest of its sum; empty where there were no tokens."""


class ShardStore:
    """The shards of one plan.

    Args:
        plan: its digest.
    """

    def __init__(self, storage: Storage, plan: str) -> None:
        self._storage = storage
        self._folder = f"shared/moments-parts/{plan}"
        self.sums = ObjectStore(storage, f"{self._folder}/sums")

    def find(self, shard: int) -> ShardRecord | None:
        """The record of a shard that is whole; None where it has to be computed."""
        try:
            record = ShardRecord.model_validate_json(self._storage.read(self._key(shard)))
        except (KeyMissingError, ValidationError):
            return None
        return record if all(map(self.sums.exists, record.sums.values())) else None

    def note(self, record: ShardRecord) -> None:
        """Record a shard whose sums are stored."""
        self.forget(record.shard)
        with suppress(KeyExistsError):  # another run of the same plan was faster: its sums are as good
            self._storage.create(self._key(record.shard), canonical_json(record))

    def forget(self, shard: int) -> None:
        """Let the next run compute a shard again."""
        self._storage.delete(self._key(shard))

    def finish(self, moments: str) -> None:
        """Note what came of the plan, and delete what it was made of."""
        with suppress(KeyExistsError):
            self._storage.create(f"{self._folder}/moments", moments.encode())
        for entry in list(self._storage.list(f"{self._folder}/")):
            if entry.key != f"{self._folder}/moments":
                self._storage.delete(entry.key)

    def find_moments(self) -> str | None:
        """The digest of the moments that came of the plan, if it was finished."""
        try:
            return self._storage.read(f"{self._folder}/moments").decode()
        except KeyMissingError:
            return None

    def _key(self, shard: int) -> str:
        return f"{self._folder}/{shard:06d}.json"
