"""Garbage: objects that nothing needs, found by walking the whole log, and deleted in a way that no writer can fall over.

An object is deleted only if no commit needs it, it is older than the grace by the storage's own clock, and, where it belongs to a version
that is archived, the archiving is, too. A writer stores its objects before it commits, so what it has stored is young; what lay there
already it makes young again (`ObjectStore.put`). Right before the commit (`registry.commit`) it

    1  renews every object of its own that is older than half an hour
    2  looks at the notes under `gc/`: one that names an object of its own is a conflict, and it starts again
    3  looks whether the renewed objects are still there

and a collection, for each run of objects,

    a  writes a note under `gc/` that names them
    b  reads the log on from where it had read it, and leaves out what is needed now
    c  looks at the age of each once more, deletes those that are still old
    d  removes the note

If a is before 2, the writer sees the note, or, where d is before 2 as well, finds in 3 what c has deleted. If a is after 2, then 1 is
before c, and c finds the objects young. So no commit names an object that is gone. Killed anywhere, a collection leaves at most a note,
which counts for an hour only.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from errata.edits import canonical_json
from errata.errors import ConflictError, KeyExistsError, KeyMissingError, StorageError
from registry.checkpoints import Checkpoint
from registry.erased import read_erasures
from registry.events import Commit, read_formatted
from registry.fold import Head
from registry.history import Break, History, is_accepted, list_layers, list_named
from registry.keeping import Accepted, choose_kept, open_archived, open_pins
from registry.objects import ObjectStore
from registry.storage.base import PROBES, Entry, Storage, read_clock

RENEW_AFTER = timedelta(minutes=30)
"""Age at which a writer renews what it is about to commit; far below the shortest grace."""
_NOTE_COUNTS = timedelta(hours=1)
_RUN = 500
"""Objects deleted under one note."""
_HINTS_LAST = timedelta(days=30)
"""Age at which hints to prepared pairs are given up: no retry comes that late."""
_CHECKPOINTS = 2
"""The newest checkpoints that are kept."""
_WEIGHTS = ("artifact", "snapshot")
"""What an archived version gives up."""


class Use(NamedTuple):
    """What an object is to the stream."""

    category: str
    why: str


@dataclass
class Survey:
    """What a stream stores, and why."""

    head: Head
    kept: Mapping[int, tuple[str, ...]]
    """Version → why it keeps its weights."""
    needed: dict[str, Use] = field(default_factory=dict)
    given_up: dict[str, list[int]] = field(default_factory=dict)
    """Weights that only versions need which are not kept → those versions."""
    accepted: list[int] = field(default_factory=list)
    stale: list[Entry] = field(default_factory=list)
    """Checkpoints and hints that are of no use any more."""


class Candidate(NamedTuple):
    """An object that nothing needs."""

    digest: str
    size: int
    age: timedelta
    category: str
    due: bool
    """It has been old enough for long enough."""


def survey_stream(history: History, recent: int, daily_days: int, now: datetime, grace: timedelta) -> Survey:
    """Walk the log and note what every commit needs.

    Raises:
        StorageError: the log is broken, or a manifest is damaged: what is needed cannot be known, and nothing may be deleted.
    """
    commits: list[tuple[Commit, Head]] = list(history.walk())
    head = commits[-1][1] if commits else None
    broken: Break | None = history.find_break(head)
    if broken or head is None:
        reason = broken.reason if broken else "no commit"
        raise StorageError(
            f"stream {history.name!r}: expected a whole log, found it broken ({reason}); `errata rebuild --check` tells more"
        )
    accepted = _date_accepted(history, [commit for commit, _ in commits if is_accepted(commit)])
    pinned = {seq: text for seq, (text, _) in open_pins(history.storage, history.name).read().items()}
    survey = Survey(head, choose_kept(accepted, head, pinned, recent, daily_days), accepted=[item.seq for item in accepted])
    for commit, _ in commits:
        _note_commit(history, survey, commit)
    for digest in survey.needed.keys() & survey.given_up.keys():
        del survey.given_up[digest]
    for erasure in read_erasures(history.storage, history.key("")):
        stand_ins = [gone.by for gone in erasure.record.objects] + [waiting.by for waiting in erasure.record.inbox]
        survey.needed |= {digest: Use("erasure", f"commit {erasure.record.seq}") for digest in (erasure.digest, *stand_ins) if digest}
    _note_checkpoints(history, survey, now, grace)
    _note_hints(history, survey, now, grace)
    return survey


def _date_accepted(history: History, commits: list[Commit]) -> list[Accepted]:
    """When commits were made: by their writer's clock, but not later than they were stored. A clock that is ahead would make the versions
    of all other days too old to keep."""
    prefix = history.key("commits/")
    stored = {entry.key: entry.modified for entry in history.storage.list(prefix)}
    return [Accepted(commit.seq, min(commit.time, stored.get(f"{prefix}{commit.seq:08d}.json", commit.time))) for commit in commits]


def _note_commit(history: History, survey: Survey, commit: Commit) -> None:
    for what, digest in list_named(commit):
        survey.needed.setdefault(digest, Use(what, f"commit {commit.seq}"))
    if commit.manifest is None:
        return
    survey.needed.setdefault(commit.manifest, Use("manifest", f"commit {commit.seq}"))
    if not is_accepted(commit):
        return
    reasons = survey.kept.get(commit.seq)
    for what, digest in list_layers(history.objects.get_json(commit.manifest)):
        if what not in _WEIGHTS or reasons:
            why = f"version of commit {commit.seq} ({', '.join(reasons)})" if reasons and what in _WEIGHTS else f"commit {commit.seq}"
            survey.needed.setdefault(digest, Use(what, why))
        else:
            survey.given_up.setdefault(digest, []).append(commit.seq)


def _note_checkpoints(history: History, survey: Survey, now: datetime, grace: timedelta) -> None:
    entries = sorted(history.storage.list(history.key("checkpoints/")), key=lambda entry: entry.key)
    for entry in entries[-_CHECKPOINTS:]:
        try:
            checkpoint = Checkpoint.model_validate(read_formatted(history.storage.read(entry.key), entry.key))
        except (StorageError, ValueError):
            continue  # A damaged one is passed over by every reader, too.
        for segment in checkpoint.segments:
            survey.needed.setdefault(segment.digest, Use("segment", f"checkpoint {checkpoint.seq}"))
    survey.stale += [entry for entry in entries[:-_CHECKPOINTS] if now - entry.modified >= grace]


def _note_hints(history: History, survey: Survey, now: datetime, grace: timedelta) -> None:
    for entry in history.storage.list(history.key("prepared/")):
        if now - entry.modified >= max(grace, _HINTS_LAST):
            survey.stale.append(entry)  # The hint goes first, its pairs with the next collection.
        digest = entry.key.rpartition("/")[2].removesuffix(".json")
        survey.needed.setdefault(digest, Use("pairs", "prepared, not committed yet"))


def find_garbage(history: History, survey: Survey, now: datetime, grace: timedelta) -> Iterator[Candidate]:
    """The objects that nothing needs, in the order of their digests."""
    archived = open_archived(history.storage, history.name).read()
    for entry in history.objects.list_all():
        if entry.key in survey.needed:
            continue
        age = now - entry.modified
        versions = survey.given_up.get(entry.key, ())
        since = [now - archived[seq][1] if seq in archived else timedelta(0) for seq in versions]
        due = min([age, *since]) >= grace
        yield Candidate(entry.key, entry.size, age, "archived version" if versions else "unreferenced", due)


def delete_garbage(history: History, survey: Survey, due: list[Candidate], now: datetime, grace: timedelta) -> list[Candidate]:
    """Delete what is due, as the head of this module tells; what was deleted."""
    gone: list[Candidate] = []
    for start in range(0, len(due), _RUN):
        run = {candidate.digest: candidate for candidate in due[start : start + _RUN]}
        key = history.key(f"gc/{uuid.uuid4().hex}.json")
        with suppress(KeyExistsError):  # nobody else's: a request whose answer got lost, and that was repeated
            history.storage.create(key, canonical_json(sorted(run)))
        try:
            _read_on(history, survey)
            for digest, candidate in run.items():
                entry = history.objects.find(digest)
                if entry is not None and digest not in survey.needed and now - entry.modified >= grace:
                    history.objects.delete(digest)
                    gone.append(candidate)
        finally:
            history.storage.delete(key)
    return gone


def _read_on(history: History, survey: Survey) -> None:
    """Note what commits need that have come since the survey."""
    while (found := history.log.read_next(survey.head.seq, survey.head.digest)) is not None:
        commit, digest = found
        survey.head = survey.head.model_copy(update={"seq": commit.seq, "digest": digest})
        for _, name in list_named(commit):
            survey.needed.setdefault(name, Use("new", f"commit {commit.seq}"))
        if commit.manifest is not None:
            survey.needed.setdefault(commit.manifest, Use("new", f"commit {commit.seq}"))
            for _, name in list_layers(history.objects.get_json(commit.manifest)):
                survey.needed.setdefault(name, Use("new", f"commit {commit.seq}"))


def delete_stale(history: History, survey: Survey) -> int:
    """Remove checkpoints and hints of no use, and what killed processes left: collections' notes, probes of the clock; how many."""
    now = read_clock(history.storage)
    left = [entry for prefix in (history.key("gc/"), PROBES) for entry in history.storage.list(prefix)]
    dead = [entry for entry in left if now - entry.modified >= _NOTE_COUNTS]
    for entry in (*survey.stale, *dead):
        history.storage.delete(entry.key)
    return len(survey.stale) + len(dead) + history.storage.sweep(now - _NOTE_COUNTS)


def list_given_up(history: History, wanted: int | None) -> frozenset[str]:
    """Weights that only archived versions need, and not the commit `wanted`: they may be missing."""
    archived = open_archived(history.storage, history.name).read().keys() - {wanted}
    if not archived:
        return frozenset()
    needed, given_up = set[str](), set[str]()
    for commit, _ in history.walk():
        if is_accepted(commit) and commit.manifest is not None and history.objects.exists(commit.manifest):
            weights = {digest for what, digest in list_layers(history.objects.get_json(commit.manifest)) if what in _WEIGHTS}
            (given_up if commit.seq in archived else needed).update(weights)
    return frozenset(given_up - needed)


def secure_objects(storage: Storage, objects: ObjectStore, notes: str, named: Mapping[str, str]) -> None:
    """Make sure, right before a commit, that every object it names is there and stays: the steps 1 to 3 above.

    Args:
        notes: prefix of the collections' notes, e.g. `streams/main/gc/`.
        named: what it is called → digest.

    Raises:
        KeyMissingError: one is not there.
        ConflictError: one is about to be deleted. Whoever starts again stores it again.
    """
    now = read_clock(storage)
    renewed = {}
    for name, digest in named.items():
        entry = objects.find(digest)
        if entry is None and not objects.exists(digest):  # an erased one has another that stands in for it
            raise KeyMissingError(f"expected {name} as object {digest}, found none")
        if entry is not None and now - entry.modified >= RENEW_AFTER:
            objects.renew(digest)
            renewed[name] = digest
    for entry in storage.list(notes):
        if now - entry.modified < _NOTE_COUNTS:
            condemned = _read_note(storage, entry.key)
            for name, digest in named.items():
                if digest in condemned:
                    raise ConflictError(f"expected {name} to stay, found object {digest} about to be collected as garbage")
    for name, digest in renewed.items():
        if not objects.exists(digest):
            raise KeyMissingError(f"expected {name} as object {digest}, found it collected as garbage")


def _read_note(storage: Storage, key: str) -> set[str]:
    try:
        return set(json.loads(storage.read(key)))
    except KeyMissingError:
        return set()  # That collection is over.
