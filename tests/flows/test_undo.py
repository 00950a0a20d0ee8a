"""Taking back as a user sees it: edits that are withdrawn, champions that become an earlier state again, and what comes afterwards."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import ConflictError, InputError, KeyMissingError, UnknownNameError
from errata.manifests import PairRef
from registry.events import RejectionCommit, RollbackCommit, WithdrawalCommit

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


def assert_exact(desk: Any) -> None:
    """The head's state and weights are, to the bit, those of its live edits alone."""
    from errata.candidates import load_state
    from errata.exactness import measure_exactness
    from tasks._session import load_model, open_named

    settings, stream = open_named("main")
    editor, manifest = load_model(settings, stream).editor, desk.read_manifest(stream.head.seq)
    assert manifest.digest == stream.head.manifest
    live = list(dict.fromkeys(PairRef(pairs=row.pairs, row=row.row) for row in stream.index.find_rows("live")))
    assert load_state(stream.objects, editor, manifest.layers[0].state).count == len(live)
    found = measure_exactness(stream.objects, editor, manifest, live)
    assert (found.relative, found.identical) == (0.0, True)


def champion(desk: Any) -> Any:
    """The version behind the alias, after looking whether it holds what the log says."""
    registry, stream = desk.open_registry(), desk.open()
    version = registry.champion("main")
    manifest = desk.read_manifest(version.commit)
    assert version.tags["errata.manifest"] == manifest.digest
    assert registry.read_artifacts(version) == [stream.objects.get(digest) for digest in manifest.artifacts]
    return version


def base_answers(edits: list[Edit]) -> list[str]:
    from errata.evaluation.generation import generate_answers
    from tasks._session import load_model, open_named

    model = load_model(*open_named("main"))
    return generate_answers(model.base, [edit.rewrite_prompt for edit in edits], max_new_tokens=1, batch_tokens=512)


def say(edit: Edit, **more: Any) -> dict[str, Any]:
    """An edit as a line of the inbox, with what its producer says beside it."""
    return {**edit.model_dump(mode="json", exclude_none=True), **more}


# Withdrawal


def test_a_withdrawn_edit_is_as_if_it_had_never_come(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    edits = [make_edit(person, answer=person) for person in range(4)]
    desk.submit("one", *edits[:3])
    desk.apply()
    desk.submit("two", edits[3])
    desk.apply()
    gone = edits[1]
    summary = desk.withdraw(gone.edit_id[:8], reason="wrong source")
    assert (summary.commit, summary.decision, summary.live) == (3, "accept", 3)
    assert summary.withdrawn == (f"{gone.edit_id}@1",)
    assert summary.metrics["retention"] == 1.0

    stream = desk.open()
    commit = stream.log.read(3)
    assert isinstance(commit, WithdrawalCommit) and commit.promoted and commit.actor == "ann" and commit.run
    assert (stream.head.champion, stream.head.accepted, commit.pairs) == (3, 3, ())
    row = stream.resolve_edit(gone.edit_id)
    assert (row.status, row.reason, row.withdrawn_at) == ("withdrawn", "commit 3: wrong source", commit.time.isoformat())
    assert set(desk.live()) == {edit.edit_id for edit in edits if edit is not gone}

    # Exactness: to the bit the weights of a stream that never had it.
    assert summary.measured.exactness.identical and summary.measured.exactness.relative == 0.0
    assert_exact(desk)
    # Consistency: reported per prompt, and true.
    (row,) = summary.measured.rows
    assert row.id == gone.edit_id
    assert row.answer.startswith(ask(gone))
    assert row.answer_base.startswith(base_answers([gone])[0])
    assert summary.metrics["withdrawn.consistency"] == float(row.consistent)
    assert summary.metrics["withdrawn.greedy_consistency"] == float(row.greedy)

    version = champion(desk)
    assert version == desk.versions()[3]
    assert (version.tags["errata.edits_live"], version.tags["errata.batch_withdrawn"]) == ("3", "1")
    assert [ask(edit) for edit in edits if edit is not gone] == ["Paris", "Oslo", "Bern"]


def test_several_edits_of_several_batches_leave_at_once(desk: Any, make_edit: Make) -> None:
    edits = [make_edit(person) for person in range(6)]
    for name, pair in (("one", edits[:2]), ("two", edits[2:4]), ("three", edits[4:])):
        desk.submit(name, *pair)
        desk.apply()
    summary = desk.withdraw(*(edits[index].edit_id for index in (5, 0, 2)))
    assert summary.withdrawn == tuple(f"{edits[index].edit_id}@{index // 2 + 1}" for index in (0, 2, 5)), "in order of arrival"
    assert list(desk.live()) == [edits[index].edit_id for index in (1, 3, 4)]
    assert len(summary.measured.rows) == 3
    assert_exact(desk)


def test_withdrawing_everything_gives_back_the_base(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    edits = [make_edit(person, answer=person) for person in range(3)]
    desk.submit("one", *edits)
    desk.apply()
    summary = desk.withdraw(*(edit.edit_id for edit in edits))
    manifest = desk.read_manifest(2)
    assert (summary.live, manifest.artifacts, manifest.layers[0].artifact) == (0, [], None)
    assert summary.measured.exactness.identical
    assert (summary.metrics["withdrawn.consistency"], summary.metrics["withdrawn.greedy_consistency"]) == (1.0, 1.0)
    assert champion(desk).commit == 2
    assert [ask(edit) for edit in edits] == base_answers(edits)
    # The next batch begins from nothing, and is what it would be alone.
    desk.submit("two", make_edit(5))
    assert [done.outcomes for done in desk.apply()] == [{"live": 1}]
    assert_exact(desk)


def test_sums_are_exact_to_rounding(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so many edits that only their sums are kept: there, what is subtracted leaves rounding behind, and never more."""
    from errata.editors.d4s import state

    monkeypatch.setattr(state, "_FEW", 96)  # two pairs for keys of width 192
    edits = [make_edit(person, relation) for person in range(4) for relation in range(2)]
    desk.submit("one", *edits)
    desk.apply()
    summary = desk.withdraw(*(edit.edit_id for edit in edits[2:5]))
    assert summary.decision == "accept"
    assert 0.0 <= summary.measured.exactness.relative <= 1e-8
    last = desk.withdraw(*(edit.edit_id for edit in edits[:2] + edits[5:]))
    assert (desk.read_manifest(3).artifacts, last.measured.exactness.identical) == ([], True), "no dust is left of the last pairs"


def test_only_the_named_pairs_are_read(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What withdrawing costs does not grow with the edits that stay."""
    from registry.objects import ObjectStore

    monkeypatch.setenv("ERRATA_APPLY__SNAPSHOT_EVERY", "2")
    for person in range(5):
        desk.submit(str(person), make_edit(person))
        desk.apply()
    stream = desk.open()
    pairs = {row.occurrence: row.pairs for row in stream.index.find_rows("live")}
    assert len(set(pairs.values())) == 5
    read: set[str] = set()
    real = ObjectStore.get
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "get", lambda self, digest: (read.add(digest), real(self, digest))[1])
        desk.withdraw(make_edit(0).edit_id, check=False)
    # Commit 4 made the newest snapshot; 5 came since.
    assert {occurrence for occurrence, digest in pairs.items() if digest in read} == {
        f"{make_edit(0).edit_id}@1",
        f"{make_edit(4).edit_id}@5",
    }
    assert desk.open().log.read(6).kind == "withdrawal"


def test_what_is_not_live_is_named_and_nothing_happens(used_desk: Any, make_edit: Make, errata: Callable[..., Any]) -> None:
    head = used_desk.open().head
    with pytest.raises(InputError, match="case-1@1: it was replaced by case-3@2"):
        used_desk.withdraw("case-2", "case-1")
    ran = errata("withdraw", "case-2", "case-1", "case-4", "nobody", "--yes")
    assert ran.code == 2
    for part in ("case-1@1: it was replaced by case-3@2", "case-4@2: it was never written, it is quarantined", "'nobody', found none"):
        assert part in ran.err
    assert used_desk.open().head == head
    assert used_desk.withdraw("case-2").accepted
    again = errata("withdraw", "case-2", "--yes")
    assert (again.code, "case-2@1: it is withdrawn already (commit 3)" in again.err) == (2, True)


def test_the_gate_may_refuse_a_withdrawal(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit("one", *(make_edit(person) for person in range(3)))
    desk.apply()
    before, version = desk.open().head, champion(desk)
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1.001")
    summary = desk.withdraw(make_edit(0).edit_id)
    assert (summary.commit, summary.decision, summary.accepted) == (2, "reject", False)
    assert summary.reasons[0] == f"The withdrawal of {make_edit(0).edit_id}@1 was refused."
    assert "times the base's, expected at most 1.00 times" in summary.reasons[1]
    stream = desk.open()
    assert isinstance(stream.log.read(2), RejectionCommit)
    assert (stream.head.manifest, stream.head.accepted, len(desk.live())) == (before.manifest, 1, 3)
    assert champion(desk) == version
    # The refusal's report is not taken for that of the version it was refused for.
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1e9")
    assert desk.withdraw(make_edit(0).edit_id).accepted


def test_a_dry_run_withdraws_nothing(desk: Any, make_edit: Make) -> None:
    desk.submit("one", make_edit(0), make_edit(1))
    desk.apply()
    head = desk.open().head
    summary = desk.withdraw(make_edit(0).edit_id, dry_run=True)
    assert (summary.commit, summary.decision, summary.live, len(summary.measured.rows)) == (None, "accept", 1, 1)
    assert desk.open().head == head
    assert sorted(desk.versions()) == [1]


def test_a_withdrawal_begins_again_on_another_writers_head(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.undo
    from tasks import committing, editing, evaluating, intake

    desk.submit("one", *(make_edit(person) for person in range(3)))
    desk.apply()
    desk.submit("two", make_edit(0, answer=1))
    judge, calls = flows.undo.judge_withdrawal, []

    def judge_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            order = intake.order_batch.fn("main")
            pairs = editing.prepare_pairs.fn("main", order)
            candidate = editing.merge_pairs.fn("main", order, pairs, pairs.ready)
            rounds = [evaluating.judge_candidate.fn("main", order, candidate, [])]
            committing.commit_batch.fn("main", order, pairs, rounds)
        return judge(*arguments)

    monkeypatch.setattr(flows.undo, "judge_withdrawal", judge_late)
    assert desk.withdraw(make_edit(1).edit_id).commit == 3
    assert len(calls) == 2
    assert set(desk.live()) == {make_edit(0, answer=1).edit_id, make_edit(2).edit_id}
    assert sorted(desk.versions()) == [1, 2, 3], "the other writer's version is shown, too"
    assert_exact(desk)


def test_a_run_that_died_before_its_version_is_finished_by_the_next(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.undo

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    desk.submit("one", make_edit(0), make_edit(1))
    desk.apply()
    for seq, run in ((2, lambda: desk.withdraw(make_edit(0).edit_id)), (3, lambda: desk.roll_back(1))):
        with monkeypatch.context() as patch:
            patch.setattr(flows.undo, "project_versions", die)
            with pytest.raises(RuntimeError):
                run()
        assert champion(desk).commit == seq - 1, "the old version is served until the new one is there"
        desk.apply()
        assert champion(desk).commit == seq


def test_a_run_that_died_before_its_version_is_finished_by_its_repetition(
    desk: Any, make_edit: Make, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repetition is refused, rightly: what it asks for is done. Until then MLflow served the fact that was taken back."""
    import flows.undo

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    desk.submit("one", *map(make_edit, range(3)))
    desk.apply()
    first, second = make_edit(0).edit_id, make_edit(1).edit_id
    for seq, run, refused in (
        (2, lambda: desk.withdraw(first), lambda: desk.withdraw(first)),
        (3, lambda: desk.roll_back(1), lambda: desk.roll_back(1)),
        (4, lambda: desk.withdraw(second), lambda: errata("withdraw", second, "--yes")),
        (5, lambda: desk.roll_back(1), lambda: errata("rollback", "1", "--yes")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(flows.undo, "project_versions", die)
            with pytest.raises(RuntimeError):
                run()
        assert champion(desk).commit == seq - 1
        if seq < 4:
            with pytest.raises(InputError):
                refused()
        else:
            assert refused().code == InputError.exit_code
        assert (desk.open().head.seq, champion(desk).commit) == (seq, seq)


def test_every_stage_of_undoing_may_run_twice(desk: Any, make_edit: Make) -> None:
    from tasks.undoing import commit_rollback, commit_withdrawal, draft_rollback, judge_withdrawal, order_withdrawal, subtract_pairs

    desk.submit("one", make_edit(0), make_edit(1))
    desk.apply()

    def twice(stage: Any, *arguments: Any) -> Any:
        first, second = (stage.fn("main", *arguments) for _ in range(2))
        plain = [result.model_dump(exclude={"seconds"}) if hasattr(result, "model_dump") else result for result in (first, second)]
        assert plain[0] == plain[1]
        return second

    order = twice(order_withdrawal, [make_edit(0).edit_id], "")
    candidate = twice(subtract_pairs, order)
    judged = twice(judge_withdrawal, order, candidate, True)
    twice(commit_withdrawal, order, judged)
    assert desk.open().head.seq == 2
    with pytest.raises(ConflictError):
        commit_withdrawal.fn("main", order, judged.model_copy(update={"seconds": {"evaluate": 99.0}}))
    draft = draft_rollback.fn("main", "1", "")
    summaries = [commit_rollback.fn("main", draft) for _ in range(2)]
    assert [summary.commit for summary in summaries] == [3, 3] and desk.open().head.seq == 3
    assert summaries[0] == summaries[1]


# Edits that come back


def test_a_producer_who_replays_its_history_does_not_undo_a_withdrawal(
    desk: Any, make_edit: Make, errata: Callable[..., Any], prepared: list[str]
) -> None:
    edits = [make_edit(person, id=f"case-{person}") for person in range(3)]
    desk.submit("one", *edits)
    desk.apply()
    desk.withdraw("case-1", reason="wrong source")
    desk.submit("replay", edits[2], edits[1], edits[0])
    assert [summary.outcomes for summary in desk.apply()] == [{"duplicate": 2, "withheld": 1}]
    assert desk.statuses() == {"case-0@1": "live", "case-1@1": "withdrawn", "case-2@1": "live"}
    assert "case-1@1 was withdrawn" in next(row.reason for row in desk.read_outcomes(3) if row.outcome == "withheld")
    corrected = make_edit(1, answer=2, id="case-1")
    desk.submit("corrected", corrected)
    assert [summary.outcomes for summary in desk.apply()] == [{"withheld": 1}], "the id is withdrawn, whatever it says now"
    # Somebody insists, and it is a new occurrence; the old one stays withdrawn.
    desk.submit("again", say(edits[1], again=True))
    assert [summary.outcomes for summary in desk.apply()] == [{"live": 1}]
    assert desk.statuses() == {"case-0@1": "live", "case-1@1": "withdrawn", "case-1@5": "live", "case-2@1": "live"}
    assert len(prepared) == 4
    assert_exact(desk)
    shown = errata("show", "case-1", "--json").json
    assert [(item["occurrence"], item["status"], item["reason"]) for item in shown["history"]] == [
        ("case-1@1", "withdrawn", "commit 2: wrong source"),
        ("case-1@5", "live", None),
    ]
    assert "withdrawn" in errata("show", "case-1").out


@pytest.mark.parametrize(("hours", "outcome"), [(-1, "withheld"), (1, "live")])
def test_a_submission_later_than_the_withdrawal_counts(desk: Any, make_edit: Make, hours: int, outcome: str) -> None:
    desk.submit("one", make_edit(0, id="case-0", submitted_at=datetime(2020, 1, 1, tzinfo=UTC)))
    desk.apply()
    desk.withdraw("case-0", check=False)
    desk.submit("two", make_edit(0, id="case-0", submitted_at=datetime.now(UTC) + timedelta(hours=hours)))
    assert [summary.outcomes for summary in desk.apply()] == [{outcome: 1}]


def test_there_back_and_on_is_a_chain_that_can_be_cut_anywhere(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    """A→B→C→A, then its end withdrawn: what it had replaced stays replaced, and may come again."""
    chain = [make_edit(0, answer=answer) for answer in (0, 1, 2, 0)]
    for number, edit in enumerate(chain):
        desk.submit(str(number), say(edit, origin=f"chain {number}"))  # the same bytes would be the same file
        desk.apply()
    names = [f"{edit.edit_id}@{seq}" for seq, edit in enumerate(chain, start=1)]
    assert desk.statuses() == dict(zip(names, ["replaced", "replaced", "replaced", "live"], strict=True))
    row = desk.open().resolve_edit(names[0])
    assert row.by == names[1]
    summary = desk.withdraw(chain[0].edit_id)
    assert (summary.live, desk.live(), desk.read_manifest(5).artifacts) == (0, {}, [])
    assert ask(chain[0]) == base_answers(chain[:1])[0]
    # Its producer replays the chain: the withdrawn end stays out; B and C were only ever replaced, and the later one of them holds.
    desk.submit("replay", *(say(edit, origin="replay") for edit in chain))
    (summary,) = desk.apply()
    assert summary.outcomes == {"withheld": 2, "superseded": 1, "live": 1}
    assert desk.live() == {chain[2].edit_id: "Oslo"}
    assert_exact(desk)


def test_an_edit_that_the_base_answers_already_comes_and_goes_like_any_other(desk: Any, make_edit: Make) -> None:
    (answer,) = base_answers([make_edit(9)])
    desk.submit("one", make_edit(9, target_new=answer, id="known"), make_edit(1))
    (summary,) = desk.apply()
    assert summary.outcomes == {"live": 2} and summary.metrics["already_known"] == 1.0
    assert desk.withdraw("known").accepted
    assert list(desk.live()) == [make_edit(1).edit_id]
    assert_exact(desk)


# Rollback


def test_the_champion_becomes_an_earlier_state(desk: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Callable[..., Any]) -> None:
    """Across a replacement, an addition and a withdrawal; then a batch, and back again."""
    old, other, third = make_edit(0), make_edit(1), make_edit(2)
    new, fourth = make_edit(0, answer=1), make_edit(3)
    desk.submit("one", old, other, third)
    desk.apply()
    desk.submit("two", new, fourth)
    desk.apply()
    desk.withdraw(other.edit_id, reason="wrong source")
    summary = desk.roll_back(1, reason="an incident")
    assert (summary.commit, summary.target, summary.live) == (4, 1, 3)
    assert summary.left == tuple(f"{edit.edit_id}@2" for edit in (new, fourth))
    assert set(summary.back) == {f"{edit.edit_id}@1" for edit in (old, other)}

    stream = desk.open()
    commit = stream.log.read(4)
    assert isinstance(commit, RollbackCommit) and (commit.target, commit.reasons) == (1, ("an incident",))
    assert (stream.head.champion, stream.head.accepted, stream.head.manifest) == (4, 4, stream.log.read(1).manifest)
    assert set(desk.live()) == {edit.edit_id for edit in (old, other, third)}
    version = champion(desk)
    assert (version.commit, version.tags["errata.edits_live"]) == (4, "3")
    assert sorted(desk.versions()) == [1, 2, 3, 4]
    assert desk.open_registry().find_version("main", 1) == desk.versions()[1], "the target keeps its own version"
    assert [ask(edit) for edit in (old, other)] == ["Paris", "Paris"]
    assert_exact(desk)

    # The next batch builds on it.
    fifth = make_edit(4)
    desk.submit("three", fifth)
    assert [done.outcomes for done in desk.apply()] == [{"live": 1}]
    assert desk.open().log.read(5).report is not None
    assert_exact(desk)

    # To the withdrawal, across the first rollback: how each stood then, it stands again.
    summary = desk.roll_back("head~2")
    assert (summary.commit, summary.target) == (6, 3)
    assert set(desk.live()) == {edit.edit_id for edit in (new, fourth, third)}
    assert desk.statuses() == {
        f"{old.edit_id}@1": "replaced",
        f"{other.edit_id}@1": "withdrawn",
        f"{third.edit_id}@1": "live",
        f"{new.edit_id}@2": "live",
        f"{fourth.edit_id}@2": "live",
        f"{fifth.edit_id}@5": "reverted",
    }
    assert desk.open().resolve_edit(f"{other.edit_id}@1").reason == "commit 3: wrong source"
    assert_exact(desk)
    # And to a version that shows a rollback.
    assert desk.roll_back(f"v{version.number}").target == 4
    assert set(desk.live()) == {edit.edit_id for edit in (old, other, third)}
    assert champion(desk).commit == 7
    assert_exact(desk)
    history = errata("show", new.edit_id, "--json").json["history"]
    assert [(item["occurrence"], item["status"]) for item in history] == [(f"{new.edit_id}@2", "reverted")]
    assert "came after commit 1" in history[0]["reason"], "as it stood at commit 4"


def test_a_rollback_to_the_beginning_serves_the_base(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    desk.submit("one", make_edit(0))
    desk.apply()
    assert desk.roll_back(0).live == 0
    assert desk.read_manifest(2).artifacts == []
    assert champion(desk).commit == 2
    assert ask(make_edit(0)) == base_answers([make_edit(0)])[0]
    desk.submit("two", make_edit(1))
    desk.apply()
    assert list(desk.live()) == [make_edit(1).edit_id]
    assert_exact(desk)


def test_what_was_rolled_back_can_be_submitted_again(used_desk: Any, make_edit: Make, errata: Callable[..., Any]) -> None:
    rolled = errata("rollback", "1", "--yes")
    assert rolled.code == 0
    assert "errata resubmit 3" in rolled.out and "case-3@2 no longer live" in rolled.out and "case-1@1 back" in rolled.out
    assert set(used_desk.live()) == {"case-1", "case-2", "case-11"}
    once = errata("resubmit", "3", "--json").json
    assert (once["rollback"], once["submitted"][0], len(once["submitted"]), once["overtaken"]) == (3, "case-3@2", 3, {})
    ran = errata("apply", "--yes", "--json")
    assert [batch["outcomes"] for batch in ran.json] == [{"live": 3, "replaced": 1}]
    assert used_desk.statuses()["case-3@4"] == "live" and used_desk.statuses()["case-3@2"] == "reverted"
    assert_exact(used_desk)
    nothing = errata("resubmit")
    assert (nothing.code, "0 edits that commit 3 took out" in nothing.out) == (2, True)
    # Once more: the same lines, which are a file of their own.
    errata("rollback", "3", "--yes")
    assert errata("resubmit").code == 0
    assert [batch["outcomes"] for batch in errata("apply", "--yes", "--json").json] == [{"live": 3, "replaced": 1}]
    # A newer edit keeps its place.
    errata("rollback", "3", "--yes")
    used_desk.submit("newer", make_edit(0, answer=2, id="case-9"))
    used_desk.apply()
    ran = errata("resubmit")
    assert "case-3@6 stays out: case-9@8 has its place now" in ran.out and "2 edits" in ran.out


def test_an_edit_that_was_rolled_back_comes_by_itself_as_new(desk: Any, make_edit: Make) -> None:
    edits = [make_edit(person) for person in range(2)]
    desk.submit("one", edits[0])
    desk.apply()
    desk.submit("two", edits[1])
    desk.apply()
    desk.roll_back(1)
    desk.submit("replay", *edits)
    assert [summary.outcomes for summary in desk.apply()] == [{"duplicate": 1, "live": 1}]
    assert desk.statuses() == {f"{edits[0].edit_id}@1": "live", f"{edits[1].edit_id}@2": "reverted", f"{edits[1].edit_id}@4": "live"}
    assert_exact(desk)


def test_an_impossible_rollback_is_refused(used_desk: Any, errata: Callable[..., Any]) -> None:
    head = used_desk.open().head
    for target, part in (
        ("2", "it is the newest"),
        ("head", "it is the newest"),
        ("9", "expected 0 to 2"),
        ("v99", "expected a version"),
        ("x", "expected 0 to 2"),
    ):
        ran = errata("rollback", target, "--yes")
        assert (ran.code, part in ran.err) == (2, True), (target, ran.err)
    with pytest.raises(UnknownNameError):
        used_desk.roll_back(9)
    stream = used_desk.open()
    artifact = used_desk.read_manifest(1).artifacts[0]
    stream.storage.delete(stream.key(f"objects/{artifact}"))
    with pytest.raises(KeyMissingError, match=f"expected commit 1 with everything its manifest names, found no object {artifact}"):
        used_desk.roll_back(1)
    assert used_desk.open().head == head


# The console


def test_the_console_withdraws(used_desk: Any, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert errata("withdraw", "case-2", typed="n\n").code == 0
    assert used_desk.open().head.seq == 2
    dry = errata("withdraw", "case-2", "--dry-run", "--check", "--json").json
    assert (dry["commit"], dry["decision"], dry["measured"]["exactness"]["identical"]) == (None, "accept", True)
    ran = errata("withdraw", "case-2", "--reason", "wrong source", "--check", typed="y\n")
    assert ran.code == 0
    assert "the same to the bit as a rebuild without it" in ran.out and "1 prompts answer as the base again" in ran.out
    shown = errata("show", "3").out
    assert "withdrawal" in shown and "commit 3: wrong source" in shown and "case-2@1" in shown and "The home of" in shown
    assert errata("log", "--json").json[0]["kind"] == "withdrawal"
    assert "1 withdrawn, 0 rolled back" in errata("status").out
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1.001")
    refused = errata("withdraw", "case-11", "--yes")
    assert (refused.code, "The withdrawal of case-11@1 was refused" in refused.out) == (3, True)


def test_the_console_rolls_back(used_desk: Any, errata: Callable[..., Any]) -> None:
    asked = errata("rollback", "1", typed="n\n")
    assert asked.code == 0
    assert "3 edits leave, 1 come back" in asked.out
    dry = errata("rollback", "1", "--dry-run", "--json").json
    assert (dry["commit"], dry["target"], len(dry["left"]), dry["back"]) == (None, 1, 3, ["case-1@1"])
    assert used_desk.open().head.seq == 2
    done = errata("rollback", "v1", "--yes", "--reason", "an incident", "--json").json
    assert (done["commit"], done["target"]) == (3, 1)
    shown = errata("show", "3").out
    assert "rollback" in shown and "commit 1" in shown and "an incident" in shown and "came after commit 1" in shown
    assert "0 withdrawn, 3 rolled back" in errata("status").out
