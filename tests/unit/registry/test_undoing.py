"""Withdrawals and rollbacks as the log sees them: what they change, what they must not, and what is left to submit again."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from errata.errors import FormatError, InputError, StorageError
from registry.checkpoints import _parse
from registry.commit import commit
from registry.events import RollbackCommit, WithdrawalCommit, read_commit, write_commit
from registry.fold import EditRow, derive_changes
from registry.rows import Outcome
from registry.stream import Stream
from registry.undoing import choose_live, choose_target, compare_live, find_gone

Make = Callable[..., Any]

NOON = datetime(2026, 11, 1, tzinfo=UTC)
"""Time of all commits here."""


def land(clerk: Any, draft: Any) -> Any:
    return commit(clerk.stream, draft, clerk.stream.head)


def find(clerk: Any, occurrence: str) -> EditRow:
    row: EditRow = clerk.stream.resolve_edit(occurrence)
    return row


def live(stream: Stream) -> list[str]:
    return [row.occurrence for row in stream.index.find_rows("live")]


@pytest.fixture
def clerk(start: Make, edit: Make) -> Any:
    """1: a, b live. 2: a@1 replaced by c@2. 3: b withdrawn. 4: d live."""
    clerk = start()
    land(clerk, clerk.draft([(edit("Ada", "Paris", name="a"), "live"), (edit("Bob", name="b"), "live")]))
    land(clerk, clerk.draft([(edit("Ada", "Rome", name="c"), "live")]))
    land(clerk, clerk.draft_withdrawal([find(clerk, "b")]))
    land(clerk, clerk.draft([(edit("Dan", name="d"), "live")]))
    assert live(clerk.stream) == ["c@2", "d@4"]
    return clerk


def test_a_withdrawal_moves_head_and_counters(clerk: Any) -> None:
    stream = clerk.stream
    assert stream.index.counts() == {"live": 2, "replaced": 1, "withdrawn": 1}
    row = find(clerk, "b")
    assert (row.status, row.reason, row.withdrawn_at) == ("withdrawn", "wrong", NOON.isoformat())
    assert row.pairs is not None, "a rollback needs them"
    land(clerk, clerk.draft_withdrawal([find(clerk, "d")], promoted=False))
    head = stream.head
    assert (head.accepted, head.champion, head.challenger) == (5, 4, 5)
    assert head.manifest == stream.log.read(5).manifest


def test_a_rollback_names_what_leaves_and_comes_back(clerk: Any) -> None:
    outcomes = compare_live(clerk.stream, 1)
    assert [(outcome.occurrence, outcome.outcome) for outcome in outcomes] == [
        ("a@1", "live"),
        ("b@1", "live"),
        ("c@2", "reverted"),
        ("d@4", "reverted"),
    ]
    land(clerk, clerk.draft_rollback(1))
    stream = clerk.stream
    assert live(stream) == ["a@1", "b@1"]
    assert [(row.by, row.reason, row.withdrawn_at) for row in stream.index.find_rows("live")] == [(None, None, None)] * 2
    assert stream.index.counts() == {"live": 2, "reverted": 2}
    head = stream.head
    assert (head.seq, head.accepted, head.champion, head.challenger) == (5, 5, 5, None)
    assert head.manifest == stream.log.read(1).manifest
    assert stream.index.find_slot(find(clerk, "a").slot).occurrence == "a@1"


def test_a_second_rollback_restores_how_things_stood(clerk: Any) -> None:
    before = {name: find(clerk, name) for name in ("a@1", "b@1", "c@2", "d@4")}
    land(clerk, clerk.draft_rollback(1))
    land(clerk, clerk.draft_rollback(4))
    assert {name: find(clerk, name) for name in before} == before, "replaced by c again, withdrawn at the same time as before"
    land(clerk, clerk.draft_rollback(5))  # to the first rollback, across the second
    assert live(clerk.stream) == ["a@1", "b@1"]
    land(clerk, clerk.draft_rollback(0))
    assert live(clerk.stream) == []


def test_a_withdrawal_of_something_newer_than_the_target_stays(clerk: Any) -> None:
    land(clerk, clerk.draft_withdrawal([find(clerk, "d")]))
    land(clerk, clerk.draft_rollback(1))
    assert find(clerk, "d").status == "withdrawn"
    assert find(clerk, "c").status == "reverted"


def test_a_new_edit_after_a_rollback_is_a_new_occurrence(clerk: Any, edit: Make) -> None:
    land(clerk, clerk.draft_rollback(1))
    land(clerk, clerk.draft([(edit("Ada", "Rome", name="c"), "live")]))
    assert live(clerk.stream) == ["b@1", "c@6"]
    assert [(row.occurrence, row.status) for row in clerk.stream.index.find_occurrences("c")] == [("c@2", "reverted"), ("c@6", "live")]
    assert (find(clerk, "a").status, find(clerk, "a").by) == ("replaced", "c@6")


def test_what_is_served_already_is_no_target(clerk: Any, edit: Make) -> None:
    stream = clerk.stream
    with pytest.raises(InputError, match="expected an earlier state .* found commit 4: it is the newest"):
        choose_target(stream, 4)
    land(clerk, clerk.draft([(edit("Eve"), "rejected")]))
    with pytest.raises(InputError, match="it is the newest"):
        choose_target(stream, 5)
    with pytest.raises(InputError, match="commit 4 has the same manifest as commit 4"):
        choose_target(stream, 4)
    land(clerk, clerk.draft_rollback(1))
    with pytest.raises(InputError, match="commit 1 has the same manifest as commit 6"):
        choose_target(stream, 1)
    assert choose_target(stream, 5).seq == 4, "a rejection stands for the state it found"
    assert choose_target(stream, 0).seq == 0


def test_what_cannot_be_withdrawn_is_named(clerk: Any, edit: Make) -> None:
    land(clerk, clerk.draft([(edit("Eve", name="e"), "quarantined"), (edit("Fay", name="f1"), "live"), (edit("Gus", name="f2"), "live")]))
    with pytest.raises(InputError) as caught:
        choose_live(clerk.stream, ["d", "nope", "b", "a@1", "e", "f"])
    message = str(caught.value)
    for part in (
        "starts with 'nope', found none",
        "b@1: it is withdrawn already (wrong)",
        "a@1: it was replaced by c@2",
        "e@5: it was never written, it is quarantined",
        "starts with 'f', found f1, f2",
        "Nothing was withdrawn",
    ):
        assert part in message
    assert "d@4" not in message
    with pytest.raises(InputError, match="expected live edits, found none"):
        choose_live(clerk.stream, [])
    assert [row.occurrence for row in choose_live(clerk.stream, ["d", "d@4", "c"])] == ["d@4", "c@2"]


@pytest.mark.parametrize("then", ["again", "dropped", "nothing"])
def test_a_rollback_brings_back_what_a_rebase_left_behind(clerk: Any, edit: Make, then: str) -> None:
    """Whatever has become of it since: tried again and accepted, given up, or still waiting."""
    stream, before, place = clerk.stream, find(clerk, "c@2").pairs, clerk.stream.head
    land(clerk, clerk.draft_rebase(["d@4"]))
    assert (live(stream), find(clerk, "d@4").status, stream.head.base) == (["c@2"], "quarantined", "e" * 64)
    moved = find(clerk, "c@2").pairs
    assert moved != before
    if then == "again":
        land(clerk, clerk.draft([(edit("Dan", name="d"), "live")]))
    elif then == "dropped":
        land(clerk, clerk.draft_drop([find(clerk, "d@4")]))
    there, stood, served = live(stream), find(clerk, "d@4"), stream.head.accepted
    site = {"base": place.base, "profile": place.profile}
    land(clerk, clerk.draft_rollback(4, **site))
    assert (live(stream), find(clerk, "c@2").pairs) == (["c@2", "d@4"], before)
    assert (stream.head.base, stream.head.profile) == (place.base, place.profile)
    land(clerk, clerk.draft_rollback(served, base="e" * 64, profile="f" * 64))
    assert (live(stream), find(clerk, "c@2").pairs, stream.head.base) == (there, moved, "e" * 64)
    if then == "again":
        assert (find(clerk, "d@4").status, find(clerk, "d@4").by) == (stood.status, stood.by) == ("superseded", "d@6")
    reopened = Stream(stream.storage, "main", None)
    assert reopened.index.counts() == stream.index.counts()


def test_a_rebase_speaks_of_every_live_edit(clerk: Any) -> None:
    partial = clerk.draft_rebase([])
    rows = clerk.stream.objects.get_rows(partial.outcomes)
    with pytest.raises(StorageError, match="expected an outcome for every live edit, found none for d@4"):
        land(clerk, clerk.draft_rebase([], outcomes=clerk.stream.objects.put_rows(list(rows)[:1])))
    other = clerk.stream.objects.put_json({"format": 1, "base": "0" * 64})
    with pytest.raises(StorageError, match="expected a manifest on base e+ and profile f+, found another"):
        land(clerk, clerk.draft_rebase([], manifest=other))
    for draft in (clerk.draft_withdrawal([]), clerk.draft([])):
        with pytest.raises(FormatError, match="expected no older edit to become quarantined by kind"):
            derive_changes(draft, [], [Outcome(outcome="quarantined", occurrence="d@4")])


def test_only_live_edits_leave_and_only_others_come_back(clerk: Any) -> None:
    with pytest.raises(StorageError, match="b@1 becomes withdrawn: expected it live, found it withdrawn"):
        land(clerk, clerk.draft_withdrawal([find(clerk, "b")]))
    with pytest.raises(StorageError, match="expected each older occurrence once"):
        land(clerk, clerk.draft_withdrawal([find(clerk, "d")] * 2))
    head, objects = clerk.stream.head, clerk.stream.objects

    def roll_back(*rows: dict[str, str]) -> Any:
        return clerk.draft_rollback(1, outcomes=objects.put_rows(rows))

    with pytest.raises(StorageError, match="d@4 stays live: expected another pair than it has"):
        land(clerk, roll_back({"occurrence": "d@4", "outcome": "live"}))
    with pytest.raises(StorageError, match="expected a@1 to replace c@2, found both live"):
        land(clerk, roll_back({"occurrence": "a@1", "outcome": "live"}))
    assert clerk.stream.refresh() == head


def test_a_rollback_serves_what_its_target_served(clerk: Any, edit: Make) -> None:
    other = clerk.stream.objects.put_json({"format": 1, "other": True})
    with pytest.raises(StorageError, match="expected the manifest of an accepted commit 1"):
        land(clerk, clerk.draft_rollback(1, manifest=other))
    land(clerk, clerk.draft([(edit("Eve"), "rejected")]))
    with pytest.raises(StorageError, match="expected the manifest of an accepted commit 5"):
        land(clerk, clerk.draft_rollback(5))
    with pytest.raises(ValueError, match="expected a commit before 6, found 6"):
        RollbackCommit.model_validate(clerk.draft_rollback(1).model_dump() | {"target": 6})


def test_kinds_do_what_they_say_only(clerk: Any, edit: Make) -> None:
    withdrawn = Outcome(outcome="withdrawn", occurrence="d@4")
    batch = clerk.draft([(edit("Eve", name="e"), "live")])
    rows, outcomes = clerk.stream.read_batch(batch), clerk.stream.read_outcomes(batch)
    for kind in ("withdrawn", "reverted", "erased"):
        with pytest.raises(FormatError, match=f"expected no older edit to become {kind} by kind edits, found d@4"):
            derive_changes(batch, rows, [*outcomes, withdrawn.model_copy(update={"outcome": kind})])
    back = Outcome(outcome="live", occurrence="b@1")
    with pytest.raises(FormatError, match="expected the new pair of b@1, which stays live, found none"):
        derive_changes(clerk.draft_withdrawal([]), [], [back])
    stored = clerk.stream.objects.put(b"pairs")
    placed = Outcome(outcome="live", occurrence="b@1", pairs=stored, row=0).model_dump(mode="json", exclude_none=True)
    revived = clerk.draft_withdrawal([], outcomes=clerk.stream.objects.put_rows([placed]), pairs=(stored,))
    with pytest.raises(StorageError, match="b@1 becomes live: expected it live, found it withdrawn"):
        land(clerk, revived)
    with pytest.raises(FormatError, match="expected no batch or files of kind withdrawal"):
        derive_changes(
            clerk.draft_withdrawal([]), rows, [row.model_copy(update={"outcome": "quarantined", "pairs": None}) for row in outcomes]
        )
    with pytest.raises(FormatError, match="expected no pairs of kind rollback"):
        derive_changes(clerk.draft_rollback(1, pairs=(stored,)), [], [])


def test_commits_read_back_as_they_were_written(clerk: Any) -> None:
    for draft, kind in ((clerk.draft_withdrawal([find(clerk, "d")]), WithdrawalCommit), (clerk.draft_rollback(1), RollbackCommit)):
        found = read_commit(write_commit(draft), "here")
        assert isinstance(found, kind) and found == draft


def test_a_table_row_from_before_withdrawals_can_be_read() -> None:
    row = EditRow("a", 1, 0, "live", "s", "c", "k", "b" * 64, None, None, None, None, None, None, "f:1")
    stored = row._asdict()
    del stored["withdrawn_at"]
    assert _parse({"edit": stored}) == row


def test_what_a_rollback_took_out_is_found_until_it_is_back(clerk: Any, edit: Make) -> None:
    with pytest.raises(InputError, match="expected a rollback in stream 'main', found none"):
        find_gone(clerk.stream)
    with pytest.raises(InputError, match="expected a rollback, found commit 3 of kind withdrawal"):
        find_gone(clerk.stream, 3)
    land(clerk, clerk.draft_rollback(1))
    seq, gone = find_gone(clerk.stream)
    assert (seq, [row.occurrence for row in gone.rows], gone.overtaken) == (5, ["c@2", "d@4"], [])
    # What is older than the rollback does not stand in the way of c: it came back because c left.
    land(clerk, clerk.draft([(edit("Ada", "Oslo", name="x"), "live"), (edit("Dan", name="d"), "live")]))
    seq, gone = find_gone(clerk.stream)
    assert (seq, gone.rows) == (5, [])
    assert [(row.occurrence, newer.occurrence) for row, newer in gone.overtaken] == [("c@2", "x@6")]
    land(clerk, clerk.draft_rollback(5))
    assert find_gone(clerk.stream)[0] == 7
    assert find_gone(clerk.stream, 5)[1].overtaken == []


def test_an_occurrence_is_the_record_that_was_judged(start: Make, edit: Make) -> None:
    """A stale record of the same id in the same batch shares its name and comes after it."""
    clerk = start()
    land(clerk, clerk.draft([(edit("Ada", "Paris", name="a"), "live"), (edit("Ada", "Rome", name="a"), "stale")]))
    assert [(row.position, row.status) for row in clerk.stream.index.find_occurrences("a")] == [(0, "live"), (1, "stale")]
    assert find(clerk, "a@1").status == "live"
