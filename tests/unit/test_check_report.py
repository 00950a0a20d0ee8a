"""`submit --check`: what a file of edits would come to."""

import os
from pathlib import Path
from typing import Any

import pytest

from errata.batching import Arrival, propose_batch
from errata.edits import Edit, Refusal, Submission
from errata.precedence import EditRow, EmptyLookup, Lookup
from errata.readers import report
from errata.readers.files import read_edits
from errata.readers.report import CheckReport, check_edits

SHARED = Path(os.environ.get("ERRATA_TEST_SHARED") or Path(__file__).resolve().parents[3] / "shared")


def submit(subject: str = "Ada", target: str = "Paris", origin: str = "", **fields: Any) -> Submission:
    return Submission(edit=Edit(**{"subject": subject, "prompt": "{} lives in", "target_new": target, **fields}), origin=origin)


class _Row:
    def __init__(self, edit: Edit, status: str) -> None:
        self.id, self.occurrence, self.status = edit.edit_id, f"{edit.edit_id}@1", status
        self.slot, self.content, self.under, self.submitted_at = edit.slot, edit.content_id, "settings", None


class _Stream:
    def __init__(self, *rows: _Row) -> None:
        self.rows = rows

    def find_edit(self, identity: str, /) -> EditRow | None:
        return next((row for row in self.rows if row.id == identity), None)

    def find_occurrences(self, identity: str, /) -> list[EditRow]:
        return [row for row in self.rows if row.id == identity]

    def find_slot(self, slot: str, /) -> EditRow | None:
        return next((row for row in self.rows if row.slot == slot and row.status == "live"), None)


def test_each_record_is_counted_once() -> None:
    records = [
        submit("Ada", "Paris", "f[0]"),
        submit("Ada", "Paris", "f[1]"),
        submit("ADA", "Rome", "f[2]"),
        submit(
            "Bo", "Rome", "f[3]", paraphrase_prompts=["Bo's home is", "Bo dwells in"], neighborhood_prompts=["Cy lives in"], source="zsRE"
        ),
        Refusal(origin="f[4]", field="prompt", reason="expected exactly one '{}', found 0 in 'x'"),
        Refusal(origin="f[5]", field="prompt", reason="expected exactly one '{}', found 2 in '{} {}'"),
        Refusal(origin="f[6]", field="subject", reason="expected text, found 5"),
    ]
    found = check_edits(records)
    assert (found.records, found.refused, found.duplicates, found.conflicts, found.superseded, found.writable) == (7, 3, 1, 1, 1, 2)
    assert (found.repeated_subjects, found.edits_of_repeated_subjects) == (1, 3)
    assert (found.with_paraphrases, found.with_neighbors, found.with_several_probes, found.probes) == (1, 1, 1, 3)
    assert found.sources == {"not named": 3, "zsRE": 1}
    assert [(group.field, group.count, group.origins) for group in found.refusals] == [
        ("prompt", 2, ["f[4]", "f[5]"]),
        ("subject", 1, ["f[6]"]),
    ]
    (conflict,) = found.first_conflicts
    assert (conflict.earlier, conflict.earlier_target, conflict.later, conflict.later_target) == ("f[0]", "Paris", "f[2]", "Rome")
    assert balance(found)


def test_against_a_stream_duplicates_replacements_and_withheld_edits_are_counted() -> None:
    live, contested, tried = submit("Ada").edit, submit("Bo").edit, submit("Cy").edit
    stream: Lookup = _Stream(_Row(live, "live"), _Row(contested, "live"), _Row(tried, "quarantined"))
    records = [submit("Ada"), submit("Bo", "Rome"), submit("Bo", "Oslo"), submit("Cy"), submit("Di")]
    found = check_edits(records, stream, "settings")
    assert (found.duplicates, found.live_duplicates, found.replacements, found.withheld, found.writable) == (1, 1, 1, 1, 2)
    assert balance(found)
    assert check_edits(records, stream, "other settings").withheld == 0


def test_kinds_of_refusals_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_REASONS", 3)
    records = [Refusal(origin=f"f:{number}", reason=f"fault of kind {number}") for number in range(10)]
    found = check_edits(records)
    assert [group.count for group in found.refusals] == [7, 1, 1, 1]
    assert found.refusals[0].reason == report.OTHER_REASONS


def test_counterfact_is_read_whole_and_agrees_with_what_a_batch_would_do() -> None:
    path = SHARED / "data" / "edits" / "counterfact_dev_10000.json"
    if not path.is_file():
        pytest.skip(f"{path} is not here; ERRATA_TEST_SHARED names the folder that holds it")
    found = check_edits(read_edits(path))
    assert (found.records, found.refused) == (10_000, 0)
    assert found.repeated_subjects > 300
    assert found.conflicts > 0
    assert balance(found)
    arrivals = (Arrival(record, "f" * 64, line) for line, record in enumerate(read_edits(path), start=1))
    proposal = propose_batch(arrivals, EmptyLookup(), 10_001, "settings")
    assert len(proposal.additions) == found.writable


def balance(found: CheckReport) -> bool:
    return found.records == found.refused + found.duplicates + found.stale + found.withheld + found.superseded + found.writable
