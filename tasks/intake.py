"""Inbox to work order: what waits, what of it is worth writing, and on which head."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

from errata.batching import Arrival, Proposal, Settled, propose_batch
from errata.edits import Refusal, Submission, canonical_json, digest_of
from errata.gate import digest_judgement
from errata.intake import Intake
from errata.settings import Settings
from registry.fold import HELD, join_lines
from registry.inbox import InboxFile, read_waiting
from registry.orders import Order, Planned, Source
from registry.rows import BatchRow, FileUse, Outcome
from registry.setbacks import note_setback, read_setbacks, read_untaken, set_aside
from registry.stream import Stream
from registry.undoing import find_gone, submit_gone
from tasks._session import open_named
from tasks._task import stage


@stage
def order_batch(stream: str) -> str | None:
    """The next batch as a stored order; None when nothing waits. Live edits that answer from memory are written with it.

    Files that a run failed over come last and one by one, so that they fail alone, and are set aside after `apply.max_tries`.
    """
    settings, opened = open_named(stream)
    setbacks = read_setbacks(opened)
    found = _propose(settings, opened, (file for file in read_waiting(opened) if file.digest not in setbacks), "weights")
    for file in read_waiting(opened) if found is None and setbacks else ():
        reasons = setbacks.get(file.digest, ())
        if len(reasons) >= settings.apply.max_tries:
            set_aside(opened, file, reasons)
        elif reasons and (found := _propose(settings, opened, [file], "weights")) is not None:
            break
    return found.store(opened.objects) if found is not None else None


@stage
def order_memory(stream: str) -> str | None:
    """What is to answer from memory until the next batch writes it, as a stored order; None when nothing waits that was not tried."""
    settings, opened = open_named(stream)
    tried = read_setbacks(opened).keys() | read_untaken(opened, digest_memory(settings, opened))
    found = _propose(settings, opened, (file for file in read_waiting(opened) if file.digest not in tried), "memory")
    return found.store(opened.objects) if found is not None else None


def digest_memory(settings: Settings, stream: Stream) -> str:
    """What it depends on whether memory can answer. 16 hex digits."""
    head = stream.head
    return digest_of(canonical_json([head.base, settings.memory, digest_judgement(settings.gate, head.profile)]))[:16]


@stage
def is_overtaken(stream: str, order: str) -> bool:
    """Whether another writer has committed since an order was made."""
    _, opened = open_named(stream)
    return opened.head.digest != Order.load(opened.objects, order).parent


@stage
def note_failure(stream: str, order: str, reason: str) -> None:
    """Note that a run failed over the files of an order."""
    _, opened = open_named(stream)
    note_setback(opened, [use.digest for use in Order.load(opened.objects, order).files], reason)


def _propose(settings: Settings, stream: Stream, files: Iterable[InboxFile], tier: Literal["memory", "weights"]) -> Order | None:
    """A batch of what these files hold, and where it is written of what answers from memory; None where there is nothing."""
    intake, under = Intake(files), digest_judgement(settings.gate, stream.head.profile)
    proposal = propose_batch(intake.read(), stream.index, settings.apply.batch_size, under)
    lines = ((arrival.file, arrival.line) for arrival in proposal.considered)
    order = write_order(stream, under, proposal, measure_files(lines, intake.names, intake.ended), tier=tier)
    remembered = _plan_remembered(settings, stream, order) if tier == "weights" else ()
    if not proposal.considered and not remembered:
        return None
    return order.model_copy(update={"additions": (*order.additions, *remembered)})


def _plan_remembered(settings: Settings, stream: Stream, order: Order) -> tuple[Planned, ...]:
    """The live edits that answer from memory, as additions that take their own place: each is accepted once more, with a pair. One that
    the gate refuses goes on answering from memory, and is tried again under other settings.

    Args:
        order: what comes from the inbox; what it replaces is left to it.
    """
    taken = {name for item in order.additions for name in item.replaces} | {item.row.edit.edit_id for item in order.additions}
    first = 1 + max((row.position for row in (*order.rows, *(item.row for item in order.additions))), default=-1)
    planned: list[Planned] = []
    for row in stream.index.find_unwritten():
        if len(order.additions) + len(planned) >= settings.apply.batch_size:
            break
        refused = any(other.status in HELD and other.under == order.under for other in stream.index.find_occurrences(row.id))
        if refused or {row.occurrence, row.id} & taken:
            continue
        again = stream.read_record(row).model_copy(update={"position": first + len(planned), "occurrence": f"{row.id}@{order.seq}"})
        planned.append(Planned(row=again, replaces=(row.occurrence,)))
    return tuple(planned)


@stage
def requeue_gone(stream: str, rollback: int) -> str | None:
    """Submit once more what a rollback or a refusal took out; the name of the file in the inbox, None where there is nothing."""
    _, opened = open_named(stream)
    return submit_gone(opened, find_gone(opened, rollback)[1])


def write_order(
    stream: Stream,
    under: str,
    proposal: Proposal,
    files: tuple[FileUse, ...],
    source: Source | None = None,
    tier: Literal["memory", "weights"] = "weights",
) -> Order:
    """The proposal in the terms of the log.

    Args:
        under: what it will be judged under.
        files: the lines of the inbox that it consumes.
        source: where its edits come from, if not from there.
    """
    head = stream.head
    rows = {position: _build_row(position, arrival, head.seq + 1) for position, arrival in enumerate(proposal.considered)}
    occurrences = {position: row.occurrence for position, row in rows.items() if row}
    planned = []
    for addition in proposal.additions:
        row = rows[addition.position]
        assert row is not None
        planned.append(Planned(row=row, replaces=addition.replaces))
    return Order(
        seq=head.seq + 1,
        parent=head.digest,
        manifest=head.manifest,
        additions=tuple(planned),
        rows=tuple(row for item in proposal.settled if (row := rows[item.position])),
        settled=tuple(_settle(item, occurrences) for item in proposal.settled),
        files=files,
        under=under,
        source=source,
        tier=tier,
    )


def measure_files(lines: Iterable[tuple[str, int]], names: dict[str, str], ended: Iterable[str]) -> tuple[FileUse, ...]:
    """Which lines of which files a batch consumes.

    Args:
        lines: (digest of the file, line).
        ended: files of which nothing is left after these lines.
    """
    used: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for file, line in lines:
        used[file].append((line, line))
    done = set(ended)
    return tuple(FileUse(digest=file, name=names[file], lines=join_lines(runs), done=file in done) for file, runs in used.items())


def _build_row(position: int, arrival: Arrival, seq: int) -> BatchRow | None:
    if not isinstance(arrival.record, Submission):
        return None
    edit = arrival.record.edit
    return BatchRow(
        position=position,
        occurrence=f"{edit.edit_id}@{seq}",
        edit=edit,
        origin=arrival.record.origin,
        file=arrival.file,
        line=arrival.line,
    )


def _settle(item: Settled, occurrences: dict[int, str]) -> Outcome:
    refusal = item.arrival.record if isinstance(item.arrival.record, Refusal) else None
    return Outcome(
        outcome=item.outcome,
        occurrence=occurrences.get(item.position),
        by=item.by or (occurrences[item.by_position] if item.by_position is not None else None),
        reason=item.reason,
        origin=item.arrival.record.origin,
        field=refusal.field if refusal else None,
        file=item.arrival.file,
        line=item.arrival.line,
    )
