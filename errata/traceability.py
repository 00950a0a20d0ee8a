"""What the withdrawal test of iReVa found (algorithms.md §3.2). Pure; no torch.

Each edit alone is switched off with all others live, and its own prompt is asked again. RS, retrieve success: the prediction changes. Con,
consistency: it becomes the base's.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict

_WORST = 20
"""Failing edits that are named."""


class SwitchedOff(BaseModel):
    """One edit without which the model was asked. Texts are the tokens predicted at the positions of its target, the target forced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    target: str
    base: str
    edited: str
    """With all edits."""
    without: str
    """With all but it."""
    known: bool
    """The base predicts the target: nothing can change when the edit goes."""
    taken: bool
    """With all edits the target is predicted."""
    retrieved: bool
    """Prediction without it ≠ prediction with all."""
    consistent: bool
    """Prediction without it = prediction of the base."""


class Share(BaseModel):
    """Part of some edits, in percent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edits: int
    percent: float | None
    """None over no edits."""

    @classmethod
    def over(cls, found: Sequence[bool]) -> Self:
        return cls(edits=len(found), percent=100 * sum(found) / len(found) if found else None)


class Traceability(BaseModel):
    """The withdrawal test of one version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    live: int
    """Live edits, of which some were switched off."""
    retrieve_success: Share
    """RS over all that were switched off, as published."""
    consistency: Share
    """Con over the same."""
    known: int
    """Edits whose target the base predicts anyway: they count against RS whatever an editor does."""
    untaken: int
    """Edits whose target is not predicted with all edits live."""
    retrieve_success_own: Share
    """RS over the others: edits that made the difference."""
    consistency_own: Share
    worst: tuple[SwitchedOff, ...]
    """Edits that fail one of the two, or both, which come first; the first of them."""
    failing: int

    def metrics(self) -> dict[str, float]:
        """The measured numbers under flat names, for a tracking server; shares in percent."""
        named: dict[str, float | None] = {
            "edits": self.retrieve_success.edits,
            "retrieve_success": self.retrieve_success.percent,
            "consistency": self.consistency.percent,
            "retrieve_success_own": self.retrieve_success_own.percent,
            "consistency_own": self.consistency_own.percent,
            "known": self.known,
            "untaken": self.untaken,
        }
        return {name: float(value) for name, value in named.items() if value is not None}


def summarise(rows: Sequence[SwitchedOff], live: int) -> Traceability:
    """What the test says of a version with so many live edits."""
    own = [row for row in rows if row.taken and not row.known]
    failing = sorted((row for row in rows if not (row.retrieved and row.consistent)), key=lambda row: row.retrieved + row.consistent)
    return Traceability(
        live=live,
        retrieve_success=Share.over([row.retrieved for row in rows]),
        consistency=Share.over([row.consistent for row in rows]),
        known=sum(row.known for row in rows),
        untaken=sum(not row.taken for row in rows),
        retrieve_success_own=Share.over([row.retrieved for row in own]),
        consistency_own=Share.over([row.consistent for row in own]),
        worst=tuple(failing[:_WORST]),
        failing=len(failing),
    )


class TraceSummary(BaseModel):
    """One run of the test."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str
    commit: int
    """The champion's."""
    seed: int
    measured: Traceability
    seconds: float
