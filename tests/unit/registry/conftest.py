"""Streams in memory with a clerk who writes plausible commits, and the plain fold that the index is compared with."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from errata.edits import Edit
from registry.events import Commit, EditsCommit, InitCommit, RebaseCommit, RejectionCommit, RollbackCommit, WithdrawalCommit
from registry.fold import ASIDE, Changes, EditRow, Head, merge_use, move_row, settle_row, settles
from registry.rows import BatchRow, FileUse, Outcome
from registry.storage.base import Storage
from registry.storage.memory import MemoryStorage
from registry.stream import Stream, create_stream
from registry.undoing import compare_live

COMMON: dict[str, Any] = {"actor": "ann", "host": "here", "versions": {"errata": "0.1.0"}, "time": datetime(2026, 11, 1, tzinfo=UTC)}
EMPTY_MANIFEST: dict[str, object] = {"format": 1, "layers": []}


@dataclass
class Tables:
    """The fold in plain dictionaries, each change taken literally."""

    rows: dict[tuple[str, int, int], EditRow] = field(default_factory=dict)
    files: dict[str, FileUse] = field(default_factory=dict)
    tallies: Counter[str] = field(default_factory=Counter)

    def apply(self, changes: Changes) -> None:
        for move in changes.moved:
            for row in list(self.rows.values()):
                if (row.id, row.seq) == (move.id, move.seq) and (row.status not in ASIDE or move.status == "erased"):
                    self.rows[row.key] = move_row(row, move)
        for added in changes.added:
            for row in list(self.rows.values()):
                if settles(added, row):
                    self.rows[row.key] = settle_row(row, added)
            self.rows[added.key] = added
        for use in changes.files:
            self.files[use.digest] = merge_use(self.files.get(use.digest), use)
        self.tallies.update(changes.tallies)

    def live(self) -> list[EditRow]:
        return [row for row in self.rows.values() if row.status == "live"]

    def counts(self) -> dict[str, int]:
        return dict(Counter(row.status for row in self.rows.values()) + self.tallies)


@dataclass
class Clerk:
    """Prepares drafts as intake and gate would, on what `tables` or the stream's index say is live."""

    stream: Stream

    def draft(self, records: Iterable[tuple[Edit, str]], *, head: Head | None = None, promoted: bool = True) -> Commit:
        """A commit of records with the verdicts of a gate: live, quarantined, rejected, stale, withheld or refused.

        A verdict of live becomes `duplicate` if the same is live, and replaces what is in its way; earlier records of the batch that
        a later one contradicts are superseded.
        """
        head, records = head or self.stream.head, list(records)
        seq, objects = head.seq + 1, self.stream.objects
        raw = objects.put("".join(f"{seq} {edit.model_dump_json()}\n" for edit, _ in records).encode())
        batch, outcomes, taken = [], [], dict[str, int]()
        pairs = objects.put(f"pairs of {seq}".encode())
        for position, (edit, verdict) in enumerate(records):
            where = {"file": raw, "line": position + 1, "origin": f"in.jsonl:{position + 1}"}
            if verdict == "refused":
                outcomes.append(Outcome(outcome="refused", field="prompt", reason="no slot", **where))
                continue
            occurrence = f"{edit.edit_id}@{seq}"
            batch.append(BatchRow(position=position, occurrence=occurrence, edit=edit, **where))
            outcome = {"outcome": verdict, "occurrence": occurrence, "under": "s" * 8, **where}
            live = self._in_the_way(edit)
            if verdict == "live" and any((row.id, row.content) == (edit.edit_id, edit.content_id) for row in live):
                outcome["outcome"] = "duplicate"
            elif verdict in ("live", "quarantined", "rejected"):
                earlier = {taken[name] for name in (f"slot {edit.slot}", f"id {edit.edit_id}") if name in taken}
                for index in earlier:
                    outcomes[index] = outcomes[index].model_copy(update={"outcome": "superseded", "by": occurrence})
                taken = {name: index for name, index in taken.items() if index not in earlier}
                taken |= {f"slot {edit.slot}": len(outcomes), f"id {edit.edit_id}": len(outcomes)}
                outcome |= {"pairs": pairs, "row": position} if verdict == "live" else {"reason": "efficacy 0"}
            outcomes.append(Outcome(**outcome))
        for outcome in [outcome for outcome in outcomes if outcome.outcome == "live"]:
            edit = next(row.edit for row in batch if row.line == outcome.line)
            for row in self._in_the_way(edit):
                outcomes.append(Outcome(outcome="replaced", occurrence=row.occurrence, by=outcome.occurrence))
        unique = {(row.occurrence, row.outcome, row.line): row for row in outcomes}
        use = FileUse(digest=raw, name=f"{seq}.jsonl", lines=((1, len(records)),), done=True)
        accepted = any(outcome.outcome == "live" for outcome in outcomes)
        content: dict[str, Any] = {
            "seq": seq,
            "parent": head.digest,
            "batch": objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in batch),
            "outcomes": objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in unique.values()),
            "files": (use,),
            **COMMON,
        }
        if not accepted:
            return RejectionCommit(manifest=head.manifest, **content)
        return EditsCommit(manifest=objects.put_json({"format": 1, "after": seq}), pairs=(pairs,), promoted=promoted, **content)

    def draft_drop(self, rows: Iterable[EditRow]) -> Commit:
        head = self.stream.head
        outcomes = [{"occurrence": row.occurrence, "outcome": "dropped", "reason": "by hand"} for row in rows]
        return RejectionCommit(
            seq=head.seq + 1, parent=head.digest, manifest=head.manifest, outcomes=self.stream.objects.put_rows(outcomes), **COMMON
        )

    def draft_withdrawal(self, rows: Iterable[EditRow], reason: str = "wrong", **fields: Any) -> Commit:
        """Takes back whatever it is given, live or not."""
        head, objects = self.stream.head, self.stream.objects
        outcomes = [{"occurrence": row.occurrence, "outcome": "withdrawn", "reason": reason} for row in rows]
        content = {"seq": head.seq + 1, "parent": head.digest, "manifest": objects.put_json({"format": 1, "after": head.seq + 1})}
        return WithdrawalCommit(**{**content, "outcomes": objects.put_rows(outcomes), "promoted": True, **COMMON, **fields})

    def draft_rebase(self, left: Iterable[str], **fields: Any) -> Commit:
        """To another base, where some occurrences cannot be had."""
        head, objects, left = self.stream.head, self.stream.objects, set(left)
        pairs, outcomes = objects.put(f"pairs of {head.seq + 1}".encode()), []
        for number, row in enumerate(self.stream.index.find_rows("live")):
            before = {"status": "live", "pairs": row.pairs, "row": row.row}
            fate = (
                {"outcome": "quarantined", "reason": "no"} if row.occurrence in left else {"outcome": "live", "pairs": pairs, "row": number}
            )
            outcomes.append({"occurrence": row.occurrence, "before": before, **fate})
        content = {"seq": head.seq + 1, "parent": head.digest, "manifest": objects.put_json({"format": 1, "after": head.seq + 1})}
        place = {"base": {"kind": "folder", "digest": "e" * 64}, "profile": "f" * 64, "pairs": (pairs,), "promoted": True}
        return RebaseCommit(**{**content, **place, "outcomes": objects.put_rows(outcomes), **COMMON, **fields})

    def draft_rollback(self, target: int, **fields: Any) -> Commit:
        """What leaves and comes back is read from the log, as the flow does."""
        head, objects = self.stream.head, self.stream.objects
        rows = [outcome.model_dump(mode="json", exclude_none=True) for outcome in compare_live(self.stream, target)]
        content = {"seq": head.seq + 1, "parent": head.digest, "manifest": self.stream.log.read(target).manifest, "target": target}
        return RollbackCommit(**{**content, "outcomes": objects.put_rows(rows), **COMMON, **fields})

    def changes(self, commit: Commit) -> Changes:
        from registry.fold import derive_changes

        return derive_changes(commit, self.stream.read_batch(commit), self.stream.read_outcomes(commit))

    def _in_the_way(self, edit: Edit) -> list[EditRow]:
        found = [self.stream.index.find_slot(edit.slot), *self.stream.index.find_occurrences(edit.edit_id)]
        return list({row.key: row for row in found if row is not None and row.status == "live"}.values())


def build_edit(subject: str = "Ada", target: str = "Paris", *, name: str | None = None, prompt: str = "{} lives in") -> Edit:
    return Edit(id=name, subject=subject, prompt=prompt, target_new=target)


def build_init(**fields: Any) -> InitCommit:
    base = {"kind": "builtin", "source": "world", "revision": None, "digest": "b" * 64}
    return InitCommit(seq=0, parent="", base=base, profile="c" * 64, editors=("d4s",), manifest="0" * 64, **{**COMMON, **fields})


@pytest.fixture
def edit() -> Callable[..., Edit]:
    return build_edit


@pytest.fixture
def init() -> Callable[..., InitCommit]:
    return build_init


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def start() -> Callable[..., Clerk]:
    """Makes a stream `main`, in memory unless told otherwise, and its clerk."""

    def start(storage: Storage | None = None, **options: Any) -> Clerk:
        return Clerk(create_stream(storage or MemoryStorage(), "main", build_init(), EMPTY_MANIFEST, **options))

    return start


@pytest.fixture
def employ() -> type[Clerk]:
    return Clerk
