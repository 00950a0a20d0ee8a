"""What became of one batch, as people and callers of the flow see it."""

from pydantic import BaseModel, ConfigDict


class BatchSummary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int | None
    """Number of the commit; None for a dry run."""
    decision: str
    """`accept`, `reject`, or `nothing to write`."""
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
    peak_mb: float
    """Highest resident memory of the process so far, in MiB."""

    @property
    def accepted(self) -> bool:
        return self.decision == "accept"
