"""What became of a batch, a withdrawal, a rollback or a compaction, as people and callers of the flows see it."""

import math
from collections.abc import Mapping
from statistics import median as middle
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from errata.edits import Risk
from errata.report import Withdrawal


class RiskSpread(BaseModel):
    """Risks of a batch, in nats (`errata.edits.Risk.figure`). What is not finite is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edits: int
    """How many were measured: those that were to be written into weights."""
    median: float | None
    worst: float | None
    edit: str
    """Id of the worst."""

    @classmethod
    def over(cls, risks: Mapping[str, Risk]) -> Self | None:
        """Of edits by id; None of none."""
        if not risks:
            return None
        worst = max(risks, key=lambda edit_id: risks[edit_id].figure)
        median, highest = (
            value if math.isfinite(value) else None for value in (middle(risk.figure for risk in risks.values()), risks[worst].figure)
        )
        return cls(edits=len(risks), median=median, worst=highest, edit=worst)


class BatchSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int | None
    """Number of the commit; None for a dry run."""
    decision: str
    """`accept`; `hold`, which is accepted and waits for approval because of its risk; `reject`, or `nothing to write`."""
    outcomes: dict[str, int]
    """Outcome → records of the batch, and older edits it replaced."""
    deferred: int
    """Edits left in the inbox for the next batch, because this one was halved."""
    rounds: int
    """How often it was merged and judged."""
    metrics: dict[str, float]
    """Of the last round's candidate; names as in `Report.metrics`."""
    reasons: tuple[str, ...]
    seconds: dict[str, float]
    """Stage → wall seconds."""
    risks: RiskSpread | None
    """None where nothing was to be written into weights."""
    peak_mb: float
    """Highest resident memory of the process so far, in MiB."""

    @property
    def accepted(self) -> bool:
        return self.decision in ("accept", "hold")


class _Judged(BaseModel):
    """Of a change to live edits that the gate takes or refuses as a whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int | None
    """Number of the commit, which is a rejection where the gate refused; None for a dry run."""
    decision: str
    """`accept` or `reject`."""
    live: int
    """Edits that are live with it."""
    metrics: dict[str, float]
    """Names as in `Report.metrics`."""
    reasons: tuple[str, ...]
    seconds: dict[str, float]
    """Stage → wall seconds."""

    @property
    def accepted(self) -> bool:
        return self.decision == "accept"


class WithdrawalSummary(_Judged):
    withdrawn: tuple[str, ...]
    """Occurrences, as they were asked for; live still where the gate refused."""
    measured: Withdrawal | None
    """None where the candidate could not be put on the base."""


class RollbackSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int | None
    """None for a dry run."""
    target: int
    """The accepted commit whose state is served again."""
    left: tuple[str, ...]
    """Occurrences that are no longer live, in order of arrival."""
    back: tuple[str, ...]
    """Occurrences that are live again."""
    live: int


class RebaseSummary(_Judged):
    base: str
    """Digest of the base it is to stand on."""
    profile: str
    """Likewise."""
    answered: tuple[str, ...]
    """Occurrences whose answer that base gives without them."""
    withdrawn: tuple[str, ...]
    """Those of them that were taken back; none unless that was asked for."""
    quarantined: dict[str, str]
    """Occurrence that cannot be had there → why."""
    rounds: int
    """How often it was summed and judged."""


class AdoptionSummary(_Judged):
    """Its metrics are of a sample of the live edits."""

    profile: str
    """Digest of the profile it is to be under."""
    summed: bool
    """The pairs were read and summed anew, because the new spread needs sums that there were not."""


class DistillationSummary(_Judged):
    """Its metrics are of a sample of the live edits."""

    taught: int
    """Live edits that were distilled."""
    absorbed: int
    """Those that take with the adapter alone."""
    went_on: bool
    """From an earlier adapter."""


class CompactionSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int | None
    """None for a dry run, and where there is nothing to commit."""
    decision: Literal["accept", "refuse", "nothing to do"]
    live: int
    """Edits in the sums."""
    pairs: int
    """Their distinct pairs, which were added up."""
    operations: int
    """Pairs added or removed since the sums were last built from nothing."""
    gap: float | None
    """Relative difference of the weights before and after, in float64; None where they were not compared."""
    reasons: tuple[str, ...]
    seconds: float

    @property
    def accepted(self) -> bool:
        return self.decision != "refuse"


class ErasureSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int
    erased: tuple[str, ...]
    """Occurrences that have become tombstones."""
    deleted: int
    """Objects that are gone."""
    replaced: int
    """Objects that are gone and have a stand-in without the edits."""
    commits: tuple[int, ...]
    """Accepted commits whose weights are gone, because an edit was live in them."""
    gap: float
    """Largest relative difference between the served weights and those before, in float64."""
    finished: bool
    """Everything is deleted; else the storage failed, and any command that opens the stream goes on with it."""
    remains: tuple[str, ...]
    """Keys of the stream that still quote a subject or a prompt of theirs: other edits of the same subject, remarks in commits."""


class CollectionSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    dry_run: bool
    deleted: dict[str, tuple[int, int]]
    """Category → objects and bytes that were deleted, or would be."""
    waiting: dict[str, tuple[int, int]]
    """The same of what nothing needs, and has not been of no use for long enough."""
    stale: int
    """Checkpoints and hints that were removed, or would be."""
    archived: int
    """Versions whose weights are given up."""
    hidden: int
    """Versions of these whose weights were taken out of MLflow now."""
