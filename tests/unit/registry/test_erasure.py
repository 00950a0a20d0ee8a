"""What an erasure deletes and what stands in for it; a process that dies in the middle of it; who is told what."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from errata.edits import Edit, Submission
from errata.errors import ErasedError, InputError, StorageError
from errata.precedence import Judge
from registry.commit import commit
from registry.erased import announce, finish_erasures, read_erasures
from registry.erasure import Wanted, choose_erasable, draft_tombstones, find_remains, plan_erasure, survey_log
from registry.events import ErasureCommit
from registry.storage.memory import MemoryStorage
from registry.stream import Stream, open_stream

Make = Callable[..., Any]
COMMON = {"actor": "ann", "host": "here", "versions": {"errata": "0.1.0"}, "time": "2026-11-02T00:00:00+00:00"}
NAME = "Agatha Quill"
STATUSES = ("live", "replaced", "superseded", "stale", "quarantined", "rejected", "dropped", "withdrawn", "reverted", "erased")


class Stopped(Exception):
    """The process ends here."""


class Mortal(MemoryStorage):
    """A storage that stops at its n-th change from now on, where n is set."""

    left: int | None = None

    def _count(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Stopped

    def create(self, key: str, data: bytes) -> None:
        self._count()
        super().create(key, data)

    def delete(self, key: str) -> None:
        self._count()
        super().delete(key)


def find_lines(data: bytes, wanted: Wanted) -> set[int]:
    return {number for number, line in enumerate(data.split(b"\n"), start=1) if wanted.quotes(line.decode())}


def fill(clerk: Any, edit: Make) -> Stream:
    """`gone` is accepted, replaced by itself, quarantined once more and superseded; what is beside it stays."""
    stream: Stream = clerk.stream
    gone = [edit(NAME, target, name="gone") for target in ("Oslo", "Rome", "Lima")]
    for records in (
        [(gone[0], "live"), (edit("Bo", name="b"), "live"), (edit(NAME, "Oslo", name="other"), "duplicate")],
        [(gone[1], "live")],
        [(gone[2], "quarantined"), (edit("Cy", name="c"), "live")],
    ):
        commit(stream, clerk.draft(records), stream.head)
    commit(stream, clerk.draft_withdrawal([stream.resolve_edit("gone@2")]), stream.head)
    stream.checkpoints.write(stream.index)
    stream.storage.create(stream.key("inbox/w.jsonl"), gone[0].model_dump_json().encode() + b"\n{}\n")
    stream.storage.create(stream.key("prepared/p/x.json"), json.dumps([["gone 123", 0.5]]).encode())
    stream.objects.put(json.dumps({"additions": [{"row": {"occurrence": "gone@9", "edit": {"subject": NAME}}}], "rows": []}).encode())
    return stream


def erase(stream: Stream, *names: str) -> None:
    """As the task does, with pairs that are text."""
    head = stream.head
    survey = survey_log(stream, choose_erasable(stream, names))
    record = plan_erasure(stream, survey, [], lambda data, ids: None, find_lines)
    digest = stream.objects.put_json(record.model_dump(mode="json"))
    rows = draft_tombstones(stream, survey.wanted.ids, "a request")
    outcomes = stream.objects.put_rows(row.model_dump(mode="json", exclude_none=True) for row in rows)
    manifest = stream.objects.put_json({"format": 1, "after": head.seq + 1})
    draft = ErasureCommit(seq=record.seq, parent=head.digest, erased=digest, outcomes=outcomes, manifest=manifest, promoted=True, **COMMON)
    announce(stream.storage, stream.key(""), record.seq, digest)
    commit(stream, draft, head)
    finish_erasures(stream.storage, stream.key(""))


def read_tables(stream: Stream) -> tuple[list[Any], dict[str, int]]:
    return list(stream.index.find_rows(*STATUSES)), stream.index.counts()


def test_tombstones_stay_and_nothing_else(start: Make, edit: Make) -> None:
    stream = fill(start(), edit)
    untouched = stream.read_record(stream.resolve_edit("b"))
    assert find_remains(stream, [NAME])
    erase(stream, "gone")
    assert find_remains(stream, [NAME]) == []
    rows, counts = read_tables(stream)
    tombs = [row for row in rows if row.id == "gone"]
    assert [row.status for row in tombs] == ["erased"] * 3 and counts["erased"] == 3
    assert {(row.slot, row.content, row.subject, row.pairs, row.origin) for row in tombs} == {("", "", "", None, "")}
    assert "a request" in (tombs[0].reason or "")
    assert stream.read_record(tombs[0]).erased and stream.read_record(tombs[0]).edit.edit_id == "gone"
    assert stream.read_record(stream.resolve_edit("b")) == untouched
    assert not list(stream.storage.list(stream.key("prepared/"))) and not list(stream.storage.list(stream.key("checkpoints/")))
    waiting = [stream.storage.read(entry.key) for entry in stream.storage.list(stream.key("inbox/"))]
    assert waiting == [b"\n{}\n"], "other lines keep their numbers"
    # The order and the checkpoint's segments have no stand-in: nobody may read them any more.
    bare = next(gone for erasure in read_erasures(stream.storage, stream.key("")) for gone in erasure.record.objects if gone.by is None)
    with pytest.raises(ErasedError, match="erased by commit 5"):
        stream.objects.get(bare.digest)


def test_a_fold_from_the_beginning_gives_the_same_tables(start: Make, edit: Make) -> None:
    stream = fill(start(), edit)
    erase(stream, "gone")
    assert read_tables(open_stream(stream.storage, "main")) == read_tables(stream)
    stream.checkpoints.write(stream.index)
    assert read_tables(open_stream(stream.storage, "main")) == read_tables(stream)
    with pytest.raises(InputError, match="it is erased"):
        from registry.undoing import choose_live

        choose_live(stream, ["gone"])


def test_whoever_opens_the_stream_finishes_what_was_interrupted(start: Make, edit: Make) -> None:
    """Stopped before every change that an erasure makes to the storage."""
    for at in range(100):
        storage = Mortal()
        stream = fill(start(storage), edit)
        storage.left = at
        try:
            erase(stream, "gone")
            done = True
        except (Stopped, StorageError):
            done = False
        storage.left = None
        again = open_stream(storage, "main")
        if again.head.seq == 4:
            assert again.read_record(again.resolve_edit("b")).edit.subject == "Bo"
            assert not any(row.erased for seq in range(5) for row in again.read_batch(again.log.read(seq))), (
                "nothing is gone before the commit"
            )
            erase(again, "gone")
        assert find_remains(again, [NAME]) == []
        assert [erasure.done for erasure in read_erasures(storage, again.key("")) if erasure.record.seq == 5].count(True) == 1
        assert {row.status for row in again.index.find_occurrences("gone")} == {"erased"}
        if done:
            assert at > 15
            return
    pytest.fail("expected an end of the changes")


def test_an_announced_erasure_that_lost_against_another_commit_is_void(start: Make, edit: Make) -> None:
    clerk = start()
    stream = fill(clerk, edit)
    record = plan_erasure(stream, survey_log(stream, ["gone"]), [], lambda data, ids: None, find_lines)
    announce(stream.storage, stream.key(""), 5, stream.objects.put_json(record.model_dump(mode="json")))
    commit(stream, clerk.draft([(edit("Di", name="d"), "live")]), stream.head)
    again = open_stream(stream.storage, "main")
    assert not list(read_erasures(stream.storage, stream.key("")))
    assert again.read_record(again.resolve_edit("gone")).edit.subject == NAME


def test_live_edits_and_the_same_fact_under_another_name_are_refused(start: Make, edit: Make) -> None:
    clerk = start()
    stream = fill(clerk, edit)
    with pytest.raises(InputError, match="errata withdraw b"):
        choose_erasable(stream, ["b", "gone"])
    with pytest.raises(InputError, match="no|none"):
        choose_erasable(stream, ["nobody"])
    commit(stream, clerk.draft([(edit(NAME, "Rome", name="twin"), "quarantined")]), stream.head)
    with pytest.raises(InputError, match="twin: name them, too"):
        survey_log(stream, ["gone"])
    erase(stream, "gone", "twin")
    assert find_remains(stream, [NAME]) == []


@pytest.mark.parametrize(
    ("sent", "again", "outcome"),
    [(None, False, "withheld"), ("2026-11-01", False, "withheld"), ("2026-11-03", False, "proposed"), (None, True, "proposed")],
)
def test_what_is_sent_again_is_treated_as_withdrawn(start: Make, edit: Make, sent: str | None, again: bool, outcome: str) -> None:
    stream = fill(start(), edit)
    erase(stream, "gone")
    content = edit(NAME, "Oslo", name="gone").model_dump() | {"submitted_at": f"{sent}T00:00:00+00:00" if sent else None}
    verdict = Judge(stream.index, "s").judge(Submission(edit=Edit.model_validate(content), again=again), 0)
    assert verdict.outcome == outcome
