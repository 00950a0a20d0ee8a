"""A stream that moves to another base, or to another site on its own: the same facts, prepared anew, and a way back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import InputError, StorageError
from errata.profiles import PrepareOptions
from registry.events import RebaseCommit
from registry.inbox import list_waiting

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory, editable_folder: Path) -> Path:
    """The editable base with other weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(editable_folder, folder, dirs_exist_ok=True)
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config.from_pretrained(folder)).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path: Path, sentences: Any) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences))
    return path


@pytest.fixture
def write_profile(tmp_path: Path, editable_options: PrepareOptions) -> Callable[..., Path]:
    """A profile file with other values than the stream's."""

    def write(lam: float = 1.0, spread: str | None = None, **prepare: Any) -> Path:
        path = tmp_path / f"profile-{lam}-{spread}-{len(prepare)}.json"
        options = {**editable_options.model_dump(mode="json"), **prepare}
        path.write_text(json.dumps({"prepare": options, "lam": lam, "spread": spread, "origin": "test"}))
        return path

    return write


@pytest.fixture
def place(desk: Any, other_folder: Path, corpus: Path, write_profile: Callable[..., Path]) -> Callable[..., tuple[str, str]]:
    """Digests of a base and a profile to go to."""

    def place(*, base: bool = True, **values: Any) -> tuple[str, str]:
        from errata.settings import load_settings
        from tasks.onboarding import place_target

        source = str(other_folder) if base else None
        options = {"revision": None, "profile": str(write_profile(**values)), "corpus": corpus if base or "layers" in values else None}
        placed = place_target(load_settings(stream="main"), desk.open(), source, **options)
        return placed.ref.digest, placed.profile

    return place


def rebase(target: tuple[str, str], **options: Any) -> Any:
    from flows.replay import rebase

    return rebase("main", *target, **options)


def check(desk: Any) -> None:
    """The log, replayed, is what is stored."""
    from flows.replay import rebuild

    report = rebuild("main", check=True)
    assert report.sound and not report.unverified, report.findings


def test_the_same_facts_on_another_base_and_back(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], prepared: list[str], ask: Callable[[Edit], str]
) -> None:
    edits = [make_edit(0), make_edit(1, answer=1), make_edit(2, answer=2)]
    desk.submit("monday", *edits)
    desk.apply()
    desk.submit("tuesday", make_edit(3), make_edit(0, answer=3))
    desk.apply()
    before, facts, prior = desk.open().head, desk.live(), desk.read_manifest(2)
    target = place()
    prepared.clear()
    summary = rebase(target)
    assert (summary.decision, summary.commit, summary.live, summary.quarantined) == ("accept", 3, 4, {}), summary.reasons
    assert sorted(prepared) == sorted(facts), "every live edit, once; what was replaced stays behind"
    stream = desk.open()
    commit, head = stream.log.read(3), stream.head
    assert isinstance(commit, RebaseCommit) and len(commit.pairs) == 1
    assert (head.base, head.profile, head.champion) == (*target, 3) and head.base != before.base
    manifest = desk.read_manifest(3)
    assert (manifest.base, manifest.profile) == target and manifest.layers[0].state.operations == 0
    assert desk.live() == facts
    assert [ask(edit) for edit in (make_edit(0, answer=3), edits[1])] == ["Bern", "Rome"]
    check(desk)

    # Batches, withdrawals and compactions go on there.
    desk.submit("wednesday", make_edit(4))
    (applied,) = desk.apply()
    assert applied.decision == "accept" and desk.read_manifest(4).base == target[0]
    assert desk.withdraw(edits[2].edit_id).measured.exactness.relative < 1e-8
    from flows.replay import compact

    assert compact("main").decision == "accept"
    check(desk)

    # And a rollback leads back across the change, and forth again.
    back = desk.roll_back(2)
    assert set(back.left) == {f"{make_edit(4).edit_id}@4"} and set(back.back) == {f"{edits[2].edit_id}@1"}
    stream = desk.open()
    assert (stream.head.base, stream.head.profile) == (before.base, before.profile)
    assert (desk.live(), desk.read_manifest(stream.head.seq)) == (facts, prior)
    assert ask(make_edit(0, answer=3)) == "Bern"
    desk.submit("thursday", make_edit(5))
    assert desk.apply()[0].decision == "accept"
    forth = desk.roll_back(4)
    assert (forth.live, desk.open().head.base) == (5, target[0])
    assert [ask(edit) for edit in (edits[1], make_edit(4))] == ["Rome", "Paris"]
    check(desk)
    versions = desk.versions()
    assert sorted(versions) == list(range(1, stream.head.seq + 3)) and desk.open_registry().champion("main").commit == max(versions)


def test_another_site_on_the_same_base(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], prepared: list[str], ask: Callable[[Edit], str]
) -> None:
    desk.submit("monday", make_edit(0), make_edit(1))
    desk.apply()
    first, facts = desk.read_manifest(1), desk.live()
    prepared.clear()
    with pytest.raises(InputError, match="`errata adopt main --profile"):
        rebase(place(base=False, lam=2.0))
    assert rebase(place(base=False, lam=2.0, steps=20)).decision == "accept"
    assert sorted(prepared) == sorted(facts)
    assert (desk.live(), ask(make_edit(0)), desk.open().head.base) == (facts, "Paris", first.base)
    check(desk)
    desk.roll_back(1)
    assert desk.read_manifest(desk.open().head.seq) == first
    check(desk)


def test_keys_that_know_what_is_live(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a cascade pairs depend on the head: what was prepared for another is not used; what is stored adds and subtracts."""
    import flows.edit

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    desk.submit("monday", make_edit(0), make_edit(1))
    desk.apply()
    assert rebase(place(base=False, layers=[0, 1], keys="cascade", spread="d4s_code")).decision == "accept"
    prepared.clear()
    desk.submit("tuesday", make_edit(2), make_edit(3))
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(flows.edit, "judge_candidate", die)
            with pytest.raises(RuntimeError, match="killed"):
                desk.apply()
    assert len(prepared) == 2, "on the same head, once"
    assert desk.withdraw(make_edit(1).edit_id).measured.exactness.relative < 1e-8
    prepared.clear()
    assert desk.apply()[0].decision == "accept"
    assert len(prepared) == 2, "another edit was live then"
    check(desk)
    assert desk.withdraw(make_edit(2).edit_id).measured.exactness.relative < 1e-8
    desk.roll_back(2)
    from flows.replay import compact

    assert compact("main").decision == "accept"
    check(desk)


def test_what_cannot_be_had_there_waits_in_quarantine(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch, errata: Callable[..., Any]
) -> None:
    """An edit that does not take goes into quarantine; a fault of the whole refuses the whole; rolling back brings the edit back."""
    from errata import gate

    desk.submit("monday", make_edit(0), make_edit(1), make_edit(2))
    desk.apply()
    target, lost = place(), make_edit(1).edit_id
    head = desk.open().head
    with monkeypatch.context() as patch:
        patch.setenv("ERRATA_GATE__MAX_NORM_RATIO", "1.0001")
        refused = rebase(target)
    assert (refused.decision, refused.live, refused.quarantined) == ("reject", 3, {})
    after = desk.open()
    assert after.log.read(2).kind == "rejection" and (after.head.manifest, after.head.base) == (head.manifest, head.base)

    real = gate.find_edit_faults

    def blame(report: Any, settings: Any) -> Any:
        return (*real(report, settings), *(gate.EditFault(id=row.id, reason="It did not take.") for row in report.rows if row.id == lost))

    with monkeypatch.context() as patch:
        patch.setattr(gate, "find_edit_faults", blame)
        summary = rebase(target)
    assert (summary.decision, summary.live, summary.rounds) == ("accept", 2, 2)
    assert summary.quarantined == {f"{lost}@1": "commit 3: It did not take."}
    assert desk.statuses()[f"{lost}@1"] == "quarantined" and lost not in desk.live()
    check(desk)
    # It can be tried again there ...
    assert errata("quarantine", "retry", lost).code == 0
    assert list_waiting(desk.open())
    (again,) = desk.apply()
    assert (again.decision, desk.live()[lost]) == ("accept", "Paris")
    # ... and stands as it stood where it came from.
    desk.roll_back(1)
    assert desk.statuses() == {f"{make_edit(person).edit_id}@1": "live" for person in range(3)} | {f"{lost}@4": "reverted"}
    check(desk)


def test_edits_that_the_base_answers_are_named_and_may_be_taken_back(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], editable: Any, errata: Callable[..., Any]
) -> None:
    from errata.evaluation.answered import find_answered
    from errata.evaluation.generation import generate_answers

    people = range(2, 12)
    said = generate_answers(editable, [make_edit(person).rewrite_prompt for person in people], max_new_tokens=1, batch_tokens=1000)
    offered = [make_edit(person, target_new=word.strip()) for person, word in zip(people, said, strict=True) if word.strip()]
    known = find_answered(editable, offered, 1000)[0]
    desk.submit("monday", known, make_edit(1))
    desk.apply()
    assert len(desk.live()) == 2, "one that says what the base says is an edit as any other: it holds when the base changes"
    assert "known" in errata("show", known.edit_id).out
    target = place(base=False, steps=20)
    kept = rebase(target, dry_run=True)
    assert (kept.commit, kept.decision, kept.live, kept.withdrawn) == (None, "accept", 2, ())
    assert kept.answered == (f"{known.edit_id}@1",)
    summary = rebase(target, drop_answered=True)
    assert (summary.live, summary.withdrawn) == (1, (f"{known.edit_id}@1",))
    assert desk.statuses()[f"{known.edit_id}@1"] == "withdrawn"
    desk.submit("tuesday", known)
    desk.apply()
    assert len(desk.live()) == 1, "a producer that sends everything again changes nothing"
    check(desk)


def test_an_interrupted_rebase_goes_on_where_it_was_and_a_batch_meanwhile_is_carried_over(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], prepared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.replay

    def die(*_: Any) -> Any:
        raise RuntimeError("killed")

    desk.submit("monday", *(make_edit(person) for person in range(3)))
    desk.apply()
    target = place()
    prepared.clear()
    with monkeypatch.context() as patch:
        patch.setattr(flows.replay, "judge_rebase", die)
        with pytest.raises(RuntimeError, match="killed"):
            rebase(target)
    assert len(prepared) == 3 and desk.open().head.seq == 1
    prepared.clear()
    real, late = flows.replay.commit_rebase, [make_edit(3)]

    def commit(*values: Any) -> Any:
        if late:
            desk.submit("meanwhile", late.pop())
            assert desk.apply()[0].decision == "accept"
        return real(*values)

    monkeypatch.setattr(flows.replay, "commit_rebase", commit)
    summary = rebase(target)
    assert (summary.decision, summary.commit, summary.live) == ("accept", 3, 4)
    mine = make_edit(3).edit_id
    assert prepared == [mine, mine], "once on the base it was written for, once on the new one"
    check(desk)


def test_the_command_says_first_what_it_takes(
    desk: Any, make_edit: Make, other_folder: Path, corpus: Path, write_profile: Callable[..., Path], errata: Callable[..., Any]
) -> None:
    desk.submit("monday", make_edit(0), make_edit(1))
    desk.apply()
    nothing = errata("rebase", "main")
    assert (nothing.code, "expected another base (--base) or another profile (--profile)" in nothing.err) == (2, True)
    words = ("rebase", "main", "--base", str(other_folder), "--profile", str(write_profile()))
    assert "--corpus" in errata(*words).err
    declined = errata(*words, "--corpus", str(corpus), typed="n\n")
    assert (declined.code, desk.open().head.seq) == (0, 1)
    assert "2 to carry over, in 2 pairs" in declined.out and "0 pairs; 2 are stored" in declined.out
    ran = errata(*words, "--corpus", str(corpus), "--yes")
    assert ran.code == 0, ran.err
    assert desk.open().head.seq == 2
    same = errata(*words, "--corpus", str(corpus), "--yes")
    assert (same.code, "expected another base or profile" in same.err) == (2, True)
    assert errata("rebase", "nobody", "--base", "builtin").code == 2
    assert "rebase" in errata("log").out


def test_a_live_edit_that_a_rebase_leaves_out_keeps_it_from_landing(desk: Any, make_edit: Make, place: Any, monkeypatch: Any) -> None:
    import tasks.rebasing

    desk.submit("monday", make_edit(0), make_edit(1))
    desk.apply()
    target, real = place(), tasks.rebasing._conclude
    monkeypatch.setattr(tasks.rebasing, "_conclude", lambda *values: real(*values)[:1])
    with pytest.raises(StorageError, match="expected an outcome for every live edit"):
        rebase(target)
    assert desk.open().head.seq == 1
    head = desk.open().head
    with pytest.raises(InputError, match="expected another base or profile"):
        rebase((head.base, head.profile))


def test_everything_else_goes_on_across_the_change(
    desk: Any, make_edit: Make, place: Callable[..., tuple[str, str]], errata: Callable[..., Any], tmp_path: Path
) -> None:
    """A bundle holds both bases, an export each version on its own, an erasure reaches what is on the old one."""
    from errata.modeling.loading import load_base

    desk.submit("monday", make_edit(0), make_edit(1), make_edit(2))
    desk.apply()
    desk.withdraw(make_edit(1).edit_id)
    assert rebase(place()).decision == "accept"
    for seq in (1, 3):
        assert errata("export", str(seq), "--to", str(tmp_path / f"model-{seq}")).code == 0
    bases = {load_base(tmp_path / f"model-{seq}", device="cpu").digest for seq in (1, 3)}
    assert len(bases) == 2 and errata("export", "2", "--to", str(tmp_path / "model-2")).code == 0

    assert errata("bundle", "--to", str(tmp_path / "main.tar")).code == 0
    assert errata("unbundle", str(tmp_path / "main.tar"), "--root", str(tmp_path / "elsewhere")).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_ROOT", str(tmp_path / "elsewhere"))
        assert errata("rebuild", "--check").code == 0

    erased = errata("erase", make_edit(1).edit_id, "--yes", "--json")
    assert erased.code == 0 and erased.json["commits"] == [1]
    assert errata("rebuild", "--check").code == 0
    assert set(desk.live()) == {make_edit(0).edit_id, make_edit(2).edit_id}
    asked = errata("ask", make_edit(0).rewrite_prompt, "--json")
    assert asked.code == 0
