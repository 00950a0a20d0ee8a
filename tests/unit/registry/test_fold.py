"""The fold: what a commit changes, and that the SQLite index, a checkpoint and the plain fold agree on any history."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.errors import FormatError
from registry.commit import commit
from registry.fold import EditRow, derive_changes, join_lines, merge_use
from registry.rows import FileUse
from registry.storage.memory import MemoryStorage
from registry.stream import Stream

Make = Callable[..., Any]


def statuses(stream: Stream) -> dict[str, str]:
    names = ("live", "replaced", "superseded", "stale", "quarantined", "rejected", "dropped", "withdrawn", "reverted")
    return {row.occurrence: row.status for row in stream.index.find_rows(*names)}


def test_a_new_target_in_a_slot_replaces_the_old_one(start: Make, edit: Make) -> None:
    clerk = start()
    for target in ("Paris", "Rome", "Paris"):
        commit(clerk.stream, clerk.draft([(edit("Ada", target), "live")]), clerk.stream.head)
    paris, rome = edit("Ada", "Paris"), edit("Ada", "Rome")
    # A → B → A is three occurrences.
    assert statuses(clerk.stream) == {f"{paris.edit_id}@1": "replaced", f"{rome.edit_id}@2": "replaced", f"{paris.edit_id}@3": "live"}
    old = clerk.stream.index.find_occurrences(paris.edit_id)[0]
    assert old.by == f"{rome.edit_id}@2"
    assert old.pairs is not None, "what is subtracted must stay known"
    assert clerk.stream.index.find_slot(paris.slot).seq == 3
    assert clerk.stream.index.counts() == {"live": 1, "replaced": 2}


def test_a_quarantined_replacement_leaves_the_old_edit_live(start: Make, edit: Make) -> None:
    clerk = start()
    commit(clerk.stream, clerk.draft([(edit("Ada", "Paris", name="a"), "live")]), clerk.stream.head)
    commit(clerk.stream, clerk.draft([(edit("Ada", "Rome", name="a"), "quarantined"), (edit("Bob"), "live")]), clerk.stream.head)
    row = clerk.stream.index.find_edit("a")
    assert (row.occurrence, row.status) == ("a@1", "live")
    assert [row.status for row in clerk.stream.index.find_occurrences("a")] == ["live", "quarantined"]
    assert clerk.stream.index.find_occurrences("a")[1].reason == "efficacy 0"


def test_a_later_judgement_ends_the_quarantine(start: Make, edit: Make) -> None:
    clerk = start()
    for verdict in ("quarantined", "quarantined", "live"):
        commit(clerk.stream, clerk.draft([(edit(name="a"), verdict)]), clerk.stream.head)
    assert statuses(clerk.stream) == {"a@1": "superseded", "a@2": "superseded", "a@3": "live"}
    assert [row.by for row in clerk.stream.index.find_occurrences("a")] == ["a@2", "a@3", None]
    assert clerk.stream.index.counts() == {"live": 1, "superseded": 2}


def test_a_quarantined_edit_can_be_dropped(start: Make, edit: Make) -> None:
    clerk = start()
    commit(clerk.stream, clerk.draft([(edit(name="a"), "quarantined"), (edit("Bob", name="b"), "live")]), clerk.stream.head)
    commit(clerk.stream, clerk.draft_drop(clerk.stream.index.find_rows("quarantined")), clerk.stream.head)
    assert statuses(clerk.stream) == {"a@1": "dropped", "b@1": "live"}
    assert clerk.stream.head.accepted == 1


def test_of_two_contradicting_edits_in_one_batch_the_later_counts(start: Make, edit: Make) -> None:
    clerk = start()
    commit(
        clerk.stream, clerk.draft([(edit("Ada", "Paris", name="a"), "live"), (edit("Ada", "Rome", name="a"), "live")]), clerk.stream.head
    )
    assert [(row.position, row.status, row.by) for row in clerk.stream.index.find_occurrences("a")] == [
        (0, "superseded", "a@1"),
        (1, "live", None),
    ]
    commit(clerk.stream, clerk.draft([(edit("Ada", "Oslo", name="a"), "live")]), clerk.stream.head)
    assert [row.status for row in clerk.stream.index.find_occurrences("a")] == ["superseded", "replaced", "live"]


def test_only_a_promotion_moves_the_champion(start: Make, edit: Make) -> None:
    clerk = start()
    for subject, verdict, promoted in [("A", "live", True), ("B", "live", False), ("C", "rejected", False)]:
        commit(clerk.stream, clerk.draft([(edit(subject), verdict)], promoted=promoted), clerk.stream.head)
    head = clerk.stream.head
    assert (head.seq, head.accepted, head.champion, head.challenger) == (3, 2, 1, 2)
    assert head.manifest == clerk.stream.log.read(2).manifest
    commit(clerk.stream, clerk.draft([(edit("D"), "live")]), head)
    assert (clerk.stream.head.champion, clerk.stream.head.challenger) == (4, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batch, outcomes: (batch, outcomes[1:]), "expected an outcome for a@1, found none"),
        (lambda batch, outcomes: (batch[1:], outcomes), "outcome live of a@1: expected the file and line"),
        (lambda batch, outcomes: (batch, [*outcomes, outcomes[0]]), "outcome live of a@1: expected the file and line"),
        (lambda batch, outcomes: ([batch[0], batch[0]], outcomes), "each position and each line of a file once"),
        (lambda batch, outcomes: (batch, [outcomes[0].model_copy(update={"occurrence": "b@1"}), outcomes[1]]), "of b@1: expected the file"),
        (
            lambda batch, outcomes: (batch, [*outcomes, outcomes[0].model_copy(update={"occurrence": "z"})]),
            "expected <id>@<seq>, found 'z'",
        ),
        (
            lambda batch, outcomes: (batch, [*outcomes, outcomes[0].model_copy(update={"occurrence": "z@0", "outcome": "duplicate"})]),
            "a status",
        ),
    ],
)
def test_batch_and_outcomes_must_fit(start: Make, edit: Make, spoil: Callable[..., Any], message: str) -> None:

    stream = start().stream
    draft = type(start())(stream).draft([(edit("Ada", name="a"), "live"), (edit("Bob", name="b"), "live")])
    batch, outcomes = spoil(stream.read_batch(draft), stream.read_outcomes(draft))
    with pytest.raises(FormatError, match=message):
        derive_changes(draft, batch, outcomes)


def test_runs_of_lines_are_joined() -> None:
    assert join_lines([(4, 5), (1, 2), (3, 3), (9, 9), (5, 6)]) == ((1, 6), (9, 9))
    first = FileUse(digest="a" * 64, name="x", lines=((1, 2), (3, 4)), done=False)
    assert merge_use(None, first).lines == ((1, 4),)
    assert merge_use(first, first.model_copy(update={"lines": ((5, 9),), "done": True})) == first.model_copy(
        update={"lines": ((1, 9),), "done": True}
    )


records = st.tuples(
    st.sampled_from(["Ada", "ada", "Bob", "Cleo"]),
    st.sampled_from(["Paris", "Rome"]),
    st.sampled_from([None, "a", "b"]),
    st.sampled_from(["live"] * 5 + ["quarantined", "rejected", "stale", "withheld", "refused"]),
)
steps = st.sampled_from(["", "", "drop", "checkpoint", "reopen", "withdraw", "withdraw", "rollback", "rollback"])
histories = st.lists(st.tuples(st.lists(records, min_size=1, max_size=6), steps, st.integers(0, 20)), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories, segment_rows=st.sampled_from([3, 1_000]))
def test_index_checkpoint_and_plain_fold_agree(start: Make, edit: Make, tables: Any, history: list[Any], segment_rows: int) -> None:
    storage = MemoryStorage()
    clerk, plain = start(storage), type(tables)()
    clerk.stream.checkpoints._segment_rows = segment_rows

    live_at: dict[int, set[str]] = {0: set()}

    def land(draft: Any) -> None:
        commit(clerk.stream, draft, clerk.stream.head)
        plain.apply(clerk.changes(draft))
        live_at[draft.seq] = {row.occurrence for row in plain.live()}

    for batch, then, number in history:
        land(clerk.draft((edit(subject, target, name=name), verdict) for subject, target, name, verdict in batch))
        if then == "drop":
            land(clerk.draft_drop(list(clerk.stream.index.find_rows("quarantined", "rejected"))))
        live = list(clerk.stream.index.find_rows("live"))
        if then == "withdraw" and live:
            land(clerk.draft_withdrawal(live[: 1 + number % len(live)]))
        target = clerk.stream.log.read(number % (clerk.stream.head.seq + 1))
        if then == "rollback" and target.kind != "rejection" and target.manifest != clerk.stream.head.manifest:
            land(clerk.draft_rollback(target.seq))
            assert live_at[clerk.stream.head.seq] == live_at[target.seq]
            assert clerk.stream.head.manifest == target.manifest
        if then == "checkpoint":
            clerk.stream.checkpoints.write(clerk.stream.index)
        if then == "reopen":
            clerk = type(clerk)(Stream(storage, "main", None))
            clerk.stream.checkpoints._segment_rows = segment_rows
        assert_equal(clerk.stream, plain)
    assert_equal(Stream(storage, "main", None), plain)


def assert_equal(stream: Stream, plain: Any) -> None:
    index = stream.index
    in_order = sorted(plain.rows.values(), key=lambda row: (row.seq, row.position))
    assert list(index.find_rows(*{row.status for row in in_order})) == in_order
    assert index.counts() == plain.counts()
    live = {row.key: row for row in plain.live()}
    assert len({row.slot for row in live.values()}) == len(live), "two live edits in one slot"
    assert len({row.id for row in live.values()}) == len(live), "one id live twice"
    assert {index.find_slot(row.slot) for row in in_order} - {None} == set(live.values())
    assert {row.key: row for row in index.sample_live(100, seed=1)} == live
    for identity in {row.id for row in in_order}:
        mine = [row for row in in_order if row.id == identity]
        assert index.find_occurrences(identity) == mine
        assert index.find_edit(identity) == _standing(mine)
    for digest, use in plain.files.items():
        assert index.find_file(digest) == use


def _standing(rows: list[EditRow]) -> EditRow:
    judged = ("quarantined", "rejected", "replaced", "dropped", "withdrawn", "reverted")
    for wanted in (("live",), judged, ("stale", "superseded")):
        if found := [row for row in rows if row.status in wanted]:
            return found[-1]
    raise AssertionError(rows)
