"""Versions that are archived and come back, objects that are collected, and what people are told of both."""

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from registry.storage.base import read_clock

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


def grow_old(desk: Any, days: float) -> None:
    """Everything stored becomes older, by the file system's clock."""
    for path in (desk.root / "streams").rglob("*"):
        if path.is_file():
            moment = path.stat().st_mtime - days * 86_400
            os.utime(path, (moment, moment))


@pytest.fixture
def narrow(desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Four versions, of which the newest is kept."""
    monkeypatch.setenv("ERRATA_KEEP__RECENT", "1")
    monkeypatch.setenv("ERRATA_KEEP__DAILY_DAYS", "0")
    monkeypatch.setenv("ERRATA_APPLY__SNAPSHOT_EVERY", "2")
    for person in range(4):
        desk.submit(str(person), make_edit(person, answer=person))
        desk.apply()
    return desk


def artifact(desk: Any, seq: int) -> str:
    (digest,) = desk.read_manifest(seq).artifacts
    return str(digest)


def test_an_archived_version_loses_its_weights_and_gets_them_back(
    narrow: Any, make_edit: Make, ask: Callable[[Edit], str], errata: Callable[..., Any]
) -> None:
    desk, objects = narrow, narrow.open().objects
    assert "commit 2 is pinned" in errata("pin", "2", "--reason", "audit").out
    weights = {seq: objects.get(artifact(desk, seq)) for seq in range(1, 5)}
    first = errata("gc", "--json").json
    assert (first["archived"], first["deleted"]) == (2, {}), "nothing goes at once"
    grow_old(desk, 2)
    dry = errata("gc", "--dry-run", "--json").json
    done = errata("gc", "--json").json
    assert dry["deleted"] == done["deleted"] and done["deleted"]["archived version"][0] >= 2 and done["hidden"] == 2
    assert [objects.exists(artifact(desk, seq)) for seq in range(1, 5)] == [False, True, False, True]
    versions = desk.versions()
    assert [seq for seq in versions if "errata.archived" in versions[seq].tags] == [3, 1]
    assert "rebuild --stream main --to 1" in versions[1].tags["errata.archived"]
    assert not list((desk.root / "mlartifacts").rglob(f"*{artifact(desk, 1)}*"))

    # Nobody takes it for damage; who wants it back is told how.
    checked = errata("rebuild", "--check")
    assert checked.code == 0 and "2 versions whose weights are given up" in checked.out
    mended = errata("rebuild", "--json")
    assert mended.code == 0 and mended.json["findings"] == [] and not objects.exists(artifact(desk, 1))
    refused = errata("rollback", "1", "--yes")
    assert (refused.code, "found it archived; `errata rebuild --to 1` first" in refused.err) == (2, True)
    assert errata("pin", "3").code == 2
    assert errata("repair").code == 0

    assert errata("rebuild", "--to", "1").code == 0
    assert objects.get(artifact(desk, 1)) == weights[1], "bit for bit"
    version = desk.versions()[1]
    assert "errata.archived" not in version.tags and desk.open_registry().read_artifacts(version) == [weights[1]]
    desk.roll_back(1)
    assert [ask(make_edit(0)), desk.live()] == ["Paris", {make_edit(0).edit_id: "Paris"}]
    desk.submit("next", make_edit(5))
    assert [summary.decision for summary in desk.apply()] == ["accept"]
    assert errata("rebuild", "--check").code == 0


def test_du_says_what_is_there_and_pins_are_taken_back(narrow: Any, errata: Callable[..., Any]) -> None:
    rows = errata("du", "--json").json
    categories = {row["category"] for row in rows}
    assert {
        "pairs",
        "batch",
        "outcomes",
        "file",
        "report",
        "manifest",
        "artifact",
        "change list",
        "archived version",
        "commits",
    } <= categories
    stored = sum(path.stat().st_size for path in (narrow.root / "streams/main/objects").iterdir())
    named = ("commits", "checkpoints", "inbox", "prepared")
    assert sum(row["bytes"] for row in rows if row["category"] not in named) == stored
    assert "newest" in errata("du").out or "champion" in errata("du").out
    assert "nothing is pinned" in errata("pin").out
    errata("pin", "head~1")
    assert [row["commit"] for row in errata("pin", "--json").json] == [3]
    assert errata("unpin", "3").code == 0
    again = errata("unpin", "3")
    assert (again.code, "expected a pinned commit (none), found 3" in again.err) == (2, True)


def test_a_collection_beside_a_run_takes_nothing_from_it(narrow: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a batch's last stage and its commit the garbage is collected; what the run has stored is young."""
    import flows.edit
    from flows.keep import collect_garbage

    commit = flows.edit.commit_batch

    def collect_first(*arguments: Any) -> Any:
        collect_garbage("main")
        return commit(*arguments)

    narrow.submit("late", make_edit(7))
    grow_old(narrow, 3)
    time.sleep(0.01)
    monkeypatch.setattr(flows.edit, "commit_batch", collect_first)
    assert [summary.decision for summary in narrow.apply()] == ["accept"]


@pytest.mark.long
def test_a_stream_on_s3_is_edited_collected_erased_and_restored(
    desk: Any, make_edit: Make, errata: Callable[..., Any], s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import registry.collection
    import tasks.keeping
    from registry.stream import open_stream

    root = f"s3://{s3_bucket}/{uuid.uuid4().hex}"
    assert errata("bundle", "--to", str(tmp_path / "empty.tar")).code == 0
    assert errata("unbundle", str(tmp_path / "empty.tar"), "--root", root).code == 0
    tracking = f"sqlite:///{tmp_path}/m.db"
    for name, value in {"ROOT": root, "KEEP__RECENT": "1", "KEEP__DAILY_DAYS": "0", "MLFLOW__TRACKING_URI": tracking}.items():
        monkeypatch.setenv(f"ERRATA_{name}", value)

    def apply(person: int) -> None:
        assert errata("submit", "-", stdin=(make_edit(person, answer=person).model_dump_json(exclude_none=True) + "\n").encode()).code == 0
        ran = errata("apply", "--json")
        assert ran.code == 0, ran.err

    for person in range(3):
        apply(person)
    assert errata("gc", "--json").json["archived"] == 2
    with monkeypatch.context() as patch:  # no S3 lets one change the age of what it holds
        for module in (registry.collection, tasks.keeping):
            patch.setattr(module, "read_clock", lambda storage: read_clock(storage) + timedelta(days=2))
        done = errata("gc", "--json")
        assert done.code == 0 and done.json["deleted"]["archived version"][0] == 2, done.out + done.err
    assert errata("rebuild", "--check").code == 0
    assert errata("rebuild", "--to", "1").code == 0
    taken = make_edit(1, answer=1)
    assert errata("withdraw", taken.edit_id, "--yes").code == 0
    erased = errata("erase", taken.edit_id, "--yes", "--json")
    assert erased.code == 0 and erased.json["finished"] and erased.json["remains"] == []
    apply(4)
    stream = open_stream(root, "main")
    assert {row.id for row in stream.index.find_rows("live")} == {make_edit(person, answer=person).edit_id for person in (0, 2, 4)}
    subject = taken.subject.encode()
    assert not [entry.key for entry in stream.storage.list("streams/") if subject in stream.storage.read(entry.key)]
    check = errata("rebuild", "--check")
    assert check.code == 0, check.out
