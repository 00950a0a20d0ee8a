"""What a withdrawal or a rollback would change: read from the log and its tables, before anything is computed."""

from typing import NamedTuple

from errata.edits import Submission, spell_submission
from errata.errors import InputError, UnknownNameError
from registry.erased import read_erasures
from registry.events import AcceptedCommit, InitCommit, ReturnCommit
from registry.fold import EditRow, split_occurrence
from registry.inbox import drop_lines
from registry.rows import Outcome, Standing
from registry.stream import Stream


def choose_live(stream: Stream, names: list[str]) -> list[EditRow]:
    """The live edits that somebody means to take back, each once.

    Raises:
        InputError: no names, or one that is not that of a live edit; the message says for each what it is instead.
    """
    rows: dict[str, EditRow] = {}
    faults = []
    for name in names:
        try:
            row = stream.resolve_edit(name)
        except UnknownNameError as error:
            faults.append(str(error))
            continue
        if row.status == "live":
            rows[row.occurrence] = row
        else:
            faults.append(f"{row.occurrence}: {_explain(row)}")
    if faults or not rows:
        raise InputError(f"withdraw: expected live edits, found {'; '.join(faults) or 'none'}. Nothing was withdrawn")
    return list(rows.values())


def _explain(row: EditRow) -> str:
    """Why an edit that is not live cannot be withdrawn."""
    match row.status:
        case "withdrawn":
            return f"it is withdrawn already ({row.reason})"
        case "replaced":
            return f"it was replaced by {row.by}: its pairs are subtracted already"
        case "reverted":
            return f"it is not live any more ({row.reason})"
        case "erased":
            return f"it is erased ({row.reason})"
        case "quarantined" | "rejected":
            return f"it was never written, it is {row.status}: `errata quarantine drop` gives it up"
        case _:
            return f"it was never written, it is {row.status}"


def choose_target(stream: Stream, seq: int) -> AcceptedCommit | InitCommit:
    """The commit whose state a rollback to commit `seq` serves again: the newest accepted one up to it.

    Raises:
        InputError: that state is served already.
    """
    target = stream.log.read(seq)
    while not isinstance(target, AcceptedCommit | InitCommit):
        target = stream.log.read(target.seq - 1)
    head = stream.head
    if target.manifest == head.manifest:
        what = "it is the newest" if seq == head.seq else f"commit {seq} has the same manifest as commit {head.accepted}"
        raise InputError(f"rollback: expected an earlier state than the one that is served, found commit {seq}: {what}")
    for erasure in read_erasures(stream.storage, stream.key("")):
        if target.seq in erasure.record.commits:
            raise InputError(
                f"rollback: expected a commit whose state is still there, found commit {target.seq}: edits that were live in it are erased "
                f"by commit {erasure.record.seq}, and with them its weights"
            )
    return target


def choose_waiting(stream: Stream, seq: int) -> int:
    """The commit `seq`, if its version waits to become the champion.

    Raises:
        InputError: it is the champion, is older, or was left behind.
    """
    head = stream.head
    # Whatever returns to an older state is a champion itself: what it left behind is older.
    if head.challenger is None or not head.champion < seq <= head.challenger or not isinstance(stream.log.read(seq), AcceptedCommit):
        waits = f"commit {head.challenger} waits" if head.challenger is not None else "none waits"
        raise InputError(f"expected a version that waits for approval, found commit {seq}; commit {head.champion} is the champion, {waits}")
    return seq


def compare_live(stream: Stream, target: int) -> list[Outcome]:
    """Which occurrences leave and which come back when the state of commit `target` is served again, in order of arrival.

    Read from the outcomes of the commits in between only. What existed at the target and has left or come back since stands again as it
    stood then; what has come since and is live is reverted. Everything else stays as it is: a withdrawal of something newer than the
    target stays a withdrawal.
    """
    first: dict[str, Outcome] = {}
    for seq in range(target + 1, stream.head.seq + 1):
        for outcome in stream.read_outcomes(stream.log.read(seq)):
            if outcome.occurrence and outcome.outcome in ("live", "replaced", "withdrawn", "quarantined", "reverted"):
                first.setdefault(outcome.occurrence, outcome)
    changed = []
    for occurrence, outcome in first.items():
        row = stream.resolve_edit(occurrence)
        # Whatever left without a word on how it stood had been live.
        was = outcome.before or Standing(status="live", pairs=row.pairs, row=row.row)
        if split_occurrence(occurrence)[1] > target:
            was = Standing(status="reverted", reason=f"came after commit {target}, which is served again")
        live = was.status == "live", row.status == "live"
        if not any(live) or (all(live) and (was.pairs, was.row) == (row.pairs, row.row)):
            continue
        back = Outcome(
            outcome=was.status,
            occurrence=occurrence,
            by=was.by,
            reason=was.reason,
            since=was.since,
            pairs=was.pairs,
            row=was.row,
            before=describe_standing(row),
        )
        changed.append(((row.seq, row.position), back))
    return [outcome for _, outcome in sorted(changed, key=lambda item: item[0])]


class Served(NamedTuple):
    """A live edit of the champion."""

    row: EditRow
    """As it stands at the head."""
    pairs: str
    """Digest of the object that its pair lies in."""
    line: int
    """Row of that object."""


def list_served(stream: Stream) -> list[Served]:
    """The live edits of the champion, in order of arrival: those of the head, but where a challenger waits, which may have moved them."""
    moved = {outcome.occurrence or "": outcome for outcome in compare_live(stream, stream.head.champion)}
    stays = [Served(row, row.pairs or "", row.row or 0) for row in stream.index.find_rows("live") if row.occurrence not in moved]
    back = [
        Served(stream.resolve_edit(name), outcome.pairs or "", outcome.row or 0)
        for name, outcome in moved.items()
        if outcome.outcome == "live"
    ]
    return sorted(stays + back, key=lambda served: (served.row.seq, served.row.position))


def describe_standing(row: EditRow) -> Standing:
    """Where an occurrence stands now, for the commit that is about to move it."""
    place = {"pairs": row.pairs, "row": row.row} if row.status == "live" else {}
    return Standing.model_validate({"status": row.status, "by": row.by, "reason": row.reason, "since": row.withdrawn_at, **place})


class Gone(NamedTuple):
    """What a rollback took out of the model and has not come back since."""

    rows: list[EditRow]
    """Nothing stands in the way of these."""
    overtaken: list[tuple[EditRow, EditRow]]
    """With a newer edit that holds the same id or slot now."""


def find_gone(stream: Stream, rollback: int | None = None) -> tuple[int, Gone]:
    """What the rollback commit `rollback`, or the newest one, took out, in order of arrival, with the commit's number.

    Raises:
        InputError: there is no rollback, or the commit is none.
    """
    commit = stream.log.read(rollback if rollback is not None else _find_newest(stream))
    if not isinstance(commit, ReturnCommit):
        raise InputError(f"resubmit: expected a rollback, found commit {commit.seq} of kind {commit.kind}")
    gone = Gone([], [])
    for outcome in stream.read_outcomes(commit):
        row = stream.resolve_edit(outcome.occurrence or "")
        if outcome.outcome == "live" or row.status in ("live", "erased"):
            continue
        holders = [held for held in (stream.index.find_edit(row.id), stream.index.find_slot(row.slot)) if held and held.status == "live"]
        newer = next((held for held in holders if held.seq > commit.seq), None)
        if newer is None:
            gone.rows.append(row)
        elif newer.content != row.content:
            gone.overtaken.append((row, newer))
    return commit.seq, gone


def submit_gone(stream: Stream, gone: Gone) -> str | None:
    """Leave what nothing stands in the way of in the inbox once more; the file's name, None where there is nothing.

    The edits had been accepted once, some in spite of an older withdrawal: what was insisted upon then still is.
    """
    records = [Submission(edit=stream.read_record(row).edit, origin=row.origin, again=True) for row in gone.rows]
    return drop_lines(stream, [spell_submission(record) for record in records]) if records else None


def _find_newest(stream: Stream) -> int:
    for seq in range(stream.head.seq, 0, -1):
        if isinstance(stream.log.read(seq), ReturnCommit):
            return seq
    raise InputError(f"resubmit: expected a rollback in stream {stream.name!r}, found none")
