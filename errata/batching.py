"""Which arrivals become one batch (design §3). Pure: it reads the log through a lookup and changes nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from errata.edits import Refusal, Submission
from errata.precedence import Judge, Lookup

MAX_CONSIDERED = 10_000
"""Most records in one batch, however few of them are worth writing: a resubmitted file makes few commits, and none without bounds."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One row of an inbox file."""

    record: Submission | Refusal
    file: str
    """Digest of the file."""
    line: int


@dataclass(frozen=True, slots=True)
class Addition:
    """An edit to write."""

    position: int
    """In the batch, among all records considered."""
    arrival: Arrival
    submission: Submission
    replaces: tuple[str, ...]
    """Live occurrences whose place it takes: the old version of its id, the edit in its slot, and what those replaced in this batch
    would have replaced. Two additions may name the same one (one left the slot, another moved in): it goes when the first is accepted.
    """


@dataclass(frozen=True, slots=True)
class Settled:
    """A record that is not written, and why."""

    position: int
    arrival: Arrival
    outcome: Literal["duplicate", "superseded", "stale", "withheld", "refused"]
    reason: str
    by: str | None = None
    """The older occurrence that decided it."""
    by_position: int | None = None
    """The record of this batch that decided it."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """One batch, before anything is computed. Every considered arrival is either an addition or settled."""

    considered: tuple[Arrival, ...]
    additions: tuple[Addition, ...]
    settled: tuple[Settled, ...]

    @property
    def replacements(self) -> dict[str, tuple[str, ...]]:
        """Id of an addition → the live occurrences whose place it takes, where there are any."""
        return {addition.submission.edit.edit_id: addition.replaces for addition in self.additions if addition.replaces}


def propose_batch(arrivals: Iterable[Arrival], lookup: Lookup, batch_size: int, settings_digest: str) -> Proposal:
    """Take arrivals in order until `batch_size` edits are worth writing, and settle the others.

    Args:
        arrivals: the rows waiting, in order of arrival; read no further than needed.
        lookup: the log at the head that the batch will build on.
        settings_digest: of the settings that the gate will judge under; quarantined and rejected edits come again when it changes.
    """
    judge = Judge(lookup, settings_digest)
    considered: list[Arrival] = []
    additions: dict[int, Addition] = {}
    settled: dict[int, Settled] = {}
    displaced: dict[int, int] = {}
    for position, arrival in enumerate(arrivals):
        considered.append(arrival)
        match arrival.record:
            case Refusal(reason=reason):
                settled[position] = Settled(position, arrival, "refused", reason)
            case Submission() as submission:
                verdict = judge.judge(submission, position)
                if verdict.outcome == "proposed":
                    additions[position] = Addition(position, arrival, submission, verdict.replaces)
                    displaced |= dict.fromkeys(verdict.supersedes, position)
                    for earlier in verdict.supersedes:
                        del additions[earlier]
                else:
                    settled[position] = Settled(position, arrival, verdict.outcome, verdict.reason, verdict.by, verdict.by_position)
        if len(additions) >= batch_size or len(considered) >= MAX_CONSIDERED:
            break
    for position in displaced:
        winner = _follow(displaced, position)
        arrival = considered[position]
        settled[position] = Settled(position, arrival, "superseded", "a later edit of the same batch takes its place", by_position=winner)
    return Proposal(tuple(considered), tuple(additions.values()), tuple(settled[position] for position in sorted(settled)))


def _follow(displaced: dict[int, int], position: int) -> int:
    while position in displaced:
        position = displaced[position]
    return position
