"""Which versions keep their weights, what is garbage, and that no writer falls over a collection."""

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from errata.errors import ConflictError, KeyMissingError, StorageError
from registry.collection import (
    RENEW_AFTER,
    Survey,
    delete_garbage,
    delete_stale,
    find_garbage,
    list_given_up,
    secure_objects,
    survey_stream,
)
from registry.commit import commit
from registry.fold import Head
from registry.history import History
from registry.keeping import Accepted, choose_kept, open_archived, open_pins
from registry.storage.memory import MemoryStorage

Make = Callable[..., Any]
DAY = timedelta(days=1)


def make_head(**fields: Any) -> Head:
    common = {"digest": "", "base": "b", "profile": "p", "editors": (), "manifest": "m", "accepted": 9, "champion": 9, "seq": 9}
    return Head.model_validate({**common, **fields})


def test_who_is_kept_and_why() -> None:
    start = datetime(2026, 11, 1, 12, tzinfo=UTC)
    accepted = [Accepted(seq, start + timedelta(hours=8 * seq)) for seq in range(10)]  # three a day
    kept = choose_kept(accepted, make_head(champion=3, challenger=8), {0: "the first", 5: ""}, recent=2, daily_days=1)
    assert kept == {
        0: ("pinned: the first",),
        3: ("champion",),
        5: ("pinned",),
        7: ("last of 2026-11-03",),
        8: ("challenger", "recent"),
        9: ("newest", "recent", "last of 2026-11-04"),
    }
    assert list(choose_kept(accepted, make_head(), {}, recent=1, daily_days=0)) == [9]
    assert list(choose_kept(accepted, make_head(), {}, recent=1, daily_days=400)) == [1, 4, 7, 9]


def test_a_writer_whose_clock_is_ahead_gives_up_no_version_of_another_day(start: Make, edit: Make) -> None:
    """The last version of each day is kept, counted back from the newest: were its time believed, the others would be too old."""
    clerk = start()
    storage = clerk.stream.storage
    now = datetime.now(UTC)
    times = [now - 3 * DAY, now - 2 * DAY, now - 5 * DAY, now + 40 * DAY]
    for seq, time in enumerate(times, 1):
        draft = clerk.draft([(edit(f"Person {seq}"), "live")])
        commit(clerk.stream, draft.model_copy(update={"time": time}), clerk.stream.head)
        key = clerk.stream.key(f"commits/{seq:08d}.json")
        storage._values[key] = storage._values[key][0], min(time, now)
    kept = survey_stream(History(storage, "main"), recent=1, daily_days=30, now=now, grace=DAY).kept
    assert set(kept) >= {1, 2, 3, 4} and kept[4][-1] == f"last of {now.date().isoformat()}"


class Yard:
    """A stream in memory with six versions of an artifact and a snapshot each."""

    def __init__(self, clerk: Any, edit: Make) -> None:
        self.stream = clerk.stream
        self.storage: MemoryStorage = self.stream.storage
        self.objects = self.stream.objects
        self.clerk, self.edit = clerk, edit
        for number in range(6):
            self.commit(number)

    def commit(self, number: int, **names: str) -> None:
        artifact = names.get("artifact") or self.objects.put(f"artifact {number}".encode())
        state = {"snapshot": self.objects.put(f"snapshot {number // 2}".encode()), "pairs_since": []}
        manifest = self.objects.put_json({"format": 1, "layers": [{"artifact": artifact, "state": state}], "number": number})
        draft = self.clerk.draft([(self.edit(f"Person {number}"), "live")]).model_copy(update={"manifest": manifest})
        commit(self.stream, draft, self.stream.head)

    def age(self, by: timedelta, under: str = "") -> None:
        """Everything under a prefix becomes so much older."""
        for key, (data, modified) in self.storage._values.items():
            if key.startswith(under):
                self.storage._values[key] = data, modified - by

    @property
    def history(self) -> History:
        return History(self.storage, self.stream.name)

    def survey(self, recent: int = 2) -> Survey:
        return survey_stream(self.history, recent, 0, datetime.now(UTC), DAY)

    def collect(self, recent: int = 2) -> list[str]:
        """Archive and collect; what was deleted, in words."""
        found, now = self.survey(recent), datetime.now(UTC)
        notes = open_archived(self.storage, self.stream.name)
        for seqs in found.given_up.values():
            for seq in seqs:
                notes.write(seq, "archived")
        due = [candidate for candidate in find_garbage(self.history, found, now, DAY) if candidate.due]
        words = {candidate.digest: self.objects.get(candidate.digest).decode() for candidate in due}
        gone = delete_garbage(self.history, found, due, now, DAY)
        delete_stale(self.history, found)
        # The clerk stores manifests of its own that no commit names.
        return sorted(word for word in (words[candidate.digest] for candidate in gone) if not word.startswith("{"))


@pytest.fixture
def yard(start: Make, edit: Make) -> Yard:
    return Yard(start(), edit)


def test_weights_of_versions_that_are_not_kept_go_when_they_were_archived_long_enough(yard: Yard) -> None:
    open_pins(yard.storage, yard.stream.name).write(2, "audit")
    assert yard.collect() == []
    yard.age(2 * DAY)
    assert yard.collect() == ["artifact 0", "artifact 2", "artifact 3", "snapshot 1"], "2 is pinned; 5 and 6 are recent"
    assert list_given_up(yard.history, None) >= {
        digest for digest in list_given_up(yard.history, None) if yard.objects.find(digest) is None
    }
    assert yard.collect() == []
    for seq in range(7):
        yard.stream.log.read(seq)
    assert History(yard.storage, yard.stream.name).find_break(list(yard.history.walk())[-1][1]) is None


def test_a_version_that_falls_out_later_waits_from_then_on(yard: Yard) -> None:
    yard.age(5 * DAY)
    assert yard.collect(recent=6) == []
    assert yard.collect() == [], "old objects, but archived only now"
    yard.age(2 * DAY, "streams/main/archived/")
    assert len(yard.collect()) == 6


def test_what_no_commit_names_goes_once_it_is_old(yard: Yard) -> None:
    old, young = yard.objects.put(b"left by a run that died"), yard.objects.put(b"of a run under way")
    yard.age(2 * DAY, f"streams/main/objects/{old}")
    yard.age(DAY / 2, f"streams/main/objects/{young}")
    yard.objects.put(b"left by a run that died")  # it comes again
    assert yard.collect(recent=9) == []
    yard.age(2 * DAY, f"streams/main/objects/{old}")
    assert yard.collect(recent=9) == ["left by a run that died"]
    assert yard.objects.exists(young)


def test_pairs_of_an_interrupted_run_are_needed(yard: Yard) -> None:
    pairs = yard.objects.put(b"pairs")
    yard.storage.create(f"streams/main/prepared/scope/{pairs}.json", b"[]")
    yard.age(2 * DAY)
    assert yard.collect(recent=9) == []
    yard.age(40 * DAY)
    assert yard.collect(recent=9) == [], "the hint goes first"
    assert yard.collect(recent=9) == ["pairs"]


def test_what_a_new_commit_names_is_spared(yard: Yard) -> None:
    found = yard.objects.put(b"an artifact of old")
    yard.age(2 * DAY, f"streams/main/objects/{found}")
    survey, now = yard.survey(recent=9), datetime.now(UTC)
    due = [candidate for candidate in find_garbage(yard.history, survey, now, DAY) if candidate.due]
    due = [candidate for candidate in due if candidate.digest == found]
    assert len(due) == 1
    yard.commit(6, artifact=found)
    yard.age(2 * DAY, f"streams/main/objects/{found}")  # as if the writer had not renewed it
    assert delete_garbage(yard.history, survey, due, now, DAY) == []
    assert yard.objects.exists(found)


def test_a_writer_renews_what_is_old_and_gives_way_to_a_collection(yard: Yard) -> None:
    digest = yard.objects.put(b"weights")
    key = f"streams/main/objects/{digest}"
    yard.age(2 * RENEW_AFTER, key)
    before = yard.storage.find(key)
    secure_objects(yard.storage, yard.objects, "streams/main/gc/", {"artifact": digest})
    after = yard.storage.find(key)
    assert before is not None and after is not None and after.modified > before.modified
    yard.storage.create("streams/main/gc/1.json", f'["{digest}"]'.encode())
    with pytest.raises(ConflictError, match="expected artifact to stay"):
        secure_objects(yard.storage, yard.objects, "streams/main/gc/", {"artifact": digest})
    secure_objects(yard.storage, yard.objects, "streams/main/gc/", {"other": yard.objects.put(b"other")})
    yard.age(2 * timedelta(hours=1), "streams/main/gc/")
    secure_objects(yard.storage, yard.objects, "streams/main/gc/", {"artifact": digest})  # that collection is dead
    yard.objects.delete(digest)
    with pytest.raises(KeyMissingError, match=f"expected artifact as object {digest}, found none"):
        secure_objects(yard.storage, yard.objects, "streams/main/gc/", {"artifact": digest})


@pytest.mark.parametrize("moment", range(12))
def test_killed_anywhere_a_collection_is_finished_by_the_next(yard: Yard, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    yard.collect()
    yard.age(2 * DAY)
    calls = 0

    def die(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        for name in ("create", "delete"):
            patch.setattr(yard.storage, name, die(getattr(yard.storage, name)), raising=False)
        with contextlib.suppress(KeyboardInterrupt):
            yard.collect()
        killed = calls > moment
    assert killed or moment > 6
    yard.age(2 * DAY)
    yard.collect()
    left = {yard.objects.get(entry.key) for entry in yard.objects.list_all()}
    assert {data for data in left if data.startswith(b"artifact")} == {b"artifact 4", b"artifact 5"}
    assert not list(yard.storage.list("streams/main/gc/"))
    yard.commit(7)


def test_a_broken_log_is_never_collected(yard: Yard) -> None:
    yard.storage.delete("streams/main/commits/00000003.json")
    with pytest.raises(StorageError, match="expected a whole log, found it broken"):
        yard.survey()
