"""The main line as a user sees it: files in the inbox become commits, model versions and answers."""

from collections.abc import Callable
from typing import Any

import mlflow
import pytest

from errata.edits import Edit, digest_of
from errata.errors import ConflictError, RegistryError
from registry.events import EditsCommit, RejectionCommit

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]

UNREACHABLE = {"prompt": "{} has long been living in", "target_new": "Zqx wvut"}
"""Words that no text of the base has, at some distance from the subject: no z reaches them."""
TOO_LONG = {"prompt": "{} has " + "very " * 80 + "long been living in"}


def test_an_inbox_becomes_a_version_that_answers(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    ann, bob, cleo = make_edit(0, answer=0), make_edit(1, answer=1), make_edit(2, answer=2)
    desk.submit(
        "monday",
        ann,
        '{"subject": "Cut off',
        {"subject": "Bo Lind", "prompt": "The home of nobody", "target_new": "Rome"},
        bob,
        ann,  # twice
        cleo,
        make_edit(2, answer=3),  # the same slot: the later one holds
    )
    raw = digest_of(desk.open().storage.read("streams/main/inbox/monday.jsonl"))
    (summary,) = desk.apply()
    assert (summary.commit, summary.decision, summary.rounds) == (1, "accept", 1)
    assert summary.outcomes == {"live": 3, "refused": 2, "duplicate": 1, "superseded": 1}

    outcomes = {outcome.line: outcome for outcome in desk.read_outcomes(1)}
    assert [outcomes[line].outcome for line in range(1, 8)] == ["live", "refused", "refused", "live", "duplicate", "superseded", "live"]
    assert outcomes[2].origin == "monday.jsonl:2" and "JSON" in outcomes[2].reason
    assert outcomes[3].origin == "monday.jsonl:3" and outcomes[3].field == "prompt" and "exactly one" in outcomes[3].reason
    assert outcomes[5].by == outcomes[1].occurrence
    assert outcomes[6].by == outcomes[7].occurrence
    assert desk.live() == {ann.edit_id: "Paris", bob.edit_id: "Rome", make_edit(2, answer=3).edit_id: "Bern"}

    stream = desk.open()
    commit = stream.log.read(1)
    assert isinstance(commit, EditsCommit) and commit.promoted and commit.actor == "ann" and commit.run
    assert stream.head.champion == stream.head.accepted == 1
    assert desk.waiting() == []
    assert stream.objects.get(raw).count(b"\n") == 7

    version = desk.versions()[1]
    assert version.tags["errata.commit"] == "1"
    assert version.tags["errata.manifest"] == commit.manifest
    assert version.tags["errata.edits_live"] == "3"
    assert version.tags["errata.batch_refused"] == "2"
    assert desk.open_registry().champion("main") == version
    run = mlflow.get_run(version.run)
    assert run.data.metrics["efficacy"] == 1.0
    assert run.data.params["solve.lam"] == "1.0"
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(version.run)} >= {"report.json", "norms.png"}
    assert [ask(ann), ask(bob), ask(cleo)] == ["Paris", "Rome", "Bern"]


def test_what_was_applied_is_not_applied_again(desk: Any, make_edit: Make, prepared: list[str]) -> None:
    edits = [make_edit(person) for person in range(3)]
    desk.submit("one", *edits)
    desk.apply()
    head, versions = desk.open().head, desk.versions()
    assert desk.apply() == []
    desk.submit("one", *edits)  # the very same bytes
    assert desk.apply() == []
    desk.submit("two", *edits)  # and under another name
    assert desk.apply() == []
    assert desk.open().head == head
    assert desk.waiting() == []
    assert desk.versions() == versions
    # Other bytes that say the same are logged, and change nothing.
    desk.submit("three", *reversed(edits))
    (summary,) = desk.apply()
    assert (summary.decision, summary.outcomes) == ("nothing to write", {"duplicate": 3})
    assert desk.open().head.manifest == head.manifest
    assert desk.versions() == versions
    assert prepared == [edit.edit_id for edit in edits]


def test_a_replaced_edit_is_subtracted(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    from errata.candidates import load_artifacts, load_state, read_pairs
    from errata.manifests import PairRef
    from tasks._session import load_model, open_named

    desk.submit("one", make_edit(0), make_edit(1))
    desk.apply()
    old, new = make_edit(0), make_edit(0, answer=1)
    desk.submit("two", new)
    (summary,) = desk.apply()
    assert summary.outcomes == {"live": 1, "replaced": 1}
    assert desk.statuses() == {f"{old.edit_id}@1": "replaced", f"{make_edit(1).edit_id}@1": "live", f"{new.edit_id}@2": "live"}
    assert ask(new) == "Rome"
    assert desk.versions()[2].tags["errata.edits_live"] == "2"

    settings, stream = open_named("main")
    editor, manifest = load_model(settings, stream).editor, desk.read_manifest(2)
    assert load_state(stream.objects, editor, manifest.layers[0].state).count == 2
    live = [PairRef(pairs=row.pairs, row=row.row) for row in stream.index.find_rows("live")]
    never = editor.solve(editor.merge(editor.empty_state(), read_pairs(stream.objects, live), None))
    assert load_artifacts(stream.objects, manifest)[0].to_bytes() == never.to_bytes()


def test_there_and_back_are_three_occurrences(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    there, back = make_edit(0), make_edit(0, answer=1)
    desk.submit("all", there, back, there)
    replaced = {"live": 1, "replaced": 1}
    assert [summary.outcomes for summary in _apply_one_by_one(desk)] == [{"live": 1}, replaced, replaced]
    names = [f"{there.edit_id}@1", f"{back.edit_id}@2", f"{there.edit_id}@3"]
    assert desk.statuses() == dict(zip(names, ["replaced", "replaced", "live"], strict=True))
    assert desk.read_manifest(3).artifacts == desk.read_manifest(1).artifacts != desk.read_manifest(2).artifacts
    assert desk.read_manifest(3).recipe != desk.read_manifest(1).recipe
    assert ask(there) == "Paris"


def _apply_one_by_one(desk: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_APPLY__BATCH_SIZE", "1")
        return list(desk.apply())


def test_a_refused_batch_is_a_result(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit("one", make_edit(0))
    desk.apply()
    before, versions = desk.open().head, desk.versions()
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1.001")
    monkeypatch.setenv("ERRATA_GATE__MAX_ROUNDS", "1")
    edits = [make_edit(1), make_edit(0, answer=1)]
    desk.submit("two", *edits)
    (summary,) = desk.apply()
    assert (summary.decision, summary.accepted, summary.outcomes) == ("reject", False, {"rejected": 2})
    assert "times the base's, expected at most 1.00 times" in summary.reasons[0]
    stream = desk.open()
    assert isinstance(stream.log.read(2), RejectionCommit)
    assert stream.head.manifest == before.manifest
    assert (stream.head.accepted, stream.head.champion) == (1, 1)
    assert desk.live() == {make_edit(0).edit_id: "Paris"}
    assert desk.versions() == versions
    assert desk.open_registry().champion("main") == versions[1]
    # Under the same settings they are not tried again, under other settings they are.
    desk.submit("three", *reversed(edits))
    assert [summary.outcomes for summary in desk.apply()] == [{"withheld": 2}]
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1e9")
    desk.submit("four", *edits, make_edit(2))
    assert [summary.outcomes for summary in desk.apply()] == [{"live": 3, "replaced": 1}]


def test_an_edit_at_fault_is_quarantined_alone(desk: Any, make_edit: Make) -> None:
    old = make_edit(0, relation_id="home")
    desk.submit("one", old)
    desk.apply()
    bad = make_edit(0, relation_id="home", **UNREACHABLE)
    good = [make_edit(person) for person in (1, 2, 3)]
    desk.submit("two", good[0], bad, *good[1:], make_edit(4, **TOO_LONG))
    (summary,) = desk.apply()
    assert (summary.decision, summary.rounds, summary.outcomes) == ("accept", 2, {"live": 3, "quarantined": 1, "rejected": 1})
    outcomes = {outcome.outcome: outcome for outcome in desk.read_outcomes(2)}
    assert (outcomes["quarantined"].occurrence, outcomes["quarantined"].line) == (f"{bad.edit_id}@2", 2)
    assert "Its z was not reached" in outcomes["quarantined"].reason
    assert outcomes["rejected"].line == 5 and "64 tokens" in outcomes["rejected"].reason
    # What it would have replaced stays, and it left nothing in the model.
    assert desk.live() == {edit.edit_id: edit.target_new for edit in (old, *good)}
    names = {name for change in _read_changes(desk, 2) for name in change}
    assert names == {edit.edit_id for edit in good}


def _read_changes(desk: Any, seq: int) -> list[list[str]]:
    """Owners of the pairs that each change of a commit adds or removes."""
    from errata.editors.base import Pairs

    objects = desk.open().objects
    changes = objects.get_json(desk.read_manifest(seq).layers[0].state.pairs_since[-1])
    owners = [Pairs.from_bytes(objects.get(change["pairs"])).take(change["rows"]).owners for change in changes]
    return [[name for names in block for name in names] for block in owners]


def test_a_fault_of_the_batch_is_halved_until_it_is_found(
    desk: Any, make_edit: Make, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A norm budget that four of these edits keep and five do not."""
    edits = [make_edit(person, answer=person) for person in range(6)]
    norms = _measure_norms(desk, edits, prepared)
    prepared.clear()
    monkeypatch.setenv("ERRATA_GATE__MAX_NORM_RATIO", f"{(norms[3] + norms[4]) / 2:.4f}")
    assert norms == sorted(norms)
    desk.submit("six", *edits)
    done = desk.apply()
    assert [(summary.decision, summary.outcomes, summary.deferred) for summary in done] == [
        ("accept", {"live": 3}, 3),
        ("accept", {"live": 1}, 2),
        ("reject", {"quarantined": 1}, 1),
        ("reject", {"quarantined": 1}, 0),
    ]
    assert list(desk.live()) == [edit.edit_id for edit in edits[:4]]
    assert desk.waiting() == []
    assert sorted(desk.versions()) == [1, 2]
    runs = [run for seq in range(1, 5) for use in desk.open().log.read(seq).files for run in use.lines]
    assert sorted(line for first, last in runs for line in range(first, last + 1)) == [1, 2, 3, 4, 5, 6]
    assert prepared == [edit.edit_id for edit in edits], "pairs of deferred edits are kept for their batch"


def _measure_norms(desk: Any, edits: list[Edit], prepared: list[str]) -> list[float]:
    """mean |W| / mean |W0| after the first, the first two, … of the edits."""
    import torch

    from tasks._session import load_model, open_named

    model = load_model(*open_named("main"))
    pairs = model.editor.prepare(model.base, edits).pairs
    weight = model.base.layout.read_weight(model.base.model, 1)
    norms = []
    for count in range(1, len(edits) + 1):
        artifact = model.editor.solve(model.editor.merge(model.editor.empty_state(), pairs.take(range(count)), None))
        (delta,) = artifact.deltas.values()
        norms.append(float((weight + delta).abs().mean() / weight.abs().mean()))
        assert torch.isfinite(delta).all()
    return norms


def test_a_dry_run_commits_nothing(desk: Any, make_edit: Make, prepared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_APPLY__BATCH_SIZE", "2")
    desk.submit("one", *(make_edit(person) for person in range(3)))
    head = desk.open().head
    (summary,) = desk.apply(dry_run=True)
    assert summary.commit is None
    assert (summary.decision, summary.outcomes) == ("accept", {"live": 2})
    assert summary.metrics["efficacy"] == 1.0
    assert summary.seconds.keys() == {"prepare", "merge", "evaluate"} and summary.peak_mb > 0
    assert desk.open().head == head
    assert desk.waiting() == ["one.jsonl"]
    assert desk.versions() == {}
    assert [summary.commit for summary in desk.apply()] == [1, 2]
    assert len(prepared) == 3, "the dry run's pairs are used"


def _take_half() -> None:
    """Another writer applies the first two edits that wait."""
    from tasks import committing, editing, evaluating, intake

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_APPLY__BATCH_SIZE", "2")
        order = intake.order_batch.fn("main")
        pairs = editing.prepare_pairs.fn("main", order)
        candidate = editing.merge_pairs.fn("main", order, pairs, pairs.ready)
        rounds = [evaluating.judge_candidate.fn("main", order, candidate, [])]
        committing.commit_batch.fn("main", order, pairs, rounds)


def _log_something() -> None:
    """Another writer commits something that touches nothing of ours."""
    from registry.commit import commit
    from tasks._session import open_named
    from tasks.committing import describe_writer

    settings, stream = open_named("main")
    head, outcomes = stream.head, stream.objects.put_rows([])
    named = {"seq": head.seq + 1, "parent": head.digest, "manifest": head.manifest, "outcomes": outcomes}
    commit(stream, RejectionCommit(**named, **describe_writer(settings)), head)


@pytest.mark.parametrize(("meanwhile", "ours"), [(_take_half, [1, 1, 2, 2]), (_log_something, [2, 2, 2, 2])])
def test_another_writer_comes_first(
    desk: Any, make_edit: Make, prepared: list[str], monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None], ours: list[int]
) -> None:
    """Between our order and our commit somebody else commits: we start again from their head, and each edit is applied once."""
    import flows.edit

    edits = [make_edit(person) for person in range(4)]
    desk.submit("one", *edits)
    judge, calls = flows.edit.judge_candidate, []

    def judge_late(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            meanwhile()
        return judge(*arguments)

    monkeypatch.setattr(flows.edit, "judge_candidate", judge_late)
    done = desk.apply()
    assert [(summary.commit, summary.outcomes) for summary in done] == [(2, {"live": ours.count(2)})]
    assert desk.statuses() == {f"{edit.edit_id}@{seq}": "live" for edit, seq in zip(edits, ours, strict=True)}
    assert sorted(desk.versions()) == sorted(set(ours)), "the other writer's version is shown, too"
    assert desk.open_registry().champion("main").commit == 2
    if meanwhile is _log_something:
        assert prepared == [edit.edit_id for edit in edits], "the pairs survive the conflict"


def test_endless_conflicts_end(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import flows.edit

    monkeypatch.setattr(flows.edit, "MAX_CONFLICTS", 2)
    tries = []

    def lose(*_: Any) -> Any:
        tries.append(1)
        raise ConflictError("another writer committed first")

    monkeypatch.setattr(flows.edit, "commit_batch", lose)
    desk.submit("one", make_edit(0))
    with pytest.raises(ConflictError):
        desk.apply()
    assert len(tries) == 3
    assert desk.waiting() == ["one.jsonl"]


def test_a_fault_fails_the_flow_and_loses_nothing(desk: Any, make_edit: Make, prepared: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.edit import apply_edits
    from tasks import evaluating

    desk.submit("one", make_edit(0))
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "evaluate_candidate", lambda *_, **__: 1 / 0)
        state = apply_edits("main", return_state=True)
    assert state.is_failed()
    assert desk.open().head.seq == 0
    assert desk.waiting() == ["one.jsonl"]
    assert [summary.outcomes for summary in desk.apply()] == [{"live": 1}]
    assert len(prepared) == 1


def test_mlflow_out_of_reach_delays_the_version_only(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit("one", make_edit(0))
    with monkeypatch.context() as patch:
        patch.setenv("ERRATA_MLFLOW__TRACKING_URI", "http://127.0.0.1:9")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(RegistryError, match="127.0.0.1:9"):
            desk.apply()
    assert desk.live() == {make_edit(0).edit_id: "Paris"}
    assert desk.versions() == {}
    # The next run finds nothing to apply, and mends.
    assert desk.apply() == []
    assert sorted(desk.versions()) == [1]
    assert desk.open_registry().champion("main").commit == 1


def test_a_version_or_alias_that_is_gone_is_made_again(desk: Any, make_edit: Make, ask: Callable[[Edit], str]) -> None:
    desk.submit("one", make_edit(0), make_edit(1), make_edit(2))
    _apply_one_by_one(desk)
    before, client = desk.versions(), mlflow.MlflowClient()
    assert sorted(before) == [1, 2, 3]
    client.set_registered_model_alias("main", "champion", str(before[1].number))
    desk.apply()
    assert desk.open_registry().champion("main") == before[3]
    client.delete_registered_model_alias("main", "champion")
    desk.apply()
    assert desk.open_registry().champion("main") == before[3]
    for commit in (2, 3):
        client.delete_model_version("main", str(before[commit].number))
    desk.apply()
    after = desk.versions()
    assert {commit: version.tags for commit, version in after.items()} == {commit: version.tags for commit, version in before.items()}
    assert desk.open_registry().champion("main") == after[3]
    assert ask(make_edit(2)) == "Paris"


def test_every_stage_may_run_twice(desk: Any, make_edit: Make) -> None:
    """As after an answer that got lost: the second time gives what the first gave, and changes nothing."""
    from tasks.committing import commit_batch
    from tasks.editing import merge_pairs, prepare_pairs
    from tasks.evaluating import judge_candidate
    from tasks.intake import order_batch
    from tasks.projecting import project_versions

    def twice(stage: Any, *arguments: Any) -> Any:
        first, second = (stage.fn("main", *arguments) for _ in range(2))
        drop = {"seconds": True, "peak_mb": True}
        plain = [result.model_dump(exclude=drop) if hasattr(result, "model_dump") else result for result in (first, second)]
        assert plain[0] == plain[1]
        return second

    desk.submit("one", *(make_edit(person) for person in range(3)))
    order = twice(order_batch)
    prepared = twice(prepare_pairs, order)
    candidate = twice(merge_pairs, order, prepared, prepared.ready)
    rounds = [twice(judge_candidate, order, candidate, [])]
    twice(commit_batch, order, prepared, rounds)
    assert desk.open().head.seq == 1
    assert twice(project_versions) == 1
    assert order_batch.fn("main") is None
    # Somebody else's commit is still a conflict.
    with pytest.raises(ConflictError):
        commit_batch.fn("main", order, prepared, [rounds[0].model_copy(update={"seconds": {"evaluate": 99.0}})])
