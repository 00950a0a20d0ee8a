"""Edits of one subject that share a pair, through every flow that adds, changes or takes back."""

from collections.abc import Callable
from typing import Any

import pytest

from errata.candidates import load_state
from errata.editors.base import Pairs
from errata.editors.d4s import groups
from errata.edits import Edit
from errata.exactness import measure_exactness
from errata.manifests import PairRef

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


@pytest.fixture(autouse=True)
def _alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the random base the keys of "The home of {}" and "The sport of {}" have a cosine of .86, others of one subject below .6."""
    monkeypatch.setattr(groups, "NEARLY_EQUAL", 0.8)


def place(desk: Any) -> dict[str, PairRef]:
    """Live id → where its pair lies, after looking whether the state holds each of these pairs once."""
    from tasks._session import load_model, open_named

    settings, stream = open_named("main")
    editor, manifest = load_model(settings, stream).editor, desk.read_manifest(stream.head.seq)
    found = {row.id: PairRef(pairs=row.pairs, row=row.row) for row in stream.index.find_rows("live")}
    refs = list(dict.fromkeys(found.values()))
    assert load_state(stream.objects, editor, manifest.layers[0].state).count == len(refs)
    assert measure_exactness(stream.objects, editor, manifest, refs).identical
    return found


def check(errata: Callable[..., Any], *words: str) -> None:
    """The log, replayed by somebody who knows nothing of groups, comes to the same weights."""
    ran = errata("rebuild", "--check", *words)
    assert ran.code == 0, ran.out + ran.err


def test_a_group_forms_changes_and_falls_apart(desk: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Any) -> None:
    home, sport, language, other = make_edit(0, 0, 0), make_edit(0, 2, 1), make_edit(0, 1, 2), make_edit(1, 0, 3)
    desk.submit("one", home, other)
    desk.apply()
    alone = place(desk)
    desk.submit("two", sport, language)
    (summary,) = desk.apply()
    assert summary.outcomes == {"live": 2, "regrouped": 1}
    joint = place(desk)
    assert joint[home.edit_id] == joint[sport.edit_id] != alone[home.edit_id]
    assert joint[language.edit_id] not in (joint[home.edit_id], alone[home.edit_id])
    assert joint[other.edit_id] == alone[other.edit_id], "who has another subject keeps its pair"
    assert [ask(edit) for edit in (home, sport, language, other)] == ["Paris", "tennis", "Greek", "Bern"]
    moved = next(row for row in desk.read_outcomes(2) if row.occurrence == f"{home.edit_id}@1")
    assert moved.outcome == "live" and moved.before is not None and moved.before.pairs == alone[home.edit_id].pairs
    shown = errata("show", home.edit_id)
    assert "shares its pair" in shown.out and f"{sport.edit_id}@2" in shown.out

    # One of the two is replaced: the new one takes its place in the group.
    moved_home = make_edit(0, 0, 2)
    desk.submit("three", moved_home)
    desk.apply()
    third = place(desk)
    assert third[moved_home.edit_id] == third[sport.edit_id] != joint[sport.edit_id] and home.edit_id not in third
    assert ask(moved_home) == "Oslo" and ask(sport) == "tennis"
    check(errata)

    # A rollback serves the joint pair of then, and the one after it that of now.
    desk.roll_back(2)
    assert place(desk) == joint
    desk.roll_back(3)
    assert place(desk) == third
    rolled = desk.roll_back(1)
    assert place(desk) == alone
    assert set(rolled.left) == {f"{moved_home.edit_id}@3", f"{sport.edit_id}@2", f"{language.edit_id}@2"}
    assert rolled.back == (f"{home.edit_id}@1",)
    desk.roll_back(2)

    # A withdrawn member leaves the other alone, with the pair it would have had.
    taken = desk.withdraw(sport.edit_id)
    assert taken.accepted and taken.measured.exactness.identical and (taken.live, taken.metrics["retention"]) == (3, 1.0)
    last = place(desk)
    assert last[home.edit_id] not in joint.values()
    assert [ask(edit) for edit in (home, language, other)] == ["Paris", "Greek", "Bern"]
    check(errata)
    desk.withdraw(home.edit_id, language.edit_id, other.edit_id)
    assert desk.read_manifest(desk.open().head.seq).artifacts == []


def test_a_group_loses_what_the_gate_drops(desk: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Any) -> None:
    home, sport = make_edit(0, 0, 0), make_edit(0, 2, id="sport", target_new="Zqx wvut Zqx")
    desk.submit("one", home, sport)
    (summary,) = desk.apply()
    assert (summary.outcomes, summary.rounds) == ({"live": 1, "quarantined": 1}, 2)
    assert place(desk).keys() == {home.edit_id} and ask(home) == "Paris"
    # A newcomer that would cost an older edit of its group is refused, and the older one keeps the pair it has.
    before = place(desk)
    desk.submit("two", make_edit(0, 2, id="again", target_new="Zqx wvut Zqx"))
    (summary,) = desk.apply()
    assert summary.outcomes == {"quarantined": 1}
    assert place(desk) == before and ask(home) == "Paris"
    check(errata)


def test_joint_pairs_of_a_killed_run_are_used_again(
    desk: Any, make_edit: Make, prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.edit

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    desk.submit("one", make_edit(0, 0), make_edit(1, 0))
    desk.apply()
    prepared.clear()
    desk.submit("two", make_edit(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(flows.edit, "judge_candidate", die)
        with pytest.raises(RuntimeError):
            desk.apply()
    assert sorted(prepared) == sorted((make_edit(0, 0).edit_id, make_edit(0, 2).edit_id)), "the group, and nobody else"
    desk.apply()
    assert len(prepared) == 2, "nothing was computed again"
    assert len(set(place(desk).values())) == 2
    assert not list(desk.open().storage.list("streams/main/prepared/"))


def test_a_commit_that_moves_pairs_may_be_made_twice(desk: Any, make_edit: Make) -> None:
    """As after an answer that got lost: how older edits stood before is told from the order, not from what it has become."""
    from tasks.committing import commit_batch
    from tasks.editing import merge_pairs, prepare_pairs
    from tasks.evaluating import judge_candidate
    from tasks.intake import order_batch

    desk.submit("one", make_edit(0, 0), make_edit(1, 0))
    desk.apply()
    before = place(desk)
    desk.submit("two", make_edit(0, 2, 1), make_edit(1, 0, 2))
    order = order_batch.fn("main")
    prepared = prepare_pairs.fn("main", order)
    candidate = merge_pairs.fn("main", order, prepared, prepared.ready)
    rounds = [judge_candidate.fn("main", order, candidate, [])]
    for _ in range(2):
        commit_batch.fn("main", order, prepared, rounds)
    assert desk.open().head.seq == 2
    told = {row.occurrence: row.before.pairs for row in desk.read_outcomes(2) if row.before}
    assert told == {f"{name}@1": ref.pairs for name, ref in before.items()}


def test_one_of_a_group_can_be_erased_and_the_others_stay(desk: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Any) -> None:
    home, sport = make_edit(0, 0, 0), make_edit(0, 2, 1)
    desk.submit("one", home, sport)
    desk.apply()
    joint = place(desk)[home.edit_id]
    desk.withdraw(sport.edit_id)
    assert errata("erase", sport.edit_id, "--yes").code == 0
    assert desk.live() == {home.edit_id: "Paris"} and ask(home) == "Paris"
    assert place(desk)[home.edit_id] != joint
    pairs = Pairs.from_bytes(desk.open().objects.get(joint.pairs))
    assert not pairs.residuals[joint.row].any(), "the pair that carried both"
    check(errata)
    # What comes next is written on what is left.
    desk.submit("two", make_edit(0, 2, 1, id="anew", submitted_at="2999-01-01T00:00:00+00:00"))
    desk.apply()
    assert len(set(place(desk).values())) == 1 and ask(home) == "Paris"
    check(errata)


def test_a_group_moves_to_another_site_as_one(desk: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Any, tmp_path: Any) -> None:
    import json

    home, sport, other = make_edit(0, 0, 0), make_edit(0, 2, 1), make_edit(1, 0, 3)
    desk.submit("one", home, sport, other)
    desk.apply()
    before = place(desk)
    profile = desk.open().storage.read(next(entry.key for entry in desk.open().storage.list("shared/profiles/")))
    values = json.loads(profile)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"prepare": {**values["prepare"], "steps": 20}, "lam": values["solve"]["lam"]}))
    ran = errata("rebase", "main", "--profile", str(path), "--yes", "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["estimate"]["edits"], ran.json["estimate"]["pairs"]) == (3, 2)
    after = place(desk)
    assert after[home.edit_id] == after[sport.edit_id] != before[home.edit_id] and len(set(after.values())) == 2
    assert [ask(edit) for edit in (home, sport, other)] == ["Paris", "tennis", "Bern"]
    check(errata)
