"""A stream that adopts another solve part: the same pairs, other weights, a version of its own, and a way back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import InputError, StorageError
from errata.profiles import PrepareOptions
from registry.events import CalibrationCommit

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Write = Callable[..., str]
Errata = Callable[..., Any]


@pytest.fixture
def write_profile(tmp_path: Path, editable_options: PrepareOptions) -> Write:
    """A profile file; by default that of the stream."""

    def write(lam: float = 1.0, spread: str | None = None, **prepare: Any) -> str:
        options = {**editable_options.model_dump(mode="json"), **prepare}
        path = tmp_path / f"profile-{lam}-{spread}-{'-'.join(map(str, prepare.values()))}.json".replace(" ", "")
        path.write_text(json.dumps({"prepare": options, "lam": lam, "origin": "test"} | ({"spread": spread} if spread else {})))
        return str(path)

    return write


@pytest.fixture
def place(desk: Any) -> Callable[[str], str]:
    """A profile for `adopt`, stored; its digest."""

    def place(profile: str) -> str:
        from errata.settings import load_settings
        from tasks.placing import place_solve

        return place_solve(load_settings(stream="main"), desk.open(), profile)

    return place


@pytest.fixture
def broaden(desk: Any, write_profile: Write, errata: Errata, sentences: Any) -> Callable[[], None]:
    """Carry the stream to two layers."""

    def broaden() -> None:
        corpus = Path(write_profile()).parent / "corpus.txt"
        corpus.write_text("\n".join(sentences))
        ran = errata("rebase", "main", "--profile", write_profile(layers=[0, 1]), "--corpus", str(corpus), "--yes")
        assert ran.code == 0, ran.err + ran.out

    return broaden


def adopt(profile: str, **options: Any) -> Any:
    from flows.adopt import adopt

    return adopt("main", profile, **options)


def check(desk: Any) -> Any:
    """The log, replayed, is what is stored."""
    from flows.replay import rebuild

    report = rebuild("main", check=True)
    assert report.sound and not report.unverified, report.findings
    return report


def read_weights(desk: Any, seq: int) -> Mapping[str, Any]:
    from errata.editors.kinds import load_artifact

    (digest,) = desk.read_manifest(seq).artifacts
    return load_artifact(desk.open().objects.get(digest), desk.open().objects.get).deltas


def test_the_same_pairs_are_solved_otherwise_and_history_goes_on(
    desk: Any,
    make_edit: Make,
    write_profile: Write,
    place: Callable[[str], str],
    prepared: list[str],
    ask: Callable[[Edit], str],
    errata: Errata,
    tmp_path: Path,
) -> None:
    desk.submit("monday", make_edit(0), make_edit(1, answer=1), make_edit(2, answer=2))
    desk.apply()
    desk.withdraw(make_edit(2).model_copy(update={"target_new": "Oslo"}).edit_id)
    before, facts, prior = desk.open().head, desk.live(), desk.read_manifest(2)
    digest = place(write_profile(lam=2.0))
    prepared.clear()
    tried = adopt(digest, dry_run=True)
    assert (tried.decision, tried.commit, desk.open().head) == ("accept", None, before)
    summary = adopt(digest)
    assert (summary.decision, summary.commit, summary.live, summary.summed) == ("accept", 3, 2, False), summary.reasons
    assert prepared == [] and summary.metrics["efficacy"] == summary.metrics["retention"] == 1.0
    stream = desk.open()
    commit, manifest = stream.log.read(3), desk.read_manifest(3)
    assert isinstance(commit, CalibrationCommit) and (commit.of, commit.live, commit.pairs) == (2, None, ())
    assert (stream.head.base, stream.head.profile, stream.head.champion) == (before.base, digest, 3)
    assert (manifest.base, manifest.profile) == (before.base, digest)
    assert manifest.recipe != prior.recipe and manifest.artifacts != prior.artifacts
    assert (manifest.layers[0].state.operations, manifest.layers[0].state.pairs_since) == (prior.layers[0].state.operations, ())
    assert (desk.live(), ask(make_edit(1, answer=1))) == (facts, "Rome")
    assert desk.versions()[3].number == desk.open_registry().champion("main").number
    check(desk)
    with pytest.raises(InputError, match="expected another profile"):
        adopt(digest)

    # Batches, withdrawals and compactions go on there; the sums are those that would have been under it all along.
    desk.submit("tuesday", make_edit(3))
    assert desk.apply()[0].decision == "accept"
    assert desk.withdraw(make_edit(3).edit_id).measured.exactness.relative < 1e-8
    from flows.replay import compact

    assert compact("main").decision == "accept"
    check(desk)

    # Back across it, and forth again, and on from there.
    desk.roll_back(2)
    assert (desk.open().head.profile, desk.live(), desk.read_manifest(7)) == (before.profile, facts, prior)
    check(desk)
    desk.submit("wednesday", make_edit(4))
    assert desk.apply()[0].decision == "accept"
    desk.roll_back(3)
    assert (desk.open().head.profile, desk.read_manifest(9)) == (digest, manifest)
    desk.submit("thursday", make_edit(5))
    assert desk.apply()[0].decision == "accept"
    assert ask(make_edit(0)) == "Paris"
    check(desk)
    assert errata("rebuild", "--to", "3").code == 0

    # People read of it; it travels, is collected around, and survives an erasure.
    assert "calibration" in errata("log").out and "calibration" in errata("show", "3").out
    assert errata("gc", "--dry-run").code == 0
    assert errata("bundle", "--to", str(tmp_path / "main.tar")).code == 0
    assert errata("unbundle", str(tmp_path / "main.tar"), "--root", str(tmp_path / "elsewhere")).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_ROOT", str(tmp_path / "elsewhere"))
        assert errata("rebuild", "--check").code == 0
    gone = make_edit(2).model_copy(update={"target_new": "Oslo"}).edit_id
    assert errata("erase", gone, "--yes").code == 0
    assert errata("rebuild", "--check").code == 0
    assert errata("export", "3", "--to", str(tmp_path / "model")).code == 0


def test_what_the_weights_are_is_what_the_new_profile_says(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str]
) -> None:
    """A stream that was under it from the beginning has the same weights, and another history."""
    import torch

    desk.submit("monday", make_edit(0), make_edit(1), make_edit(2))
    desk.apply()
    digest = place(write_profile(lam=4.0))
    adopt(digest)
    from errata.settings import load_settings
    from tasks._session import load_model

    stream = desk.open()
    editor = load_model(load_settings(stream="main"), stream).editor
    from errata.candidates import read_pairs
    from errata.manifests import PairRef

    refs = [PairRef(pairs=row.pairs or "", row=row.row or 0) for row in stream.index.find_rows("live")]
    wanted = editor.solve(editor.merge(editor.empty_state(), read_pairs(stream.objects, refs), None))
    assert wanted is not None
    for name, delta in read_weights(desk, 2).items():
        assert torch.allclose(delta, wanted.deltas[name], rtol=1e-6)
        assert not torch.allclose(delta, read_weights(desk, 1)[name], rtol=1e-2)


def test_sums_that_cannot_be_refreshed_are_summed_anew(
    desk: Any,
    make_edit: Make,
    write_profile: Write,
    place: Callable[[str], str],
    broaden: Callable[[], None],
    prepared: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("errata.editors.d4s.state._FEW", 96)  # two pairs; more are sums
    desk.submit("monday", *(make_edit(person) for person in range(4)))
    desk.apply()
    broaden()
    prepared.clear()
    held = len(desk.live())
    assert held > 2
    summary = adopt(place(write_profile(spread="refresh", layers=[0, 1])))
    assert (summary.decision, summary.summed, prepared) == ("accept", True, []), summary.reasons
    commit = desk.open().log.read(3)
    assert isinstance(commit, CalibrationCommit) and commit.live is not None
    assert desk.read_manifest(3).layers[0].state.operations == 0
    refreshed = read_weights(desk, 3)
    desk.submit("tuesday", make_edit(4))
    desk.apply()
    check(desk)
    # From sums with cross moments anything can be solved as they are.
    desk.roll_back(3)
    back = adopt(place(write_profile(spread="even", layers=[0, 1])))
    assert (back.decision, back.summed, back.commit) == ("accept", False, 6)
    upper = "transformer.h.1.mlp.c_proj.weight"
    even, first = read_weights(desk, 6)[upper], read_weights(desk, 2)[upper]
    assert float((even - first).norm() / first.norm()) < 1e-6
    assert float((even - refreshed[upper]).norm() / even.norm()) > 1e-4
    check(desk)
    desk.roll_back(4)
    assert len(desk.live()) == held + 1
    check(desk)

    # What is lost of it is made again.
    stream, manifest = desk.open(), desk.read_manifest(3)
    lost = [commit.live, commit.manifest, manifest.layers[0].state.snapshot, manifest.layers[0].artifact]
    lost += [desk.open().log.read(6).manifest, desk.read_manifest(6).layers[0].state.snapshot]
    for digest in lost:
        stream.storage.delete(stream.key(f"objects/{digest}"))
    from flows.replay import rebuild

    report = rebuild("main")
    assert {finding.state for finding in report.findings} == {"mended"} and {finding.digest for finding in report.findings} == set(lost)
    check(desk)


def test_a_profile_that_ruins_the_stream_is_refused(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, errata: Errata
) -> None:
    for name, value in {"MIN_RETENTION": "0.9", "N_MIN": "3"}.items():
        monkeypatch.setenv(f"ERRATA_GATE__{name}", value)
    desk.submit("monday", *(make_edit(person) for person in range(4)))
    desk.apply()
    head, weak = desk.open().head, write_profile(lam=1e6)
    assert errata("adopt", "main", "--profile", weak, "--dry-run").code == 3
    assert desk.open().head == head
    ran = errata("adopt", "main", "--profile", weak, "--json")
    assert (ran.code, ran.json["decision"], ran.json["commit"]) == (3, "reject", 2)
    assert "Retention is 0.000" in " ".join(ran.json["reasons"])
    after = desk.open()
    assert after.log.read(2).kind == "rejection"
    assert (after.head.manifest, after.head.profile, after.head.champion) == (head.manifest, head.profile, 1)
    check(desk)
    shown = errata("adopt", "main", "--profile", weak)
    assert shown.code == 3 and "refused" in shown.out


def test_under_manual_approval_it_waits(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, errata: Errata
) -> None:
    desk.submit("monday", make_edit(0), make_edit(1))
    desk.apply()
    first = desk.open().head
    monkeypatch.setenv("ERRATA_POLICY__PROMOTE", "manual")
    digest = place(write_profile(lam=2.0))
    assert adopt(digest).decision == "accept"
    head = desk.open().head
    assert (head.champion, head.challenger, head.profile) == (1, 2, digest)
    desk.submit("tuesday", make_edit(2))
    assert desk.apply()[0].decision == "accept"
    assert desk.read_manifest(3).profile == digest, "batches build on what waits"
    assert errata("refuse", "2", "--yes").code == 0
    head = desk.open().head
    assert (head.profile, head.champion) == (first.profile, head.seq)
    check(desk)
    assert adopt(digest).decision == "accept"
    assert errata("approve", "head", "--yes").code == 0
    assert desk.open_registry().champion("main").commit == desk.open().head.champion
    check(desk)


def test_a_batch_meanwhile_and_a_run_that_died_change_nothing(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.adopt

    desk.submit("monday", make_edit(0))
    desk.apply()
    digest, real, late = place(write_profile(lam=2.0)), flows.adopt.commit_adoption, [make_edit(1)]

    def commit(*values: Any) -> Any:
        if late:
            desk.submit("meanwhile", late.pop())
            assert desk.apply()[0].decision == "accept"
        return real(*values)

    def die(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(flows.adopt, "judge_adoption", die)
        with pytest.raises(RuntimeError, match="killed"):
            adopt(digest)
    assert desk.open().head.seq == 1
    with monkeypatch.context() as patch:
        patch.setattr(flows.adopt, "commit_adoption", commit)
        patch.setattr(flows.adopt, "project_versions", die)
        with pytest.raises(RuntimeError, match="killed"):
            adopt(digest)
    assert (desk.open().head.seq, desk.open().log.read(3).kind, len(desk.live())) == (3, "calibration", 2)
    assert 3 not in desk.versions()
    with pytest.raises(InputError, match="expected another profile"):
        adopt(digest)
    assert desk.open_registry().champion("main").commit == 3
    check(desk)


def test_profiles_are_named_by_file_or_digest(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str], errata: Errata
) -> None:
    empty = errata("adopt", "main", "--profile", write_profile(lam=3.0))
    assert empty.code == 0, "a stream without edits only changes its profile"
    desk.submit("monday", make_edit(0))
    desk.apply()
    head = desk.open().head
    digest = place(write_profile(lam=2.0))
    assert errata("adopt", "main", "--profile", digest[:10]).code == 0
    assert desk.open().head.profile == digest
    told = {
        "0000": "expected a file, or the digest of one profile of base",
        "nowhere.json": "expected a readable profile, or the digest of a stored one",
        write_profile(lam=2.0, steps=20): "expected the prepare part that the stream's pairs were made with, found another (steps)",
        write_profile(lam=2.0, keying="cascade"): "found another (keying)",
        write_profile(lam=-1.0): "lam",
        write_profile(spread="sideways"): "spread",
    }
    for profile, said in told.items():
        ran = errata("adopt", "main", "--profile", profile)
        assert (ran.code, said in " ".join(ran.err.split())) == (2, True), ran.err
    solved = errata("rebase", "main", "--profile", write_profile(lam=5.0), "--yes")
    assert (solved.code, "`errata adopt main --profile" in " ".join(solved.err.split())) == (2, True)
    assert errata("rebase", "main", "--profile", head.profile[:12], "--yes").code == 2
    made = errata("init", "-s", "second", "--base", str(desk.root / "shared" / "bases" / head.base), "--profile", digest[:12])
    assert made.code == 0, made.err
    from registry.stream import open_stream

    assert open_stream(str(desk.root), "second", desk.cache).head.profile == digest
    assert errata("merge", "second", "main", "--yes").code == 0


def test_sums_that_leave_out_a_live_pair_do_not_land(
    desk: Any, make_edit: Make, write_profile: Write, place: Callable[[str], str], broaden: Callable[[], None], monkeypatch: Any
) -> None:
    import tasks.adopting

    monkeypatch.setattr("errata.editors.d4s.state._FEW", 96)
    desk.submit("monday", *(make_edit(person) for person in range(4)))
    desk.apply()
    broaden()
    digest, real = place(write_profile(spread="refresh", layers=[0, 1])), tasks.adopting.spell_live
    monkeypatch.setattr(tasks.adopting, "spell_live", lambda refs: real(refs[1:]))
    with pytest.raises(StorageError, match=f"expected the {len(desk.live())} pairs of the live edits"):
        adopt(digest)
    assert desk.open().head.seq == 2
