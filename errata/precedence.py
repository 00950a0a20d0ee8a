"""Which of two edits holds: the rules of design §3, "Identity".

Arrivals are judged one after the other, each as if those before it were already live. So the facts that are live in the end do not
depend on where a stream of arrivals is cut into batches; only the number of occurrences does, because an edit that a later one of
the same batch displaces is superseded without ever being written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol

from errata.edits import Submission


class EditRow(Protocol):
    """What the log knows of one occurrence (`registry.fold.EditRow`)."""

    @property
    def id(self) -> str: ...
    @property
    def occurrence(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def slot(self) -> str: ...
    @property
    def content(self) -> str: ...
    @property
    def under(self) -> str | None:
        """Digest of the settings it was judged under."""

    @property
    def submitted_at(self) -> str | None:
        """ISO 8601 with offset."""

    @property
    def withdrawn_at(self) -> str | None:
        """Time of its withdrawal, in the same form."""


class Lookup(Protocol):
    """The log's answers (`registry.index.Index`)."""

    def find_edit(self, identity: str, /) -> EditRow | None:
        """The live occurrence of an id, else the newest."""

    def find_occurrences(self, identity: str, /) -> Sequence[EditRow]:
        """All occurrences of an id, oldest first."""

    def find_slot(self, slot: str, /) -> EditRow | None:
        """The live edit in a conflict slot."""


class EmptyLookup:
    """The log of a stream without edits."""

    def find_edit(self, identity: str, /) -> None:
        return None

    def find_occurrences(self, identity: str, /) -> Sequence[EditRow]:
        return ()

    def find_slot(self, slot: str, /) -> None:
        return None


@dataclass(slots=True)
class Verdict:
    """What one arrival comes to."""

    outcome: Literal["proposed", "duplicate", "stale", "withheld"]
    reason: str = ""
    by: str | None = None
    by_position: int | None = None
    supersedes: tuple[int, ...] = ()
    """Positions of earlier proposals that it displaces."""
    replaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who holds an id or a slot at this point: a proposal of this batch (position) or a live edit of the log (occurrence)."""

    id: str
    slot: str
    content: str
    submitted_at: datetime | None
    position: int | None = None
    occurrence: str | None = None
    replaces: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.occurrence or f"{self.id} earlier in this batch"


@dataclass(slots=True)
class Judge:
    """Judges arrivals in order, remembering only identities, so that a file of any size can be checked."""

    lookup: Lookup
    settings_digest: str
    _by_id: dict[str, _Holder] = field(default_factory=dict)
    _by_slot: dict[str, _Holder] = field(default_factory=dict)
    _proposed: dict[str, set[str]] = field(default_factory=dict)
    """Id → contents that were proposed under it in this batch, displaced since or not."""
    _gone: set[str] = field(default_factory=set)
    """Live occurrences that a proposal replaces."""

    def judge(self, submission: Submission, position: int) -> Verdict:
        edit = submission.edit
        own, in_slot = self._find_own(edit.edit_id), self._find_in_slot(edit.slot)
        if own and own.content == edit.content_id:
            return Verdict("duplicate", f"the same edit as {own.name}", own.occurrence, own.position)
        if not submission.again and (withheld := self._withhold(submission)):
            return withheld
        if not own and in_slot and in_slot.content == edit.content_id:
            return Verdict("duplicate", f"the same fact as {in_slot.name}", in_slot.occurrence, in_slot.position)
        displaced = [holder for holder in dict.fromkeys((own, in_slot)) if holder]
        since = edit.submitted_at or submission.arrived
        for holder in displaced:
            if not submission.force and since and holder.submitted_at and since < holder.submitted_at:
                times = f"submitted at {since.isoformat()}, before {holder.submitted_at.isoformat()}"
                return Verdict("stale", f"{times} of {holder.name} which it would replace", holder.occurrence, holder.position)
        return self._propose(submission, position, displaced)

    def _propose(self, submission: Submission, position: int, displaced: Sequence[_Holder]) -> Verdict:
        edit = submission.edit
        replaced: list[str] = []
        for holder in displaced:
            replaced += [holder.occurrence] if holder.occurrence else holder.replaces
            if holder.position is not None:
                del self._by_id[holder.id], self._by_slot[holder.slot]
        # What the log holds under this id and slot may already have been displaced by another proposal. Should the gate drop that one,
        # this one must still share neither.
        for row in (self.lookup.find_edit(edit.edit_id), self.lookup.find_slot(edit.slot)):
            if row and row.status == "live":
                replaced.append(row.occurrence)
        replaces = tuple(dict.fromkeys(replaced))
        self._gone.update(replaces)
        self._proposed.setdefault(edit.edit_id, set()).add(edit.content_id)
        holder = _Holder(edit.edit_id, edit.slot, edit.content_id, edit.submitted_at, position, replaces=replaces)
        self._by_id[holder.id] = self._by_slot[holder.slot] = holder
        supersedes = tuple(holder.position for holder in displaced if holder.position is not None)
        return Verdict("proposed", supersedes=supersedes, replaces=replaces)

    def _find_own(self, identity: str) -> _Holder | None:
        row = None if identity in self._proposed else self.lookup.find_edit(identity)
        return self._by_id.get(identity) or self._hold(row)

    def _find_in_slot(self, slot: str) -> _Holder | None:
        return self._by_slot.get(slot) or self._hold(self.lookup.find_slot(slot))

    def _hold(self, row: EditRow | None) -> _Holder | None:
        if row is None or row.status != "live" or row.occurrence in self._gone:
            return None
        return _Holder(row.id, row.slot, row.content, _read_time(row.submitted_at), occurrence=row.occurrence)

    def _withhold(self, submission: Submission) -> Verdict | None:
        """Whether the log says that this was tried or taken back, and nothing has changed since."""
        edit = submission.edit
        proposed = self._proposed.get(edit.edit_id, set())
        if edit.content_id in proposed or self.lookup.find_edit(edit.edit_id) is None:
            return None
        # What a rollback left behind is as if it had never come: the log answers as it would have at the commit that is served again.
        # An accepted occurrence settles what was held of its id (`registry.fold.settles`): so does one proposed in this batch.
        passed = ("superseded", "stale", "reverted", "quarantined", "rejected") if proposed else ("superseded", "stale", "reverted")
        rows = [row for row in reversed(self.lookup.find_occurrences(edit.edit_id)) if row.status not in passed]
        accepted = next((row for row in rows if row.status in ("live", "replaced", "withdrawn", "erased")), None)
        if accepted and accepted.status in ("withdrawn", "erased") and not proposed:
            since = _read_time(accepted.withdrawn_at)
            return None if since and edit.submitted_at and edit.submitted_at > since else _withheld(accepted)
        same = next((row for row in rows if row.content == edit.content_id), None)
        if same is None:
            return None  # corrected since: this content has not been tried
        tried = same.status in ("quarantined", "rejected") and same.under == self.settings_digest
        return _withheld(same) if tried or same.status == "dropped" else None


def _withheld(row: EditRow) -> Verdict:
    under = " under the same settings" if row.status in ("quarantined", "rejected") else ""
    return Verdict("withheld", f"{row.occurrence} was {row.status}{under}; submit it with `--again` to try it once more", row.occurrence)


def _read_time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
