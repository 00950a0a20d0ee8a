"""What passes between the stages of one batch: where its pairs lie, and what each round of the gate saw. Digests, never tensors."""

from pydantic import BaseModel, ConfigDict

from errata.candidates import StoredPair
from errata.edits import Risk
from errata.gate import Decision
from errata.manifests import PairRef


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PreparedRecord(_Record):
    """A prepared batch as it is stored."""

    pairs: dict[str, StoredPair]
    """Name of a pair (`errata.candidates.name_pair`) → where it lies."""
    refused: dict[str, str]
    """Edit id → why no pair can be made of it."""
    risks: dict[str, Risk] = {}
    """Edit id → what it is foretold to cost, of those with a pair."""


class Prepared(_Record):
    """A prepared batch as it is passed on."""

    record: str
    """Digest of its `PreparedRecord`."""
    ready: tuple[str, ...]
    """Ids of the edits of the order that have a pair, in order."""
    seconds: float


class Trained(_Record):
    """An adapter that was trained and stands on no head yet."""

    adapter: str | None
    """Its digest; None where nothing was trained, because memory answers too few of the edits to teach them."""
    live: int
    """Edits that were to be taught."""
    absorbed: tuple[str, ...]
    """Occurrences of those that it answers by itself."""
    went_on: bool
    """From an earlier adapter."""
    told: str
    seconds: float


class Round(_Record):
    """One candidate of a batch, from building to judgement."""

    rest: tuple[str, ...]
    """Ids of the edits in it, in order."""
    manifest: str
    placed: dict[str, PairRef] = {}
    """Edit id → the pair it has in this candidate, for its own edits and for older ones whose key group changed."""
    older: dict[str, PairRef] = {}
    """Older occurrence that leaves or gets another pair → the pair it has at the head; left out where it has none."""
    losses: dict[str, float | None] = {}
    """Edit id → nats per token of its target that are left at z; None for a pair of another stream."""
    fits: dict[str, float]
    """Edit id → ρ, the fraction of its residual that the solve realises."""
    report: str | None = None
    decision: Decision | None = None
    told: tuple[str, ...] = ()
    """What happens to the layers above, where something does."""
    live: str | None = None
    """Digest of the list of pairs that were summed from nothing, where that was not what was asked for."""
    seconds: dict[str, float] = {}
    """Stage → wall seconds."""

    @property
    def again(self) -> tuple[str, ...]:
        """Ids of the edits to try once more; none where the gate has decided."""
        return self.decision.rest if self.decision and self.decision.verdict == "retry" else ()
