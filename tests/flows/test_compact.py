"""Compaction as its user sees it: by command, by itself after a batch, and with history going on around it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import RegistryError
from errata.manifests import Manifest
from registry.events import CompactionCommit

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]
Errata = Callable[..., Any]


def test_the_sums_begin_anew_and_history_goes_on(
    used_desk: Any, make_edit: Make, errata: Errata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, stream = used_desk, used_desk.open()
    head, live = stream.head, desk.live()
    tried = errata("compact", "--dry-run")
    assert tried.code == 0 and "would be summed anew" in tried.out and stream.refresh() == head
    ran = errata("compact", "--json")
    assert ran.code == 0, ran.out + ran.err
    assert ran.json["decision"] == "accept" and ran.json["gap"] <= 1e-8 and ran.json["operations"] >= len(live)
    commit = stream.log.read(seq := ran.json["commit"])
    assert isinstance(commit, CompactionCommit) and (commit.of, commit.actor) == (head.accepted, stream.log.read(head.accepted).actor)
    assert commit.report == stream.log.read(head.accepted).report
    manifest = desk.read_manifest(seq)
    assert manifest.layers[0].state.pairs_since == () and manifest.layers[0].state.operations == 0
    assert manifest.artifacts == desk.read_manifest(head.accepted).artifacts, "few pairs: nothing had been rounded"
    assert desk.versions()[seq].number == desk.open_registry().champion("main").number
    assert desk.live() == live
    again = errata("compact")
    assert again.code == 0 and "nothing to do" in again.out and stream.refresh().seq == seq
    # By itself, once enough has come and gone.
    monkeypatch.setenv("ERRATA_APPLY__REFRESH_EVERY", "2")
    desk.submit("thursday", make_edit(8, id="case-8"))
    desk.apply()
    assert stream.refresh().seq == seq + 1, "one operation: not due"
    desk.withdraw("case-8")
    desk.submit("friday", make_edit(9, id="case-9"))
    assert [batch.commit for batch in desk.apply()] == [seq + 3]
    assert stream.refresh().seq == seq + 4 and stream.log.read(seq + 4).kind == "compaction"
    assert desk.versions()[seq + 4].number == desk.open_registry().champion("main").number
    # Back across both, and what was lost is made again.
    desk.roll_back(head.accepted)
    assert desk.live() == live
    stream.storage.delete(stream.key(f"objects/{commit.live}"))
    stream.storage.delete(stream.key(f"objects/{manifest.layers[0].state.snapshot}"))
    ran = errata("rebuild", "--check", "--json")
    found = {(item["what"], item["state"]) for item in ran.json["findings"]}
    assert (ran.code, found) == (1, {("live list", "mendable"), ("snapshot", "mendable")})
    assert errata("rebuild").code == 0
    assert errata("rebuild", "--check", "--json").json["findings"] == []
    assert errata("bundle", "--to", str(tmp_path / "main.tar")).code == 0
    assert errata("unbundle", str(tmp_path / "main.tar"), "--as", "moved").code == 0
    assert errata("rebuild", "--check", "-s", "moved").code == 0
    assert "compaction" in errata("log").out and errata("show", str(seq)).code == 0


def test_a_compaction_that_cannot_be_never_fails_the_batch(
    used_desk: Any, make_edit: Make, errata: Errata, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = used_desk.open()
    monkeypatch.setenv("ERRATA_APPLY__REFRESH_EVERY", "1")
    with monkeypatch.context() as patch:
        patch.setattr("errata.compaction.measure_gap", lambda *_: 2e-8)
        used_desk.submit("thursday", make_edit(8, id="case-8"))
        assert used_desk.apply()[0].accepted
        ran = errata("compact")
        assert ran.code == 1 and "2.0e-08 apart" in ran.out and "errata rebuild --check" in " ".join(ran.out.split())
    seq = stream.refresh().seq
    assert stream.log.read(seq).kind == "edits"

    def fail(*_: Any) -> None:
        raise RegistryError("no MLflow")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.compacting.compact_stream", fail)
        used_desk.submit("friday", make_edit(9, id="case-9"))
        assert used_desk.apply()[0].accepted
    row = next(iter(stream.index.find_rows("live")))
    key = stream.key(f"objects/{row.pairs}")
    data = stream.storage.read(key)
    stream.storage.delete(key)
    ran = errata("compact")
    assert ran.code == 1 and "errata rebuild --check" in " ".join(ran.out.split())
    stream.storage.create(key, data)
    assert errata("compact").code == 0
    assert isinstance(Manifest.from_bytes(stream.objects.get(stream.refresh().manifest)), Manifest)
    assert stream.log.read(stream.head.seq).kind == "compaction"
