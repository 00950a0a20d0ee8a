"""What waits in the inbox, in which order it is taken, and what happens to a file that every run fails over."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit
from errata.errors import StorageError

pytestmark = pytest.mark.usefixtures("prefect_server")

Make = Callable[..., Edit]


def wait(desk: Any, name: str, *rows: Any, age: float = 0.0) -> None:
    """Leave a file that arrived so many seconds ago."""
    desk.submit(name, *rows)
    path = Path(desk.root / f"streams/main/inbox/{name}.jsonl")
    moment = path.stat().st_mtime - age
    os.utime(path, (moment, moment))


def states(errata: Callable[..., Any]) -> dict[str, str]:
    return {row["file"]: row["state"] for row in errata("inbox", "--json").json}


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, make_edit: Make) -> Edit:
    """An edit that no run survives."""
    from errata.editors.d4s.editor import D4S

    edit, real = make_edit(7, id="poison"), D4S.prepare

    def prepare(self: Any, base: Any, edits: Any, *rest: Any) -> Any:
        if any(item.edit_id == edit.edit_id for item in edits):
            raise RuntimeError("out of memory")
        return real(self, base, edits, *rest)

    monkeypatch.setattr(D4S, "prepare", prepare)
    return edit


def test_urgent_files_go_first_and_are_not_undone_by_what_they_overtook(
    desk: Any, make_edit: Make, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_APPLY__BATCH_SIZE", "2")
    wait(desk, "old", make_edit(0, answer=1), make_edit(1), age=60)
    wait(desk, "older", make_edit(2), make_edit(3), age=120)
    line = make_edit(0, answer=2).model_dump_json(exclude_none=True).encode() + b"\n"
    assert errata("submit", "-", "--urgent", stdin=line).code == 0
    (urgent,) = [name for name in desk.waiting() if name.endswith(".urgent.jsonl")]
    assert desk.waiting() == [urgent, "older.jsonl", "old.jsonl"]
    assert list(states(errata).items()) == [(urgent, "urgent"), ("older.jsonl", "waits"), ("old.jsonl", "waits")]
    batches = desk.apply()
    assert [batch.outcomes for batch in batches] == [{"live": 2}, {"live": 2, "stale": 1}]
    assert desk.live()[make_edit(0, answer=2).edit_id] == "Oslo" and make_edit(0, answer=1).edit_id not in desk.live()
    # What comes later replaces it as it replaces anything.
    wait(desk, "new", make_edit(0, answer=3), age=-60)
    assert desk.apply()[0].outcomes == {"live": 1, "replaced": 1}


def test_a_file_that_every_run_fails_over_is_set_aside_and_the_others_go_on(
    desk: Any, make_edit: Make, poison: Edit, errata: Callable[..., Any]
) -> None:
    wait(desk, "bad", make_edit(0), poison, age=60)
    wait(desk, "good", make_edit(1))
    with pytest.raises(RuntimeError, match="out of memory"):
        desk.apply()
    assert states(errata) == {"bad.jsonl": "failed 1 times", "good.jsonl": "failed 1 times"}
    wait(desk, "later", make_edit(2))
    with pytest.raises(RuntimeError):
        desk.apply()
    assert desk.live() == {make_edit(2).edit_id: "Paris"}, "what nothing is known against goes first, the others one by one"
    assert states(errata) == {"bad.jsonl": "failed 2 times", "good.jsonl": "failed 1 times"}
    with pytest.raises(RuntimeError):
        desk.apply()
    (applied,) = desk.apply()
    assert applied.outcomes == {"live": 1} and set(desk.live()) == {make_edit(1).edit_id, make_edit(2).edit_id}
    shown = errata("inbox", "--json").json
    assert [(row["file"], row["state"], row["why"]) for row in shown] == [("bad.jsonl", "set aside", "RuntimeError: out of memory")]
    assert "out of memory" in errata("inbox").out and desk.apply() == []
    kept = desk.open().storage.read("streams/main/aside/bad.jsonl")
    assert poison.subject.encode() in kept, "as it came"
    assert errata("inbox", "--prune", "--yes").code == 0
    assert "nothing waits" in errata("inbox").out
    assert not list(desk.open().storage.list("streams/main/setbacks/"))


def test_two_files_of_one_name_are_both_kept_aside(desk: Any) -> None:
    from registry.inbox import read_waiting
    from registry.setbacks import list_aside, set_aside

    stream = desk.open()
    for data in (b"{}\n", b"[]\n"):
        stream.storage.create(stream.key("inbox/bad.jsonl"), data)
        for file in read_waiting(stream):
            set_aside(stream, file, ["no"])
    kept = {
        entry.key.rpartition("/")[2]: stream.storage.read(entry.key) for entry, report in list_aside(stream) if report["reasons"] == ["no"]
    }
    assert kept == {"bad.jsonl": b"{}\n", "bad-2.jsonl": b"[]\n"} and desk.waiting() == []


def test_a_batch_that_another_writer_has_written_meanwhile_is_ordered_again(
    desk: Any, make_edit: Make, monkeypatch: pytest.MonkeyPatch, errata: Callable[..., Any]
) -> None:
    """What is live since is neither prepared nor refused: the order does not fit any more."""
    import flows.edit

    desk.submit("monday", make_edit(0), make_edit(1))
    real, others = flows.edit.prepare_pairs, [True]

    def prepare(stream: str, order: str) -> Any:
        if others and others.pop():
            assert desk.apply()[0].outcomes == {"live": 2}
        return real(stream, order)

    monkeypatch.setattr(flows.edit, "prepare_pairs", prepare)
    assert desk.apply() == [], "it is all done"
    assert len(desk.live()) == 2 and desk.open().head.seq == 1
    assert not list(desk.open().storage.list("streams/main/setbacks/"))


def test_a_fault_of_the_storage_is_nobody_s_fault(
    desk: Any, make_edit: Make, errata: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import flows.edit

    def fail(*_: Any) -> Any:
        raise StorageError("expected the store, found it down")

    desk.submit("monday", make_edit(0))
    desk.submit("tuesday.jsonl", make_edit(1))
    with monkeypatch.context() as patch:
        patch.setattr(flows.edit, "judge_candidate", fail)
        for _ in range(4):
            with pytest.raises(StorageError):
                desk.apply()
    assert set(states(errata).values()) == {"waits"}
    (desk.root / "streams/main/inbox/half.jsonl.part").write_bytes(b"{")
    assert states(errata)["half.jsonl.part"] == "being written"
    assert desk.apply()[0].outcomes == {"live": 2}
