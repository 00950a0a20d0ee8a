"""Rebuilding, exporting and moving a stream, as its user does: with the command, on a real stream."""

import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.edits import Edit
from registry.events import RebuildCommit
from registry.history import open_history
from registry.storage.base import Storage, open_storage
from registry.stream import Stream, open_stream

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Errata = Callable[..., Any]


def damage(stream: Stream, digest: str, *, missing: bool = False) -> bytes:
    """Change a bit of an object, or delete it; what it was."""
    key = stream.key(f"objects/{digest}")
    data = stream.storage.read(key)
    stream.storage.delete(key)
    if not missing:
        stream.storage.create(key, data[:-1] + bytes([data[-1] ^ 1]))
    return data


def list_objects(storage: Storage) -> dict[str, bytes]:
    return {
        entry.key: storage.read(entry.key) for entry in storage.list("streams/") if "/objects/" in entry.key or "/commits/" in entry.key
    }


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `long_desk` keeps its root: making it takes ten seconds."""
    return tmp_path_factory.mktemp("shelf") / "root"


@pytest.fixture
def long_desk(used_desk: Any, shelf: Path, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`used_desk` and five commits more: a snapshot, a withdrawal, a rollback, a batch that replaces, a rejection."""
    if shelf.exists():
        shutil.rmtree(used_desk.root)
        shutil.copytree(shelf, used_desk.root)
        return used_desk
    with monkeypatch.context() as patch:
        patch.setenv("ERRATA_APPLY__SNAPSHOT_EVERY", "2")
        used_desk.submit("wednesday", make_edit(7, id="case-7"), make_edit(8, id="case-8"))
        used_desk.apply()
    used_desk.withdraw("case-7")
    used_desk.roll_back(2)
    used_desk.submit("thursday", make_edit(2, answer=3, id="case-12"), make_edit(9, id="case-9"))
    used_desk.apply()
    used_desk.submit("friday", make_edit(9, id="case-9"))
    used_desk.apply()
    shutil.copytree(used_desk.root, shelf)
    return used_desk


def test_a_stream_agrees_with_its_log(long_desk: Any, errata: Errata) -> None:
    stream = long_desk.open()
    assert [stream.log.read(seq).kind for seq in range(8)] == [
        *("init", "edits", "edits", "edits", "withdrawal", "rollback", "edits", "rejection")
    ]
    before = list_objects(stream.storage)
    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 0, ran.out + ran.err
    report = ran.json
    assert (report["sound"], report["findings"], report["unverified"], report["to"]) == (True, [], [], 7)
    assert report["compared"] == {"bits": 6}, "each accepted commit but the rollback, whose weights are those of its target"
    assert report["recipe"] == long_desk.read_manifest(6).recipe
    assert "all as the log says" in errata("rebuild").out
    assert list_objects(stream.storage) == before
    assert stream.refresh().seq == 7


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(("seq", "what"), [(6, "artifact"), (2, "artifact"), (3, "snapshot"), (6, "change list"), (4, "manifest")])
def test_what_follows_from_the_log_is_mended_in_place(long_desk: Any, errata: Errata, seq: int, what: str, missing: bool) -> None:
    stream, layer = long_desk.open(), long_desk.read_manifest(seq).layers[0]
    names = {"artifact": layer.artifact, "snapshot": layer.state.snapshot, "manifest": stream.log.read(seq).manifest}
    digest = names.get(what) or layer.state.pairs_since[-1]
    whole, head = damage(stream, digest, missing=missing), stream.head
    ran = errata("rebuild", "--check")
    assert ran.code == 1
    assert what in ran.out and "mendable" in ran.out and ("missing" if missing else "damaged") in ran.out
    ran = errata("rebuild", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert [(item["commit"], item["what"], item["state"]) for item in ran.json["findings"]] == [(seq, what, "mended")]
    assert stream.objects.get(digest) == whole
    assert errata("rebuild", "--check").code == 0
    assert stream.refresh() == head, "no commit was needed"


def test_only_up_to_a_commit(long_desk: Any, errata: Errata) -> None:
    damage(long_desk.open(), long_desk.read_manifest(6).layers[0].artifact)
    for ref, seq in (("5", 5), ("v1", 1), ("head~2", 5)):
        ran = errata("rebuild", "--check", "--to", ref, "--json")
        assert (ran.code, ran.json["to"]) == (0, seq)
    assert errata("rebuild", "--check", "--to", "6").code == 1
    for ref in ("8", "v9", "monday", ""):
        ran = errata("rebuild", "--to", ref)
        assert ran.code == 2 and "expected" in ran.err


def test_damaged_pairs_are_named_and_nothing_hides_it(long_desk: Any, errata: Errata, make_edit: Make) -> None:
    stream = long_desk.open()
    (pairs,) = stream.log.read(2).pairs
    damage(stream, pairs)
    before = list_objects(stream.storage)
    for words in (("rebuild", "--check"), ("rebuild",)):
        ran = errata(*words, "--json")
        assert ran.code == 1
        (lost,) = ran.json["findings"]
        assert (lost["commit"], lost["what"], lost["state"], lost["digest"]) == (2, "pairs", "lost", pairs)
        assert lost["edits"] == ["case-3@2", f"{make_edit(4).edit_id}@2", f"{make_edit(5).edit_id}@2"]
        assert ran.json["unverified"] == [2, 3, 5, 6], "the snapshot of 3 is whole, so that 4 can be compared"
    assert "case-3@2" in errata("rebuild", "--check").out
    assert list_objects(stream.storage) == before


@pytest.mark.parametrize("what", ["batch", "outcomes", "report", "file"])
def test_other_losses_say_what_is_lost(long_desk: Any, errata: Errata, what: str) -> None:
    stream = long_desk.open()
    commit = stream.log.read(2)
    digest = commit.files[0].digest if what == "file" else getattr(commit, what)
    damage(stream, digest, missing=True)
    shutil.rmtree(long_desk.cache)
    ran = errata("rebuild", "--json")
    assert ran.code == 1
    (lost,) = ran.json["findings"]
    assert (lost["commit"], lost["what"], lost["state"]) == (2, what, "lost")
    assert ("case-3@2" in lost["edits"]) is (what in ("batch", "outcomes"))
    # Weights need outcomes and pairs only.
    assert (ran.json["unverified"] == []) is (what != "outcomes")


def test_a_broken_log_is_replayed_up_to_the_break(long_desk: Any, errata: Errata) -> None:
    storage = long_desk.open().storage
    data = storage.read("streams/main/commits/00000004.json")
    storage.delete("streams/main/commits/00000004.json")
    shutil.rmtree(long_desk.cache)
    ran = errata("rebuild", "--check", "--json")
    assert (ran.code, ran.json["to"]) == (1, 3)
    (lost,) = ran.json["findings"]
    assert (lost["commit"], lost["what"], lost["state"]) == (4, "commit", "lost") and "3 later ones" in lost["detail"]
    storage.create("streams/main/commits/00000004.json", data[:-20])
    assert errata("rebuild", "--check", "--json").json["findings"][0]["commit"] == 4
    storage.delete("streams/main/commits/00000000.json")
    storage.create("streams/main/commits/00000000.json", b"{}")
    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 1 and ran.json["findings"][0]["commit"] == 0


def test_on_another_machine_a_rebuild_commit_points_at_the_new_objects(
    used_desk: Any, errata: Errata, make_edit: Make, ask: Callable[[Edit], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from errata.editors.d4s.editor import D4S

    solve = D4S._solve_layers
    with monkeypatch.context() as patch:
        patch.setattr(D4S, "_solve_layers", lambda self, state: ((name, delta * (1 + 3e-9)) for name, delta in solve(self, state)))
        used_desk.submit("wednesday", make_edit(7, id="case-7"))
        used_desk.apply()
    ran = errata("rebuild", "--check", "--json")
    assert (ran.code, ran.json["compared"]) == (0, {"bits": 3, "float64": 1})
    stream = used_desk.open()
    artifact = used_desk.read_manifest(3).layers[0].artifact
    damage(stream, artifact)
    ran = errata("rebuild", "--check", "--json")
    assert ran.code == 1 and [item["state"] for item in ran.json["findings"]] == ["unequal"]
    ran = errata("rebuild", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert [item["state"] for item in ran.json["findings"]] == ["replaced"] and ran.json["commit"] == 4
    commit = used_desk.open().log.read(4)
    assert isinstance(commit, RebuildCommit) and commit.of == 3
    assert used_desk.open().head.champion == 4
    assert used_desk.read_manifest(4).recipe == used_desk.read_manifest(3).recipe
    assert used_desk.open_registry().champion("main").commit == 4
    assert ask(make_edit(7)) == make_edit(7).target_new
    assert errata("rebuild", "--check").code == 0, "what was replaced is not missed"
    assert errata("rebuild", "--json").json["commit"] is None
    # The next batch, a withdrawal and a way back stand on it.
    used_desk.submit("thursday", make_edit(8, id="case-8"))
    assert [summary.commit for summary in used_desk.apply()] == [5]
    used_desk.withdraw("case-7")
    used_desk.roll_back(4)
    assert errata("rebuild", "--check").code == 0
    assert "rebuild" in errata("log").out and errata("show", "4").code == 0


def test_an_interrupted_rebuild_leaves_nothing_half(long_desk: Any, errata: Errata, monkeypatch: pytest.MonkeyPatch) -> None:
    from errata.replay import Replay

    stream = long_desk.open()
    digests = [long_desk.read_manifest(seq).layers[0].artifact for seq in (1, 6)]
    whole = [damage(stream, digest) for digest in digests]
    follow = Replay.follow

    def stop(self: Replay, entry: Any, **options: Any) -> Any:
        if entry.seq == 3:
            raise KeyboardInterrupt
        return follow(self, entry, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Replay, "follow", stop)
        assert errata("rebuild").code == 130
    assert stream.objects.get(digests[0]) == whole[0]
    assert errata("rebuild").code == 0
    assert [stream.objects.get(digest) for digest in digests] == whole


def read_logits(model: Any, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.stack([model(input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1] for prompt in prompts])


@pytest.mark.parametrize(("ref", "seq"), [("head", 2), ("v1", 1), ("0", 0)])
def test_an_exported_version_is_an_ordinary_model(
    used_desk: Any, errata: Errata, make_edit: Make, tmp_path: Path, ref: str, seq: int
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from errata.candidates import load_artifacts
    from errata.modeling.patch import attach
    from tasks._session import load_model, open_named

    folder = tmp_path / "exported" / "model"
    ran = errata("export", ref, "--to", str(folder), "--json")
    assert (ran.code, ran.json) == (0, {"stream": "main", "commit": seq, "folder": str(folder)})
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    settings, stream = open_named("main")
    ours = load_model(settings, stream)
    prompts = [make_edit(person).rewrite_prompt for person in range(6)]
    with attach(ours.base, load_artifacts(stream.objects, used_desk.read_manifest(seq))):
        expected = read_logits(ours.base.model, ours.base.tokenizer, prompts)
    assert torch.equal(read_logits(model, tokenizer, prompts), expected)
    note = json.loads((folder / "errata.json").read_text())
    assert (note["stream"], note["commit"], note["recipe"]) == ("main", seq, used_desk.read_manifest(seq).recipe)
    assert list(folder.parent.iterdir()) == [folder], "nothing temporary is left"


def test_an_export_that_cannot_be_says_why(used_desk: Any, errata: Errata, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for ref, place, said in (("head", "full", "empty folder"), ("head", "full/mine.txt", "file"), ("9", "x", "0 to 2"), ("v9", "x", "v")):
        ran = errata("export", ref, "--to", str(tmp_path / place))
        assert ran.code in (1, 2) and said in ran.err
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine" and not (tmp_path / "x").exists()
    assert errata("export", "head", "--to", str(tmp_path / "empty")).code == 0
    damage(used_desk.open(), used_desk.read_manifest(2).layers[0].artifact)
    ran = errata("export", "head", "--to", str(tmp_path / "y"))
    assert ran.code == 1 and not (tmp_path / "y").exists()


def test_a_stream_moves_to_another_root(
    long_desk: Any, errata: Errata, make_edit: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long_desk.submit("saturday", make_edit(3))
    ran = errata("bundle", "--to", str(tmp_path / "main.tar.gz"))
    assert ran.code == 0 and "1 records that wait" in ran.out
    assert errata("bundle", "--to", str(tmp_path / "main.tar.gz")).code == 2
    assert errata("unbundle", str(tmp_path / "main.tar.gz")).code == 2, "its name is taken here"
    elsewhere = tmp_path / "elsewhere"
    assert errata("unbundle", str(tmp_path / "main.tar.gz"), "--root", str(elsewhere)).code == 0
    head = long_desk.open().head
    assert open_stream(str(elsewhere), "main").head == head
    assert open_stream(str(elsewhere), "main").index.counts() == long_desk.open().index.counts()
    shutil.rmtree(long_desk.root)
    monkeypatch.setenv("ERRATA_ROOT", str(elsewhere))
    ran = errata("rebuild", "--check", "--json")
    assert (ran.code, ran.json["compared"]) == (0, {"bits": 6})
    answers = errata("ask", make_edit(9).rewrite_prompt, "--max-new-tokens", "1", "--json").json
    assert answers[0]["champion"].strip() == make_edit(9).target_new


@pytest.mark.long
def test_a_stream_moves_through_s3(long_desk: Any, errata: Errata, tmp_path: Path, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = f"s3://{s3_bucket}/{uuid.uuid4().hex}"
    assert errata("bundle", "--to", str(tmp_path / "out.tar")).code == 0
    ran = errata("unbundle", str(tmp_path / "out.tar"), "--root", root, "--as", "moved", "--json")
    assert (ran.code, ran.json["stream"]) == (0, "moved")
    monkeypatch.setenv("ERRATA_ROOT", root)
    assert errata("rebuild", "--check", "-s", "moved").code == 0
    moved = open_stream(root, "moved")
    whole = damage(moved, digest := long_desk.read_manifest(6).layers[0].artifact)
    assert errata("rebuild", "--check", "-s", "moved").code == 1
    assert errata("rebuild", "-s", "moved").code == 0
    assert moved.objects.get(digest) == whole
    assert errata("bundle", "-s", "moved", "--to", str(tmp_path / "back.tar")).code == 0
    back = tmp_path / "back"
    assert errata("unbundle", str(tmp_path / "back.tar"), "--root", str(back), "--as", "main").code == 0
    assert open_stream(str(back), "main").head == long_desk.open().head
    assert list_objects(open_storage(str(back))).items() <= list_objects(long_desk.open().storage).items()


def test_a_tampered_bundle_is_refused(used_desk: Any, errata: Errata, tmp_path: Path) -> None:
    assert errata("bundle", "--to", str(tmp_path / "main.tar")).code == 0
    data = (tmp_path / "main.tar").read_bytes()
    pairs = open_history(str(used_desk.root), "main").objects.get(used_desk.open().log.read(2).pairs[0])
    at = data.index(pairs) + len(pairs) - 1
    (tmp_path / "main.tar").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    ran = errata("unbundle", str(tmp_path / "main.tar"), "--root", str(tmp_path / "other"))
    assert ran.code == 1 and "sha256" in ran.err and "nothing was written" in ran.err
    assert not (tmp_path / "other").exists()
    assert errata("unbundle", str(tmp_path / "nothing.tar")).code == 2
    (tmp_path / "text.tar").write_text("no bundle")
    assert errata("unbundle", str(tmp_path / "text.tar"), "--root", str(tmp_path / "other")).code == 2
