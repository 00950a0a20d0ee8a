"""One stream into another: the live edits of the first are proposed to the second as if they had been submitted now, with the pairs they
have. The sums of D4S add, so nothing is optimised again but key groups that meet edits of the same subject there."""

from collections.abc import Iterator, Sequence

from errata.batching import Arrival, Proposal, propose_batch
from errata.candidates import name_pair, read_pairs
from errata.edits import Edit, Submission
from errata.errors import InputError
from errata.gate import digest_judgement
from errata.manifests import PairRef
from errata.settings import Settings
from registry.fold import EditRow
from registry.orders import Source
from registry.prepared import remember_pairs
from registry.stream import Stream, open_stream
from tasks._progress import show_progress
from tasks._session import load_model, open_named
from tasks._task import stage
from tasks.editing import digest_preparation, refer
from tasks.intake import write_order

_ROWS = 500
"""Pairs per object: few objects, so that one commit can name the pairs of a whole stream."""
_NO_NEWS = ("duplicate", "withheld")
"""What a merge has nothing to say about: live here already, or judged or taken back here before."""


@stage
def order_merge(stream: str, source: str) -> str | None:
    """The live edits of `source` that are worth writing into `stream`, as a stored order; None when there are none.

    Raises:
        InputError: the streams differ in base, profile or editor, or are one.
        UnknownNameError: no such stream.
    """
    settings, opened = open_named(stream)
    other = open_stream(settings.root, source, settings.cache)
    rows, proposal = propose_merge(settings, opened, other)
    told = {(item.arrival.file, item.arrival.line) for item in proposal.settled if item.outcome in _NO_NEWS}
    arrivals = [arrival for arrival in proposal.considered if (arrival.file, arrival.line) not in told]
    under = digest_judgement(settings.gate, opened.head.profile)
    proposal = propose_batch(arrivals, opened.index, len(arrivals) + 1, under)
    if not proposal.additions:
        return None
    coming = {(addition.arrival.file, addition.arrival.line): addition.submission.edit for addition in proposal.additions}
    _bring_pairs(settings, opened, other, [(row, edit) for row in rows if (edit := coming.get(_locate(row))) is not None])
    return write_order(opened, under, proposal, (), Source(stream=other.name, seq=other.head.seq)).store(opened.objects)


def propose_merge(settings: Settings, into: Stream, other: Stream) -> tuple[list[EditRow], Proposal]:
    """The live edits of `other`, in order of arrival there, and what would become of each in `into`.

    Raises:
        InputError: as `order_merge`.
    """
    if into.name == other.name:
        raise InputError(f"merge: expected two streams, found {into.name!r} twice")
    for name, here, there in (
        ("base", into.head.base, other.head.base),
        ("profile", into.head.profile, other.head.profile),
        ("editors", ", ".join(into.head.editors), ", ".join(other.head.editors)),
    ):
        if here != there:
            raise InputError(
                f"merge: expected two streams on one base and profile, found {name} {here[:12]} of {into.name!r} and {there[:12]} of "
                f"{other.name!r}; `errata rebase` takes a stream to another base or profile, `errata adopt` to another solve part"
            )
    rows = list(other.index.find_rows("live"))
    under = digest_judgement(settings.gate, into.head.profile)
    return rows, propose_batch(_read_arrivals(other, rows), into.index, len(rows) + 1, under)


def _read_arrivals(other: Stream, rows: Sequence[EditRow]) -> Iterator[Arrival]:
    """Live edits as arrivals: a batch object of the other stream takes the place of the file."""
    for row, edit in zip(rows, other.read_edits(rows), strict=True):
        yield Arrival(Submission(edit=edit, origin=f"{other.name}:{row.occurrence}"), *_locate(row))


def _locate(row: EditRow) -> tuple[str, int]:
    """Where an arrival of the other stream stands: its batch object, and a line of it."""
    return row.batch, row.position + 1


def _bring_pairs(settings: Settings, stream: Stream, other: Stream, coming: Sequence[tuple[EditRow, Edit]]) -> None:
    """Store the pairs of edits that come, with hints, so that they are found instead of prepared.

    A pair that an edit shares with one that does not come is of no use here: its group will be another one. Neither are pairs that
    depend on what they were added to.
    """
    model = load_model(settings, stream)
    if not model.editor.order_free:
        return
    owners: dict[PairRef, list[Edit]] = {}
    for row, edit in coming:
        if row.pairs is not None:  # else it answers from memory there
            owners.setdefault(refer(row), []).append(edit)
    scope = digest_preparation(model, stream.head.manifest)
    refs = list(owners)
    with show_progress("copying pairs") as on_progress:
        for start in range(0, len(refs), _ROWS):
            pairs = read_pairs(other.objects, refs[start : start + _ROWS])
            assert pairs is not None, "expected pairs for at least one edit"
            ids = [tuple(sorted(edit.edit_id for edit in owners[ref])) for ref in refs[start : start + _ROWS]]
            whole = [row for row in range(len(pairs)) if pairs.owners[row] == ids[row]]
            if whole:
                kept = [sorted(owners[refs[start + row]], key=lambda edit: edit.edit_id) for row in whole]
                stored = stream.objects.put(pairs.take(whole).to_bytes())
                remember_pairs(stream, scope, stored, {name_pair(edits): [None] * len(edits) for edits in kept})
            on_progress(min(start + _ROWS, len(refs)), len(refs))
