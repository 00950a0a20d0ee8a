"""What a file of edits would come to, counted without writing anything: `errata submit --check`."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from errata.edits import Edit, Refusal, Submission, digest_of
from errata.precedence import EmptyLookup, Judge, Lookup, Verdict

SHOWN_ORIGINS = 3
SHOWN_CONFLICTS = 5
MAX_REASONS = 20
"""Kinds of refusal that are told apart; a file that fails in more ways than these is hardly a file of edits."""
MAX_SOURCES = 20
OTHER_REASONS = "other reasons"


@dataclass(slots=True)
class RefusalGroup:
    """Refused records with one field and one kind of reason."""

    field: str | None
    reason: str
    """Of the first of them."""
    count: int = 0
    origins: list[str] = dataclasses.field(default_factory=list)
    """The first few."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two records that claim different targets for one slot; the later one wins."""

    subject: str
    prompt: str
    earlier: str
    """Origin of the record that loses."""
    earlier_target: str
    later: str
    later_target: str


@dataclass(slots=True)
class CheckReport:
    """Counts of records, unless said otherwise. `records = refused + duplicates + stale + withheld + superseded + writable`."""

    records: int = 0
    refused: int = 0
    refusals: list[RefusalGroup] = dataclasses.field(default_factory=list)
    duplicates: int = 0
    """The same edit stands earlier in the file, or is live in the stream (`live_duplicates`)."""
    live_duplicates: int = 0
    conflicts: int = 0
    """Another target for the same slot stands earlier in the file."""
    first_conflicts: list[Conflict] = dataclasses.field(default_factory=list)
    superseded: int = 0
    """Displaced by a later record of the file."""
    stale: int = 0
    """Submitted before the edit that they would replace."""
    withheld: int = 0
    """Withdrawn, quarantined, rejected or dropped before."""
    replacements: int = 0
    """Live edits of the stream that writable records replace."""
    writable: int = 0
    """Edits left to be written."""
    repeated_subjects: int = 0
    """Subjects with more than one edit in the file, however they are cased."""
    edits_of_repeated_subjects: int = 0
    with_paraphrases: int = 0
    with_neighbors: int = 0
    with_portability: int = 0
    with_several_probes: int = 0
    """Edits with more than one paraphrase, neighbour or portability prompt."""
    probes: int = 0
    """Paraphrases, neighbours and portability prompts together."""
    sources: dict[str, int] = dataclasses.field(default_factory=dict)
    """Readable records by the form or source they name; the most frequent first."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_edits(records: Iterable[Submission | Refusal], lookup: Lookup | None = None, settings_digest: str = "") -> CheckReport:
    """Count what would become of each record, holding identities only, so that a file of any size can be checked.

    Args:
        records: what `read_edits` yields, of one file or of several one after the other.
        lookup: the stream they would be submitted to; None looks at the records alone.
        settings_digest: as for `propose_batch`.
    """
    return _Check(Judge(lookup or EmptyLookup(), settings_digest)).run(records)


@dataclass(slots=True)
class _Check:
    judge: Judge
    report: CheckReport = dataclasses.field(default_factory=CheckReport)
    groups: dict[tuple[str | None, str], RefusalGroup] = dataclasses.field(default_factory=dict)
    subjects: Counter[str] = dataclasses.field(default_factory=Counter)
    sources: Counter[str] = dataclasses.field(default_factory=Counter)
    claims: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    """Slot → (target, origin) of the newest proposal for it."""
    replaced: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Position of a proposal that still stands → live occurrences it replaces."""

    def run(self, records: Iterable[Submission | Refusal]) -> CheckReport:
        for position, record in enumerate(records):
            self.report.records += 1
            if isinstance(record, Refusal):
                self._count_refusal(record)
            else:
                self._count_edit(record.edit)
                self._count_verdict(record, self.judge.judge(record, position), position)
        report = self.report
        report.refusals = sorted(self.groups.values(), key=lambda group: -group.count)
        report.replacements = len({occurrence for occurrences in self.replaced.values() for occurrence in occurrences})
        repeated = [count for count in self.subjects.values() if count > 1]
        report.repeated_subjects, report.edits_of_repeated_subjects = len(repeated), sum(repeated)
        report.sources = dict(self.sources.most_common(MAX_SOURCES))
        return report

    def _count_refusal(self, refusal: Refusal) -> None:
        self.report.refused += 1
        # Messages say "expected …, found …": what was expected is the kind of fault, what was found belongs to one record.
        kind = refusal.reason.partition(", found ")[0].partition("; found ")[0]
        key = (re.sub(r"\[\d+\]", "[]", refusal.field) if refusal.field else None, re.sub(r"'[^']*'", "''", kind))
        if key not in self.groups and len(self.groups) >= MAX_REASONS:
            key = (None, OTHER_REASONS)
        group = self.groups.setdefault(key, RefusalGroup(refusal.field, refusal.reason if key[1] != OTHER_REASONS else OTHER_REASONS))
        group.count += 1
        if len(group.origins) < SHOWN_ORIGINS:
            group.origins.append(refusal.origin)

    def _count_edit(self, edit: Edit) -> None:
        report = self.report
        self.subjects[digest_of(edit.subject.casefold().encode())[:16]] += 1
        self.sources[edit.source or "not named"] += 1
        counts = [len(edit.paraphrase_prompts), len(edit.neighborhood_prompts), len(edit.portability_prompts)]
        report.with_paraphrases += counts[0] > 0
        report.with_neighbors += counts[1] > 0
        report.with_portability += counts[2] > 0
        report.with_several_probes += max(counts) > 1
        report.probes += sum(counts)

    def _count_verdict(self, submission: Submission, verdict: Verdict, position: int) -> None:
        report = self.report
        match verdict.outcome:
            case "duplicate":
                report.duplicates += 1
                report.live_duplicates += verdict.by is not None
            case "stale":
                report.stale += 1
            case "withheld":
                report.withheld += 1
            case "proposed":
                report.writable += 1 - len(verdict.supersedes)
                report.superseded += len(verdict.supersedes)
                for earlier in verdict.supersedes:
                    self.replaced.pop(earlier, None)
                if verdict.replaces:
                    self.replaced[position] = verdict.replaces
                self._note_conflict(submission)

    def _note_conflict(self, submission: Submission) -> None:
        edit, report = submission.edit, self.report
        target, origin = self.claims.get(edit.slot, (edit.target_new, ""))
        if target != edit.target_new:
            report.conflicts += 1
            if len(report.first_conflicts) < SHOWN_CONFLICTS:
                report.first_conflicts.append(Conflict(edit.subject, edit.prompt, origin, target, submission.origin, edit.target_new))
        self.claims[edit.slot] = (edit.target_new, submission.origin)
