"""Which arrivals become a batch: the rules of design §3, and that the result does not depend on where a stream is cut."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata import batching
from errata.batching import Arrival, Proposal, Settled, propose_batch
from errata.edits import Edit, Refusal, Submission
from registry.index import Index

UNDER = "settings"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Row:
    id: str
    occurrence: str
    status: str
    slot: str
    content: str
    under: str | None = UNDER
    submitted_at: str | None = None
    withdrawn_at: str | None = None


@dataclass
class Log:
    """The least that keeps the promises of the real index."""

    rows: list[Row] = field(default_factory=list)
    seq: int = 0

    def find_edit(self, identity: str, /) -> Row | None:
        rows = [row for row in self.rows if row.id == identity]
        return next((row for row in rows if row.status == "live"), rows[-1] if rows else None)

    def find_occurrences(self, identity: str, /) -> Sequence[Row]:
        return [row for row in self.rows if row.id == identity]

    def find_slot(self, slot: str, /) -> Row | None:
        return next((row for row in self.rows if row.slot == slot and row.status == "live"), None)

    def commit(self, proposal: Proposal, accepted: Sequence[bool] | None = None) -> None:
        self.seq += 1
        for number, addition in enumerate(proposal.additions):
            kept = accepted[number % len(accepted)] if accepted else True
            if kept:
                self.rows = [replace(row, status="replaced") if row.occurrence in addition.replaces else row for row in self.rows]
            self.add(addition.submission.edit, "live" if kept else "quarantined")

    def add(self, edit: Edit, status: str, **changes: Any) -> Row:
        self.seq += 1
        if status in ("live", "quarantined", "rejected"):  # judged: settles what was held of its id
            held = [row for row in self.rows if row.id == edit.edit_id and row.status in ("quarantined", "rejected")]
            self.rows = [replace(row, status="superseded") if row in held else row for row in self.rows]
        time = edit.submitted_at.isoformat() if edit.submitted_at else None
        row = Row(edit.edit_id, f"{edit.edit_id}@{self.seq}", status, edit.slot, edit.content_id, submitted_at=time)
        self.rows.append(replace(row, **changes))
        return self.rows[-1]

    @property
    def live(self) -> dict[str, str]:
        return {row.slot: row.content for row in self.rows if row.status == "live"}


def edit(subject: str = "Ada", target: str = "Paris", **fields: Any) -> Edit:
    return Edit(**{"subject": subject, "prompt": "{} lives in", "target_new": target, **fields})


def arrive(*records: Submission | Edit | Refusal) -> list[Arrival]:
    submitted = (Submission(edit=record) if isinstance(record, Edit) else record for record in records)
    return [Arrival(record, "f" * 64, line) for line, record in enumerate(submitted, start=1)]


def propose(log: Log, *records: Submission | Edit | Refusal, size: int = 100) -> Proposal:
    return propose_batch(arrive(*records), log, size, UNDER)


def outcomes(proposal: Proposal) -> list[tuple[int, str]]:
    return [(settled.position, settled.outcome) for settled in proposal.settled]


# Properties

_TIMES = st.none() | st.integers(0, 3).map(lambda hours: NOON + timedelta(hours=hours))
_EDITS = st.builds(
    edit,
    subject=st.sampled_from(["Ada", "Bo"]),
    target=st.sampled_from(["Paris", "Rome"]),
    prompt=st.sampled_from(["{} lives in", "The home of {} is"]),
    relation_id=st.sampled_from([None, "P551"]),
    id=st.sampled_from([None, None, "a", "b"]),
    submitted_at=_TIMES,
)
_SUBMISSIONS = st.builds(Submission, edit=_EDITS, again=st.booleans(), force=st.booleans())
_STREAMS = st.lists(_SUBMISSIONS, max_size=12)
_HISTORIES = st.lists(
    st.tuples(_EDITS, st.sampled_from(["withdrawn", "reverted", "quarantined", "rejected", "dropped", "replaced"])), max_size=4
)


def start(history: list[tuple[Edit, str]], before: list[Submission]) -> Log:
    log = Log()
    for old, status in history:
        log.add(old, status)
    log.commit(propose(log, *before))
    return log


@given(_HISTORIES, _STREAMS, _STREAMS, st.sets(st.integers(0, 12)), st.integers(1, 5))
@settings(max_examples=400, deadline=None)
def test_any_cut_of_a_stream_ends_with_the_same_live_facts(
    history: list[tuple[Edit, str]], before: list[Submission], stream: list[Submission], cuts: set[int], size: int
) -> None:
    logs = [start(history, before) for _ in range(4)]
    whole, cut, sized, single = logs
    whole.commit(propose(whole, *stream))
    borders = [0, *sorted(c for c in cuts if c < len(stream)), len(stream)]
    for first, last in zip(borders, borders[1:], strict=False):
        cut.commit(propose(cut, *stream[first:last]))
    waiting = list(stream)
    while waiting:
        proposal = propose(sized, *waiting, size=size)
        sized.commit(proposal)
        del waiting[: len(proposal.considered)]
    for submission in stream:
        single.commit(propose(single, submission))
    assert whole.live == cut.live == sized.live == single.live


@given(_HISTORIES, _STREAMS, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_live_edits_submitted_again_change_nothing(history: list[tuple[Edit, str]], stream: list[Submission], random: Any) -> None:
    log = start(history, [])
    proposal = propose(log, *stream)
    log.commit(proposal)
    again = [addition.submission for addition in proposal.additions]
    random.shuffle(again)
    assert outcomes(propose(log, *again)) == [(position, "duplicate") for position in range(len(again))]


@given(_HISTORIES, _STREAMS, _STREAMS, st.lists(st.booleans(), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_whatever_the_gate_drops_no_slot_and_no_id_is_live_twice(
    history: list[tuple[Edit, str]], before: list[Submission], stream: list[Submission], accepted: list[bool]
) -> None:
    log = start(history, before)
    log.commit(propose(log, *stream), accepted)
    live = [row for row in log.rows if row.status == "live"]
    assert len({row.slot for row in live}) == len({row.id for row in live}) == len(live)


@given(_HISTORIES, _STREAMS, _STREAMS, st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_every_considered_arrival_has_one_fate(
    history: list[tuple[Edit, str]], before: list[Submission], stream: list[Submission], size: int
) -> None:
    log = start(history, before)
    proposal = propose(log, *stream, size=size)
    fates = [entry.position for entry in (*proposal.additions, *proposal.settled)]
    assert sorted(fates) == list(range(len(proposal.considered)))
    assert [arrival.line for arrival in proposal.considered] == list(range(1, len(proposal.considered) + 1))
    assert len(proposal.additions) <= size
    ids = [addition.submission.edit.edit_id for addition in proposal.additions]
    assert len(ids) == len(set(ids))
    standing = {addition.position for addition in proposal.additions}
    assert all(settled.by_position in standing for settled in proposal.settled if settled.outcome == "superseded")


# Rules, one by one


def test_going_back_is_a_third_occurrence() -> None:
    log = Log()
    for target in ("Paris", "Rome", "Paris"):
        log.commit(propose(log, edit(target=target)))
    assert [row.status for row in log.rows] == ["replaced", "replaced", "live"]
    assert log.rows[0].id == log.rows[2].id != log.rows[1].id
    assert len({row.occurrence for row in log.rows}) == 3


def test_the_same_edit_is_no_news() -> None:
    log = Log()
    row = log.add(edit(), "live")
    (settled,) = propose(log, edit()).settled
    assert (settled.outcome, settled.by) == ("duplicate", row.occurrence)


def test_the_same_fact_under_another_name_is_no_news() -> None:
    log = Log()
    row = log.add(edit(), "live")
    (settled,) = propose(log, edit(id="other")).settled
    assert (settled.outcome, settled.by) == ("duplicate", row.occurrence)


def test_another_target_replaces_the_live_edit_of_the_slot() -> None:
    log = Log()
    row = log.add(edit(), "live")
    proposal = propose(log, edit(subject="ADA", target="Rome"))
    assert proposal.replacements == {edit(subject="ADA", target="Rome").edit_id: (row.occurrence,)}


def test_other_content_under_an_id_replaces_its_old_self_and_the_edit_in_its_new_slot() -> None:
    log = Log()
    old = log.add(edit(id="a"), "live")
    there = log.add(edit(subject="Bo"), "live")
    proposal = propose(log, edit(id="a", subject="Bo", target="Rome"))
    assert proposal.replacements == {"a": (old.occurrence, there.occurrence)}


def test_the_later_of_two_contradicting_edits_wins() -> None:
    proposal = propose(Log(), edit(target="Paris"), edit(target="Rome"), edit(target="Oslo"))
    assert [addition.position for addition in proposal.additions] == [2]
    assert [(s.position, s.outcome, s.by_position) for s in proposal.settled] == [(0, "superseded", 2), (1, "superseded", 2)]


def test_the_later_content_of_one_id_wins() -> None:
    proposal = propose(Log(), edit(id="a"), edit(id="a", subject="Bo"))
    assert [addition.position for addition in proposal.additions] == [1]
    assert outcomes(proposal) == [(0, "superseded")]


def test_of_two_equal_edits_the_later_is_the_duplicate() -> None:
    proposal = propose(Log(), edit(), edit())
    assert [addition.position for addition in proposal.additions] == [0]
    assert [(s.position, s.outcome, s.by_position) for s in proposal.settled] == [(1, "duplicate", 0)]


def test_what_a_superseded_edit_would_have_replaced_is_replaced_by_its_successor() -> None:
    log = Log()
    first, second = log.add(edit(id="a"), "live"), log.add(edit(subject="Bo"), "live")
    proposal = propose(log, edit(id="a", subject="Bo", target="Rome"), edit(id="a", subject="Cy"))
    assert set(proposal.replacements["a"]) == {first.occurrence, second.occurrence}


@pytest.mark.parametrize("force", [False, True])
def test_an_older_edit_replaces_a_newer_one_only_by_force(force: bool) -> None:
    log = Log()
    row = log.add(edit(submitted_at=NOON), "live")
    late = Submission(edit=edit(target="Rome", submitted_at=NOON - timedelta(seconds=1)), force=force)
    proposal = propose(log, late)
    assert [(s.outcome, s.by) for s in proposal.settled] == ([] if force else [("stale", row.occurrence)])


@pytest.mark.parametrize("times", [(NOON, NOON), (NOON, None), (None, NOON)])
def test_edits_that_are_not_older_are_not_stale(times: tuple[datetime | None, datetime | None]) -> None:
    log = Log()
    log.add(edit(submitted_at=times[0]), "live")
    assert propose(log, edit(target="Rome", submitted_at=times[1])).additions


def test_an_older_edit_is_stale_within_a_batch_too() -> None:
    proposal = propose(Log(), edit(submitted_at=NOON), edit(target="Rome", submitted_at=NOON - timedelta(hours=1)))
    assert [(s.position, s.outcome, s.by_position) for s in proposal.settled] == [(1, "stale", 0)]


@pytest.mark.parametrize(
    ("status", "under", "again", "written"),
    [
        ("replaced", UNDER, False, True),
        ("superseded", None, False, True),
        ("quarantined", UNDER, False, False),
        ("quarantined", "others", False, True),
        ("quarantined", UNDER, True, True),
        ("rejected", UNDER, False, False),
        ("rejected", "others", False, True),
        ("rejected", UNDER, True, True),
        ("dropped", "others", False, False),
        ("dropped", UNDER, True, True),
        ("withdrawn", "others", False, False),
        ("withdrawn", UNDER, True, True),
        ("reverted", UNDER, False, True),
    ],
)
def test_what_came_before_decides_whether_an_edit_is_tried(status: str, under: str | None, again: bool, written: bool) -> None:
    log = Log()
    row = log.add(edit(), status, under=under)
    proposal = propose(log, Submission(edit=edit(), again=again))
    assert bool(proposal.additions) is written
    if not written:
        (settled,) = proposal.settled
        assert (settled.outcome, settled.by) == ("withheld", row.occurrence)
        assert status in settled.reason and "--again" in settled.reason


@pytest.mark.parametrize(("hours", "written"), [(-1, False), (0, False), (1, True)])
def test_a_withdrawn_edit_comes_back_if_submitted_after_the_withdrawal(hours: int, written: bool) -> None:
    log = Log()
    log.add(edit(submitted_at=NOON - timedelta(hours=2)), "withdrawn", withdrawn_at=NOON.isoformat())
    assert bool(propose(log, edit(submitted_at=NOON + timedelta(hours=hours))).additions) is written


def test_what_a_rollback_left_behind_does_not_lift_a_withdrawal() -> None:
    log = Log()
    row = log.add(edit(id="a"), "withdrawn", withdrawn_at=NOON.isoformat())
    log.add(edit(id="a"), "reverted")  # insisted upon after the withdrawal, and rolled back
    assert [(s.outcome, s.by) for s in propose(log, edit(id="a")).settled] == [("withheld", row.occurrence)]
    assert propose(log, Submission(edit=edit(id="a"), again=True)).additions


def test_a_withdrawn_replacement_does_not_bring_back_what_it_replaced() -> None:
    log = Log()
    log.add(edit(id="a"), "replaced")
    log.add(edit(id="a", target="Rome"), "withdrawn")
    assert outcomes(propose(log, edit(id="a"), edit(id="a", target="Rome"))) == [(0, "withheld"), (1, "withheld")]
    assert propose(log, edit(id="b")).additions, "the slot is free"


def test_a_corrected_edit_is_tried_though_its_id_is_in_quarantine() -> None:
    log = Log()
    log.add(edit(id="a"), "quarantined")
    assert propose(log, edit(id="a", target="Rome")).additions


def test_a_quarantined_replacement_is_withheld_and_the_old_edit_stays_replaceable() -> None:
    log = Log()
    old = log.add(edit(id="a"), "live")
    log.add(edit(id="a", target="Rome"), "quarantined")
    assert outcomes(propose(log, edit(id="a", target="Rome"))) == [(0, "withheld")]
    assert propose(log, edit(id="a", subject="Bo")).replacements == {"a": (old.occurrence,)}


def test_a_withheld_edit_displaces_nothing() -> None:
    log = Log()
    log.add(edit(target="Rome"), "withdrawn")
    proposal = propose(log, edit(target="Paris"), edit(target="Rome"))
    assert [addition.position for addition in proposal.additions] == [0]
    assert outcomes(proposal) == [(1, "withheld")]


def test_refused_rows_are_consumed_in_their_place() -> None:
    refusal = Refusal(origin="f:2", field="subject", reason="expected text, found 5")
    proposal = propose(Log(), edit(), refusal, edit(subject="Bo"))
    assert proposal.settled == (Settled(1, proposal.considered[1], "refused", refusal.reason),)
    assert [addition.position for addition in proposal.additions] == [0, 2]


def test_a_batch_reads_no_further_than_it_needs() -> None:
    arrivals = iter(arrive(*(edit(subject=f"S{number}") for number in range(10))))
    proposal = propose_batch(arrivals, Log(), 4, UNDER)
    assert len(proposal.additions) == len(proposal.considered) == 4
    assert next(arrivals).line == 5


def test_a_file_of_duplicates_makes_bounded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_CONSIDERED", 5)
    log = Log()
    log.add(edit(), "live")
    assert len(propose(log, *[edit()] * 8).considered) == 5


def test_the_registrys_index_answers_the_lookup() -> None:
    proposal = propose_batch(arrive(edit(), edit()), Index(None), 10, UNDER)
    assert [addition.position for addition in proposal.additions] == [0]
