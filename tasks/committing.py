"""Decision to commit, and commit to MLflow version: the one step that counts, then its projection."""

import platform
import resource
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from prefect.runtime import flow_run

from errata.edits import Risk
from errata.errors import ConflictError
from errata.gate import Settled, settle
from errata.manifests import PairRef
from errata.report import Report
from errata.rounds import Prepared, PreparedRecord, Round
from errata.settings import Settings
from errata.summary import BatchSummary, RiskSpread
from registry.commit import commit
from registry.events import Commit, EditsCommit, MemoryCommit, MergeCommit, RejectionCommit
from registry.fold import EditRow, join_lines, split_occurrence
from registry.orders import Order
from registry.prepared import forget_pairs
from registry.rows import BatchRow, FileUse, Outcome, Standing
from registry.setbacks import forget_setbacks, note_untaken
from registry.stream import Stream
from tasks._session import load_model, open_named
from tasks._task import stage
from tasks.editing import digest_preparation
from tasks.intake import digest_memory

_LIBRARIES = ("errata", "torch", "transformers", "safetensors", "numpy")
_RSS_PER_MIB = 2**20 if sys.platform == "darwin" else 2**10
"""getrusage counts bytes on macOS, KiB elsewhere."""
_MAX_REASONS = 20
_MAX_REASON = 400
"""Characters of one reason in a commit; the outcomes object has it whole."""


@stage
def commit_batch(stream: str, order: str, prepared: Prepared, rounds: list[Round], dry_run: bool = False) -> BatchSummary:
    """Make the batch a commit: accepted edits go live, the others get their outcome, deferred ones stay in the inbox. What memory cannot
    answer stays there, too, and where nothing else is to be said nothing is committed.

    Raises:
        ConflictError: another writer committed since the order was made.
    """
    settings, opened = open_named(stream)
    work, record = Order.load(opened.objects, order), PreparedRecord.model_validate_json(opened.objects.get(prepared.record))
    seconds = {"prepare": prepared.seconds}
    for item in rounds:
        for name, value in item.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
    draft, outcomes = draft_commit(settings, opened, work, record, rounds, {name: round(value, 3) for name, value in seconds.items()})
    if work.tier == "memory" and not (outcomes or dry_run):
        note_untaken(opened, [use.digest for use in work.files], digest_memory(settings, opened))
        return summarise(opened, draft, outcomes, rounds, None)
    if not dry_run:
        commit_once(opened, draft)
        opened.remove_consumed(draft.files)
        forget_setbacks(opened, [use.digest for use in draft.files])
        if work.tier == "memory":
            left = {use.digest for use in draft.files if use.done}
            note_untaken(opened, [use.digest for use in work.files if use.digest not in left], digest_memory(settings, opened))
        if record.pairs:
            forget_pairs(opened, digest_preparation(load_model(settings, opened), work.manifest), _list_settled(record, rounds))
    return summarise(opened, draft, outcomes, rounds, None if dry_run else draft.seq)


def drop_edits(settings: Settings, stream: Stream, rows: Sequence[EditRow], reason: str) -> int:
    """Give edits in quarantine up, as a commit of their own; its number.

    Raises:
        ConflictError: another writer committed meanwhile.
    """
    head = stream.head
    outcomes = [Outcome(outcome="dropped", occurrence=row.occurrence, reason=reason) for row in rows]
    draft = RejectionCommit(
        seq=head.seq + 1,
        parent=head.digest,
        manifest=head.manifest,
        outcomes=stream.objects.put_rows(outcome.model_dump(mode="json", exclude_none=True) for outcome in outcomes),
        decision="dropped",
        reasons=(reason,),
        **describe_writer(settings),
    )
    return commit(stream, draft, head).seq


def summarise(stream: Stream, draft: Commit, outcomes: Sequence[Outcome], rounds: Sequence[Round], seq: int | None) -> BatchSummary:
    decisions = [item.decision for item in rounds if item.decision]
    return BatchSummary(
        stream=stream.name,
        commit=seq,
        decision=draft.decision,
        outcomes=dict(Counter(outcome.told for outcome in outcomes)),
        deferred=sum(len(decision.defer) for decision in decisions),
        rounds=len(rounds),
        metrics=Report.from_bytes(stream.objects.get(draft.report)).metrics() if draft.report else {},
        reasons=draft.reasons,
        seconds=draft.seconds,
        risks=RiskSpread.over({row.edit.edit_id: row.risk for row in stream.read_batch(draft) if row.risk}),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_PER_MIB, 1),
    )


def describe_writer(settings: Settings) -> dict[str, Any]:
    """Who writes a commit, where and with what: for people, and for whoever cannot reproduce a digest."""
    return {
        "actor": settings.actor,
        "host": platform.node() or "unknown",
        "run": flow_run.get_id(),
        "versions": {name: version(name) for name in _LIBRARIES},
        "device": settings.device if settings.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC),
    }


def draft_commit(
    settings: Settings, stream: Stream, order: Order, record: PreparedRecord, rounds: Sequence[Round], seconds: dict[str, float]
) -> tuple[Commit, list[Outcome]]:
    """The commit of a judged batch, with its rows stored."""
    decisions = [item.decision for item in rounds if item.decision]
    fates = settle(decisions) if decisions else {}
    fates |= {edit_id: Settled(outcome="rejected", reason=reason) for edit_id, reason in record.refused.items()}
    # What memory cannot answer is not refused: the next batch writes it.
    waits = ("deferred",) if order.tier == "weights" else ("deferred", "quarantined", "rejected")
    deferred = {edit_id for edit_id, fate in fates.items() if fate.outcome in waits}
    planned = [item for item in order.additions if item.row.edit.edit_id not in deferred]
    written = (item.row.model_copy(update={"risk": record.risks.get(item.row.edit.edit_id)}) for item in planned)
    rows = sorted([*order.rows, *written], key=lambda row: row.position)
    last = rounds[-1] if rounds else None
    placed, older = (last.placed, last.older) if last else ({}, {})
    outcomes = [_forget_deferred(outcome, deferred) for outcome in order.settled]
    for item in planned:
        outcomes += _conclude(item.row, item.replaces, fates[item.row.edit.edit_id], placed, older, order.under)
    outcomes = _move_once(outcomes)
    accepted = {item.row.edit.edit_id for item in planned if fates[item.row.edit.edit_id].outcome == "accepted"}
    if accepted:
        outcomes += move_pairs({edit_id: ref for edit_id, ref in placed.items() if edit_id not in accepted}, older)
    waiting = {(item.row.file, item.row.line) for item in order.additions if item.row.edit.edit_id in deferred}
    reasons = [*(last.told if last and accepted else ()), *(reason for item in decisions for reason in item.reasons)]
    fields: dict[str, Any] = {
        "seq": order.seq,
        "parent": order.parent,
        "batch": stream.objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in rows) if rows else None,
        "outcomes": stream.objects.put_rows(outcome.model_dump(mode="json", exclude_none=True) for outcome in outcomes),
        "report": last.report if last else None,
        "files": tuple(_keep_waiting(order.files, waiting)),
        "decision": decisions[-1].verdict if decisions else "nothing to write",
        "reasons": shorten_reasons(reasons),
        "seconds": seconds,
        **describe_writer(settings),
    }
    if accepted and last is not None:
        pairs = tuple(dict.fromkeys(ref.pairs for ref in placed.values()))
        fields |= {"manifest": last.manifest, "pairs": pairs, "promoted": is_promoted(settings, stream)}
        if held := explain_hold({edit_id: risk for edit_id, risk in record.risks.items() if edit_id in accepted}, settings.policy.max_risk):
            fields |= {"decision": "hold", "reasons": shorten_reasons([held, *reasons]), "promoted": False}
        if order.tier == "memory":
            return MemoryCommit(**fields), outcomes
        if order.source is None:
            return EditsCommit(**fields), outcomes
        return MergeCommit(source=order.source.stream, source_seq=order.source.seq, **fields), outcomes
    return RejectionCommit(manifest=order.manifest, **fields), outcomes


def is_promoted(settings: Settings, stream: Stream) -> bool:
    """Whether what is accepted now becomes the champion at once: people are not to be asked, and nothing waits for them beneath it."""
    return settings.policy.promote == "auto" and stream.head.challenger is None


def explain_hold(risks: Mapping[str, Risk], most: float | None) -> str | None:
    """Why a batch waits for approval; None where it does not.

    Args:
        risks: of the edits that it makes live.
        most: `policy.max_risk`.
    """
    over = [edit_id for edit_id, risk in risks.items() if most is not None and risk.figure > most]
    if not over:
        return None
    worst = max(over, key=lambda edit_id: risks[edit_id].figure)
    also = f", and of {len(over) - 1} more" if len(over) > 1 else ""
    return f"held: risk {risks[worst].figure:.1f} of edit {worst} over {most:g}{also} (policy.max_risk)"


def shorten_reasons(reasons: Sequence[str]) -> tuple[str, ...]:
    """As many of them, and as much of each, as a commit has room for."""
    return tuple(reason[:_MAX_REASON] for reason in reasons)[:_MAX_REASONS]


def _forget_deferred(outcome: Outcome, deferred: set[str]) -> Outcome:
    """A record superseded by one that waits for the next batch cannot name its occurrence, which does not exist yet."""
    if outcome.outcome == "superseded" and (outcome.by or "").rpartition("@")[0] in deferred:
        return outcome.model_copy(update={"by": None, "reason": "a later edit, which waits for the next batch, takes its place"})
    return outcome


def move_pairs(placed: Mapping[str, PairRef], older: Mapping[str, PairRef]) -> list[Outcome]:
    """Outcomes of live edits that another pair carries from now on.

    Args:
        placed: edit id → that pair.
        older: occurrence → the pair it had.
    """
    names = {split_occurrence(occurrence)[0]: occurrence for occurrence in older}
    moved = [(names[edit_id], ref) for edit_id, ref in placed.items()]
    return [
        Outcome(outcome="live", occurrence=name, pairs=ref.pairs, row=ref.row, before=describe_live(older[name])) for name, ref in moved
    ]


def describe_live(ref: PairRef | None) -> Standing:
    """How a live edit with this pair stands; None where it answers from memory."""
    return Standing(status="live", pairs=ref.pairs if ref else None, row=ref.row if ref else None)


def _conclude(
    row: BatchRow, replaces: Sequence[str], fate: Settled, placed: Mapping[str, PairRef], older: Mapping[str, PairRef], under: str
) -> Iterator[Outcome]:
    place = {"file": row.file, "line": row.line, "origin": row.origin}
    if fate.outcome != "accepted":
        yield Outcome(
            outcome="quarantined" if fate.outcome == "quarantined" else "rejected",
            occurrence=row.occurrence,
            reason=fate.reason,
            under=under,
            **place,
        )
        return
    ref = placed.get(row.edit.edit_id)  # None: it answers from memory
    yield Outcome(outcome="live", occurrence=row.occurrence, pairs=ref.pairs if ref else None, row=ref.row if ref else None, **place)
    for occurrence in replaces:
        yield Outcome(outcome="replaced", occurrence=occurrence, by=row.occurrence, before=describe_live(older.get(occurrence)))


def _move_once(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Two additions may name one live edit as theirs to replace (one left its slot, another moved in): the first one that was accepted
    did it."""
    kept: dict[tuple[str, str | None, str | None, int | None], Outcome] = {}
    for outcome in outcomes:
        kept.setdefault((outcome.outcome, outcome.occurrence, outcome.file, outcome.line), outcome)
    return list(kept.values())


def _keep_waiting(files: Sequence[FileUse], waiting: set[tuple[str, int]]) -> Iterator[FileUse]:
    """The lines consumed, less those of deferred edits, which the next batch will read again."""
    for use in files:
        lines = [line for first, last in use.lines for line in range(first, last + 1)]
        consumed = [line for line in lines if (use.digest, line) not in waiting]
        if consumed:
            runs = join_lines((line, line) for line in consumed)
            yield use.model_copy(update={"lines": runs, "done": use.done and len(consumed) == len(lines)})


def _list_settled(record: PreparedRecord, rounds: Sequence[Round]) -> list[str]:
    """The pairs objects that no later batch needs: those of deferred edits will be looked for."""
    deferred = {edit_id for item in rounds if item.decision for edit_id in item.decision.defer}
    waiting = {ref.pairs for item in rounds for edit_id, ref in item.placed.items() if edit_id in deferred}
    named = {stored.ref.pairs for stored in record.pairs.values()} | {ref.pairs for item in rounds for ref in item.placed.values()}
    return sorted(named - waiting)


def commit_once(stream: Stream, draft: Commit) -> None:
    """Commit, unless an earlier try of this stage did and failed afterwards: its commit differs in nothing but the time.

    Raises:
        ConflictError: another writer committed since the head that the draft builds on.
    """
    if stream.head.seq >= draft.seq and stream.log.read(draft.seq).model_copy(update={"time": draft.time}) == draft:
        return
    if stream.head.digest != draft.parent:
        raise ConflictError(f"expected commit {draft.seq - 1} to be the newest, found {stream.head.seq}: another writer committed first")
    commit(stream, draft, stream.head)
