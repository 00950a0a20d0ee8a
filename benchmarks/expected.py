"""What a stream should hold, kept beside it in plain lists: which facts came, and where each stands. Knows the rules of design §3, and
nothing of how they are carried out."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from errata.edits import Edit


@dataclass
class Fact:
    """One acceptance of an edit, or its refusal by the gate."""

    edit: Edit
    status: str
    """`live`, `replaced`, `withdrawn`, `reverted`, `quarantined`, or `settled` where it was quarantined and has come again."""


@dataclass
class Proposed:
    """A line that may become a fact, and the facts whose place it would take."""

    edit: Edit
    replaces: list[Fact]


@dataclass
class Expected:
    """The facts in order of arrival, and the states that can be served again."""

    facts: list[Fact] = field(default_factory=list)
    states: dict[int, list[str]] = field(default_factory=dict)
    """Commit → status of every fact there was."""
    files: dict[str, int] = field(default_factory=dict)
    """Digest of every file that was left in the inbox → its lines."""

    def apply(self, edits: Sequence[Edit], refused: Collection[str] = ()) -> None:
        """A batch came.

        Args:
            refused: ids that the gate did not accept.
        """
        proposed: list[Proposed] = []
        for edit in edits:
            self._propose(edit, proposed)
        for item in proposed:
            accepted = item.edit.edit_id not in refused
            for fact in self.facts:
                if fact.edit.edit_id == item.edit.edit_id and fact.status == "quarantined":
                    fact.status = "settled"
            if accepted:
                for fact in item.replaces:
                    fact.status = "replaced"
            self.facts.append(Fact(item.edit, "live" if accepted else "quarantined"))

    def withdraw(self, ids: Collection[str]) -> None:
        for fact in self.live:
            if fact.edit.edit_id in ids:
                fact.status = "withdrawn"

    def roll_back(self, target: int) -> None:
        """What was live at the target is live again, what has come since is not; all else stays as it is."""
        before = self.states[target]
        for number, fact in enumerate(self.facts):
            was = before[number] if number < len(before) else "reverted"
            if "live" in (was, fact.status):
                fact.status = was

    def remember(self, seq: int) -> None:
        """The newest commit is `seq`."""
        self.states[seq] = [fact.status for fact in self.facts]

    @property
    def live(self) -> list[Fact]:
        return [fact for fact in self.facts if fact.status == "live"]

    def spell(self) -> dict[str, list[list[str]]]:
        """Id → (target, status) of each time it was accepted, oldest first."""
        spelled: dict[str, list[list[str]]] = defaultdict(list)
        for fact in self.facts:
            if fact.status not in ("quarantined", "settled"):
                spelled[fact.edit.edit_id].append([fact.edit.target_new, fact.status])
        return dict(spelled)

    def _propose(self, edit: Edit, proposed: list[Proposed]) -> None:
        """Judge a line as if those before it were live already."""
        gone = [fact for item in proposed for fact in item.replaces]
        holders: list[Fact | Proposed] = [*proposed, *(fact for fact in self.live if not any(fact is other for other in gone))]
        own = next((holder for holder in holders if holder.edit.edit_id == edit.edit_id), None)
        in_slot = next((holder for holder in holders if holder.edit.slot == edit.slot), None)
        if own and own.edit.content_id == edit.content_id:
            return
        if own is None and self._was_taken_back(edit):
            return
        if own is None and in_slot and in_slot.edit.content_id == edit.content_id:
            return
        displaced = [holder for holder in (own, in_slot) if holder]
        replaces = [fact for holder in displaced for fact in _list_facts(holder)]
        replaces += [fact for fact in self.live if edit.edit_id == fact.edit.edit_id or edit.slot == fact.edit.slot]
        proposed[:] = [item for item in proposed if not any(item is holder for holder in displaced)]
        proposed.append(Proposed(edit, replaces))

    def _was_taken_back(self, edit: Edit) -> bool:
        """Whether it was withdrawn, or refused by the gate as it is."""
        before = [fact for fact in self.facts if fact.edit.edit_id == edit.edit_id and fact.status not in ("reverted", "settled")]
        accepted = [fact for fact in before if fact.status != "quarantined"]
        same = [fact for fact in before if fact.edit.content_id == edit.content_id]
        return bool((accepted and accepted[-1].status == "withdrawn") or (same and same[-1].status == "quarantined"))


def _list_facts(holder: Fact | Proposed) -> Iterator[Fact]:
    yield from holder.replaces if isinstance(holder, Proposed) else [holder]
