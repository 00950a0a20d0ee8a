"""What a commit changes, as pure functions: the meaning of the log. The index applies these changes to its tables and nothing else.

An *occurrence* is one acceptance of an edit, `<id>@<seq>`. Records that came to nothing (duplicates, withheld and refused ones) are
counted and stay in the log; every other record becomes a row. Of the records of one id in one batch at most one is judged; the others
are `superseded` or `stale` and share its occurrence's name, so a row's key is (id, seq, position).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

from pydantic import BaseModel, ConfigDict

from errata.errors import FormatError
from registry.events import (
    AcceptedCommit,
    CalibrationCommit,
    Commit,
    EditsCommit,
    ErasureCommit,
    InitCommit,
    MemoryCommit,
    MergeCommit,
    PromotionCommit,
    RebaseCommit,
    RejectionCommit,
    ReturnCommit,
    WithdrawalCommit,
)
from registry.rows import BatchRow, FileUse, Lines, Outcome, Status

ASIDE: tuple[Status, ...] = ("superseded", "stale")
"""Never judged, or no longer of interest: a later change of their occurrence does not mean these rows."""
JUDGED: tuple[Status, ...] = ("live", "quarantined", "rejected")
HELD: tuple[Status, ...] = ("quarantined", "rejected")
"""Waiting for a decision; settled when a later occurrence of the same id is judged."""
_WITH_BATCH = EditsCommit | MemoryCommit | MergeCommit | RejectionCommit
_WITH_PAIRS = EditsCommit | MemoryCommit | WithdrawalCommit | MergeCommit | RebaseCommit | ErasureCommit
"""Kinds that may name new pairs: of new edits, of key groups that lose a member, of another base."""
_MOVES: dict[Status, tuple[type, ...]] = {
    "live": (*get_args(_WITH_PAIRS), ReturnCommit),
    "withdrawn": (WithdrawalCommit, RebaseCommit, ReturnCommit),
    "quarantined": (RebaseCommit, ReturnCommit),
    "reverted": (ReturnCommit,),
    "erased": (ErasureCommit,),
}
"""What not every kind may make of an older occurrence."""


class EditRow(NamedTuple):
    """One line of the edit table: where one occurrence of an edit stands."""

    id: str
    seq: int
    position: int
    status: Status
    slot: str
    content: str
    """content_id: what the edit says, whatever its producer calls it."""
    subject: str
    """`subject_key`: edits of one subject may share a pair."""
    batch: str
    """Digest of the batch object that holds the text, under `position`."""
    pairs: str | None
    """None of a live edit that answers from memory: nothing is written into weights for it."""
    row: int | None
    by: str | None
    reason: str | None
    under: str | None
    submitted_at: str | None
    """ISO 8601 with offset."""
    origin: str
    withdrawn_at: str | None = None
    """Time of its withdrawal, in the same form."""

    @property
    def occurrence(self) -> str:
        return f"{self.id}@{self.seq}"

    @property
    def key(self) -> tuple[str, int, int]:
        return self.id, self.seq, self.position


def list_written(rows: Iterable[EditRow]) -> list[EditRow]:
    """Of live edits, those that have a pair: the others answer from memory."""
    return [row for row in rows if row.pairs is not None]


class Move(NamedTuple):
    """An older occurrence changes its status."""

    id: str
    seq: int
    status: Status
    by: str | None
    reason: str | None
    withdrawn_at: str | None = None
    pairs: str | None = None
    """Its pair from now on; None keeps the one it has."""
    row: int | None = None


class Changes(NamedTuple):
    """All that one commit does to the tables. Rows that are added settle what is HELD of their id (`settles`)."""

    added: tuple[EditRow, ...]
    moved: tuple[Move, ...]
    files: tuple[FileUse, ...]
    tallies: dict[str, int]


class Head(BaseModel):
    """The fold's summary after the newest commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    digest: str
    """Of the commit's bytes."""
    base: str
    profile: str
    editors: tuple[str, ...]
    manifest: str
    """Digest of the newest accepted manifest: the next batch builds on it."""
    accepted: int
    """The commit that made it."""
    champion: int
    """The commit whose manifest is served."""
    challenger: int | None = None
    """The commit that waits to become the champion."""


def derive_changes(commit: Commit, batch: list[BatchRow], outcomes: list[Outcome]) -> Changes:
    """What `commit` changes in the tables.

    Raises:
        FormatError: batch and outcomes do not fit: a record without exactly one outcome, an outcome without its record.
    """
    waiting = {(row.file, row.line): row for row in batch}
    if len(waiting) != len(batch) or len({row.position for row in batch}) != len(batch):
        raise FormatError(f"commit {commit.seq}: expected each position and each line of a file once in the batch, found one twice")
    added, moved = [], []
    tallies: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.status is None:
            tallies[outcome.outcome] += 1
        if outcome.occurrence is None:
            continue
        identity, seq = split_occurrence(outcome.occurrence)
        if seq < commit.seq:
            moved.append(_read_move(commit, outcome, identity, seq))
            continue
        row = waiting.pop((outcome.file or "", outcome.line or 0), None)
        if row is None or (row.occurrence, row.edit.edit_id, commit.seq) != (outcome.occurrence, identity, seq):
            raise FormatError(
                f"commit {commit.seq}: outcome {outcome.outcome} of {outcome.occurrence}: expected the file and line of its record, "
                f"found {outcome.file}, line {outcome.line}"
            )
        if outcome.status is not None:
            added.append(_build_row(commit, row, outcome, outcome.status))
    if waiting:
        raise FormatError(f"commit {commit.seq}: expected an outcome for {next(iter(waiting.values())).occurrence}, found none")
    judged = [row.id for row in added if row.status in JUDGED]
    if len(judged) != len(set(judged)):
        raise FormatError(f"commit {commit.seq}: expected one judged record per id, found more")
    if not isinstance(commit, EditsCommit | MemoryCommit | MergeCommit) and any(row.status == "live" for row in added):
        raise FormatError(f"commit {commit.seq}: expected no live edits of kind {commit.kind}, found some")
    if not isinstance(commit, _WITH_BATCH) and (batch or commit.files):
        raise FormatError(f"commit {commit.seq}: expected no batch or files of kind {commit.kind}, found some")
    if not isinstance(commit, _WITH_PAIRS) and commit.pairs:
        raise FormatError(f"commit {commit.seq}: expected no pairs of kind {commit.kind}, found some")
    return Changes(tuple(added), tuple(moved), commit.files, dict(tallies))


def advance_head(head: Head | None, commit: Commit, digest: str) -> Head:
    """The summary after `commit`, whose bytes have `digest`."""
    if isinstance(commit, InitCommit):
        return Head(
            seq=0,
            digest=digest,
            base=str(commit.base["digest"]),
            profile=commit.profile,
            editors=commit.editors,
            manifest=commit.manifest,
            accepted=0,
            champion=0,
        )
    if head is None:
        raise FormatError(f"commit {commit.seq}: expected the log to begin with init, found {commit.kind}")
    moved = head.model_copy(update={"seq": commit.seq, "digest": digest})
    if isinstance(commit, PromotionCommit):
        waiting = head.challenger if head.challenger is not None and head.challenger > commit.of else None
        return moved.model_copy(update={"champion": commit.of, "challenger": waiting})
    if not isinstance(commit, AcceptedCommit):
        return moved
    role = {"champion": commit.seq, "challenger": None} if commit.promoted else {"challenger": commit.seq}
    place: dict[str, str] = {}
    if isinstance(commit, RebaseCommit):
        place = {"base": str(commit.base["digest"]), "profile": commit.profile}
    elif isinstance(commit, CalibrationCommit):
        place = {"profile": commit.profile}
    elif isinstance(commit, ReturnCommit):
        place = {name: digest for name, digest in (("base", commit.base), ("profile", commit.profile)) if digest}
    return moved.model_copy(update={"manifest": commit.manifest, "accepted": commit.seq, **role, **place})


def choose_moved(rows: Sequence[EditRow], status: Status) -> list[EditRow]:
    """The rows of one occurrence that a change to `status` means: the one that was judged, wherever it stands since; all of them where it
    is erased."""
    judged = [row for row in rows if row.status not in ASIDE] or [row for row in rows if row.pairs is not None]
    return list(rows) if status == "erased" else judged


def move_row(row: EditRow, move: Move) -> EditRow:
    """The row after an older occurrence's change. Why the gate refused an edit stays known until something else is said."""
    if move.status == "erased":
        return bury_row(row, move)
    kept = row.reason if row.status in HELD else None
    moved = row._replace(status=move.status, by=move.by, reason=move.reason or kept, withdrawn_at=move.withdrawn_at)
    return moved if move.pairs is None else moved._replace(pairs=move.pairs, row=move.row)


def bury_row(row: EditRow, move: Move) -> EditRow:
    """The tombstone of a row. Digests of its text go too: whoever guesses a short text could confirm it by them. `withdrawn_at` is when
    it was erased, before which nothing that is sent again counts as new."""
    bare = row._replace(slot="", content="", subject="", pairs=None, row=None, by=None, under=None, submitted_at=None, origin="")
    return bare._replace(status="erased", reason=move.reason, withdrawn_at=move.withdrawn_at)


def settles(added: EditRow, row: EditRow) -> bool:
    """Whether a row that is added ends the waiting of an older one of the same id."""
    return added.status in JUDGED and row.status in HELD and row.id == added.id and row.seq < added.seq


def settle_row(row: EditRow, added: EditRow) -> EditRow:
    return row._replace(status="superseded", by=added.occurrence)


def merge_use(old: FileUse | None, new: FileUse) -> FileUse:
    """What is consumed of a file after `new`: adjacent runs of lines become one."""
    if old is None:
        return new.model_copy(update={"lines": join_lines(new.lines)})
    return new.model_copy(update={"lines": join_lines(old.lines + new.lines), "done": old.done or new.done})


def join_lines(runs: Iterable[Lines]) -> tuple[Lines, ...]:
    """The same lines as the fewest ascending runs."""
    joined: list[Lines] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return tuple(joined)


def split_occurrence(occurrence: str) -> tuple[str, int]:
    """(id, seq) of `<id>@<seq>`.

    Raises:
        FormatError: it is no such name.
    """
    identity, _, seq = occurrence.rpartition("@")
    if not identity or not (seq.isascii() and seq.isdecimal()):
        raise FormatError(f"occurrence: expected <id>@<seq>, found {occurrence!r}")
    return identity, int(seq)


def _read_move(commit: Commit, outcome: Outcome, identity: str, seq: int) -> Move:
    if outcome.status is None:
        raise FormatError(f"commit {commit.seq}: expected a status for {outcome.occurrence}, found {outcome.outcome}")
    if outcome.status in _MOVES and not isinstance(commit, _MOVES[outcome.status]):
        raise FormatError(
            f"commit {commit.seq}: expected no older edit to become {outcome.status} by kind {commit.kind}, found {identity}@{seq}"
        )
    since = outcome.since or commit.time if outcome.status in ("withdrawn", "erased") else None
    if outcome.status == "live" and not isinstance(commit, ReturnCommit) and outcome.pairs is None:
        raise FormatError(f"commit {commit.seq}: expected the new pair of {identity}@{seq}, which stays live, found none")
    withdrawn_at = since.isoformat() if since else None
    return Move(identity, seq, outcome.status, outcome.by, outcome.reason, withdrawn_at, outcome.pairs, outcome.row)


def _build_row(commit: Commit, row: BatchRow, outcome: Outcome, status: Status) -> EditRow:
    edit = row.edit
    return EditRow(
        id=edit.edit_id,
        seq=commit.seq,
        position=row.position,
        status=status,
        slot=edit.slot,
        content=edit.content_id,
        subject=edit.subject_key,
        batch=commit.batch or "",
        pairs=outcome.pairs,
        row=outcome.row,
        by=outcome.by,
        reason=outcome.reason,
        under=outcome.under,
        submitted_at=edit.submitted_at.isoformat() if edit.submitted_at else None,
        origin=row.origin,
    )
