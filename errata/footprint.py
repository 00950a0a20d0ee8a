"""What carrying edits to a base takes, before it is tried."""

from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """Of a rebase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edits: int
    """Live edits to carry over."""
    answered: tuple[str, ...]
    """Occurrences whose answer the base gives without them."""
    pairs: int
    """That they need; edits of one subject may share one."""
    prepared: int
    """Pairs that are stored already, by this estimate or by an interrupted run."""
    seconds: float | None
    """Wall time of preparing the others here, at the pace of those that were timed; None where none was."""
    base_bytes: int
    """Of the base model's weights."""
    sum_bytes: int
    """Of solving a state of so many pairs, the most that is in main memory at once besides the base: see `errata.plan`."""
