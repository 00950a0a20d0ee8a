"""The one step that changes a stream. Everything a commit names is stored before; after it nothing is needed any more.

objects (batch, outcomes, pairs, manifest, report, raw files)    content-addressed: harmless if we stop here
→ requirements: the head is the one we started from; every object is there, and safe from collection; the changes fit the tables
→ commits/<seq>.json, created only if absent                     this is the commit
→ tables, checkpoint, inbox                                      made again by whoever comes next, if we stop here
"""

import logging
import sqlite3
from typing import get_args

from errata.errors import ConflictError, KeyMissingError, StorageError
from registry.collection import secure_objects
from registry.events import (
    AcceptedCommit,
    Commit,
    ErasureCommit,
    InitCommit,
    PromotionCommit,
    RebaseCommit,
    RebuildCommit,
    RejectionCommit,
    ReturnCommit,
    SummingCommit,
    write_commit,
)
from registry.fold import ASIDE, HELD, Changes, EditRow, Head, Move, advance_head, choose_moved, derive_changes
from registry.history import list_layers
from registry.rows import Status
from registry.stream import Stream

CHECKPOINT_EVERY = 10
"""Commits between two checkpoints."""
_FROM: dict[Status, tuple[Status, ...]] = {
    "replaced": ("live",),
    "withdrawn": ("live",),
    "quarantined": ("live",),
    "live": ("live",),
    "dropped": HELD,
    "erased": ("replaced", "superseded", "stale", *HELD, "dropped", "withdrawn", "reverted"),
}
"""What an older occurrence becomes → where it must have stood; a rollback takes it from anywhere back to where it stood once."""

_log = logging.getLogger(__name__)


def commit(stream: Stream, draft: Commit, parent: Head) -> Commit:
    """Make `draft` the stream's newest commit. Repeating a call that had succeeded, with the same draft, succeeds again.

    Args:
        draft: numbered and chained to `parent`; every object that it names is stored.
        parent: the head that the work started from.

    Raises:
        ConflictError: another writer committed first. The objects are kept: start again from the new head.
        StorageError: an object is missing, or the changes do not fit what is committed already; nothing was committed.
        FormatError: the commit is too large, or its batch and outcomes do not fit each other; nothing was committed.
    """
    write_commit(draft)
    if (draft.seq, draft.parent) != (parent.seq + 1, parent.digest):
        raise StorageError(f"commit: expected seq {parent.seq + 1} on {parent.digest}, found seq {draft.seq} on {draft.parent}")
    head = stream.refresh()
    if head.seq <= parent.seq:
        if head.digest != parent.digest:
            raise ConflictError(f"expected commit {parent.seq} ({parent.digest}) to be the newest, found {head.seq} ({head.digest})")
        _check_objects(stream, draft)
        _check_changes(stream, draft, parent)
    # If the head has moved on, the log tells our own commit, which a lost answer made us repeat, from somebody else's.
    stream.log.append(draft)
    stream.refresh()
    # The segments that an erasure's checkpoint would build on are about to be deleted.
    if draft.seq % CHECKPOINT_EVERY == 0 and not isinstance(draft, ErasureCommit):
        try:
            stream.checkpoints.write(stream.index)
        except (StorageError, sqlite3.Error) as error:
            _log.warning("no checkpoint at commit %d, the next one will do: %s", draft.seq, error)
    return draft


def _check_objects(stream: Stream, draft: Commit) -> None:
    named: dict[str, str | None] = {
        "batch": draft.batch,
        "outcomes": draft.outcomes,
        "manifest": draft.manifest,
        "report": draft.report,
        "erased": draft.erased if isinstance(draft, ErasureCommit) else None,
        **{f"pairs[{i}]": digest for i, digest in enumerate(draft.pairs)},
        **{f"file {use.name}": use.digest for use in draft.files},
    }
    if isinstance(draft, SummingCommit):
        named["live list"] = draft.live
    present = {name: digest for name, digest in named.items() if digest is not None}
    try:
        if draft.manifest is not None and stream.objects.exists(draft.manifest):
            layers = enumerate(list_layers(stream.objects.get_json(draft.manifest)))
            present |= {f"{what} ({number}) of the manifest": digest for number, (what, digest) in layers}
        secure_objects(stream.storage, stream.objects, stream.key("gc/"), present)
    except KeyMissingError as error:
        raise KeyMissingError(f"{draft.name}: {error}") from None


def _check_changes(stream: Stream, draft: Commit, parent: Head) -> None:
    """A commit that could not be folded, or would apply a line or an edit twice, must not land: history is not rewritten."""
    if isinstance(draft, PromotionCommit):
        _check_promotion(stream, draft, parent)
    if isinstance(draft, PromotionCommit | RejectionCommit) and draft.manifest != parent.manifest:
        raise StorageError(f"{draft.name}: expected the previous manifest {parent.manifest}, found {draft.manifest}")
    if isinstance(draft, ReturnCommit):
        _check_target(stream, draft)
    if isinstance(draft, RebuildCommit | SummingCommit) and draft.of != parent.accepted:
        raise StorageError(f"{draft.name}: expected the state of the newest accepted commit {parent.accepted}, found that of {draft.of}")
    if isinstance(draft, SummingCommit) and draft.live:
        _check_live(stream, draft, draft.live)
    _check_site(stream, draft, parent)
    changes = derive_changes(draft, stream.read_batch(draft), stream.read_outcomes(draft))
    _check_files(stream, draft)
    _check_occurrences(stream, draft, changes)
    if isinstance(draft, RebaseCommit):
        _check_everyone(stream, draft, changes)


def _check_site(stream: Stream, draft: Commit, parent: Head) -> None:
    """The next batch takes base and profile from the head, and the state from the manifest."""
    after = advance_head(parent, draft, "")
    if not isinstance(draft, AcceptedCommit) or not stream.objects.exists(after.manifest):
        return
    manifest = stream.objects.get_json(after.manifest)
    if (manifest.get("base", after.base), manifest.get("profile", after.profile)) != (after.base, after.profile):
        raise StorageError(f"{draft.name}: expected a manifest on base {after.base} and profile {after.profile}, found another")


def _check_everyone(stream: Stream, draft: RebaseCommit, changes: Changes) -> None:
    """A pair of another base, or of another site, must not stay live."""
    moved = {f"{move.id}@{move.seq}" for move in changes.moved}
    if left := [row.occurrence for row in stream.index.find_rows("live") if row.occurrence not in moved]:
        raise StorageError(f"{draft.name}: expected an outcome for every live edit, found none for {', '.join(left[:5])}")


def _check_promotion(stream: Stream, draft: PromotionCommit, parent: Head) -> None:
    """Only what came after the champion, and was not left behind by a return to it, waits."""
    if not parent.champion < draft.of <= parent.accepted or not isinstance(stream.log.read(draft.of), AcceptedCommit):
        raise StorageError(f"{draft.name}: expected a version after the champion, commit {parent.champion}, found commit {draft.of}")


def _check_target(stream: Stream, draft: ReturnCommit) -> None:
    target = stream.log.read(draft.target)
    if not isinstance(target, AcceptedCommit | InitCommit) or draft.manifest != target.manifest:
        raise StorageError(
            f"{draft.name}: expected the manifest of an accepted commit {draft.target}, found {draft.manifest}; "
            f"there is {target.manifest} of kind {target.kind}"
        )


def _check_live(stream: Stream, draft: Commit, listed_in: str) -> None:
    """Sums that leave out a live edit, or hold one that is not, must not become what every later batch builds on."""
    listed = [(change["pairs"], row) for change in stream.objects.get_json(listed_in) for row in change["rows"]]
    live = {(row.pairs, row.row) for row in stream.index.find_rows("live")}
    if len(listed) != len(live) or set(listed) != live:
        raise StorageError(f"{draft.name}: expected the {len(live)} pairs of the live edits, each once, found {len(listed)} listed")


def _check_files(stream: Stream, draft: Commit) -> None:
    for use in draft.files:
        before = stream.index.find_file(use.digest)
        for first, last in before.lines if before else ():
            for start, end in use.lines:
                if start <= last and first <= end:
                    raise StorageError(f"{draft.name}: expected new lines of {use.name}, found {start}-{end}; {first}-{last} are consumed")


def _check_occurrences(stream: Stream, draft: Commit, changes: Changes) -> None:
    moved = {(move.id, move.seq): move for move in changes.moved}
    if len(moved) != len(changes.moved):
        raise StorageError(f"{draft.name}: expected each older occurrence once, found one twice")
    rows = [(row, move) for move in changes.moved for row in [_find_moved(stream, draft, move)]]
    back = [row for row, move in rows if move.status == "live"]
    live = [row for row in changes.added if row.status == "live"]
    placed = [(row.occurrence, row.pairs) for row in live]
    if not isinstance(draft, ReturnCommit):
        placed += [(row.occurrence, move.pairs) for row, move in rows if move.status == "live"]
    for occurrence, pairs in placed:
        if pairs is not None and pairs not in draft.pairs:
            raise StorageError(f"{draft.name}: expected the pairs of {occurrence} among its pairs, found {pairs}")
    for names in ({row.slot for row in live + back}, {row.id for row in live + back}):
        if len(names) != len(live + back):
            raise StorageError(f"{draft.name}: expected one live edit per slot and id, found two in one commit")
    for row in live + back:
        for held in (stream.index.find_slot(row.slot), stream.index.find_edit(row.id)):
            if held is None or held.status != "live" or held.occurrence == row.occurrence:
                continue
            move = moved.get((held.id, held.seq))
            if move is None or move.status == "live":
                raise StorageError(f"{draft.name}: expected {row.occurrence} to replace {held.occurrence}, found both live")


def _find_moved(stream: Stream, draft: Commit, move: Move) -> EditRow:
    """The row of an older occurrence that is to change its status, or its pair."""
    name = f"{move.id}@{move.seq}"
    rows = [row for row in stream.index.find_occurrences(move.id) if row.seq == move.seq]
    rows = sorted(choose_moved(rows, move.status), key=lambda row: row.status in ASIDE)
    if not rows:
        raise StorageError(f"{draft.name}: expected an occurrence {name}, found none")
    row, allowed = rows[0], _FROM.get(move.status, ())
    if isinstance(draft, ReturnCommit):
        allowed = tuple(status for status in get_args(Status) if status != "erased")
    if row.status not in allowed:
        wanted = " or ".join(allowed) or "nothing of the kind"
        raise StorageError(f"{draft.name}: {name} becomes {move.status}: expected it {wanted}, found it {row.status}")
    same = row.status == move.status and (move.pairs is None or (move.pairs, move.row) == (row.pairs, row.row))
    if same and not isinstance(draft, RebaseCommit):
        raise StorageError(f"{draft.name}: {name} stays {move.status}: expected another pair than it has, found {move.pairs}, {move.row}")
    return row
