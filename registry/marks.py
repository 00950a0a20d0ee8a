"""Signs of life of a stream, beside its log: when a run last came to its end, what the alias shows, what the watch last measured.

Nothing depends on them but people and their monitors: a stream without them is whole. A storage keeps values that never change, so a
moment is the age of an empty value, by the storage's own clock.
"""

from contextlib import suppress
from datetime import datetime

from errata.errors import KeyExistsError, KeyMissingError
from registry.inbox import PART
from registry.stream import Stream

_SUCCESS = "marks/success"
_SHOWN = "marks/shown/"
_WATCH = "watch/"
_KEPT = 500
"""Newest reports of the watch that are kept: three weeks of hourly ones."""


def mark_success(stream: Stream) -> None:
    """A run that applies edits has come to its end, whether or not any were waiting."""
    _touch(stream, _SUCCESS)


def find_success(stream: Stream) -> datetime:
    """When that was last; for a stream that has never been marked, the time of its newest commit."""
    found = stream.storage.find(stream.key(_SUCCESS))
    return found.modified if found else stream.log.read(stream.head.seq).time


def mark_shown(stream: Stream, seq: int) -> None:
    """MLflow's alias shows this commit now."""
    if find_shown(stream) != seq:
        _touch(stream, f"{_SHOWN}{seq:08d}")
        for entry in list(stream.storage.list(stream.key(_SHOWN))):
            if not entry.key.endswith(f"/{seq:08d}"):
                stream.storage.delete(entry.key)


def find_shown(stream: Stream) -> int | None:
    """The commit that the alias shows, as we last set or saw it; None before the first."""
    seqs = [int(entry.key.rpartition("/")[2]) for entry in stream.storage.list(stream.key(_SHOWN))]
    return max(seqs, default=None)


def find_oldest_waiting(stream: Stream) -> datetime | None:
    """When the oldest file in the inbox came; None where none waits."""
    entries = stream.storage.list(stream.key("inbox/"))
    return min((entry.modified for entry in entries if not entry.key.endswith(PART)), default=None)


def store_watch(stream: Stream, seq: int, moment: datetime, data: bytes) -> str:
    """Keep a report of the watch about commit `seq`; its key. The oldest beyond the newest 500 go."""
    key = stream.key(f"{_WATCH}{seq:08d}-{moment:%Y%m%dT%H%M%S%f}.json")
    with suppress(KeyExistsError):  # the same moment: a repeated request that met its own first try
        stream.storage.create(key, data)
    for old in _list_watches(stream)[:-_KEPT]:
        stream.storage.delete(old)
    return key


def read_watch(stream: Stream) -> bytes | None:
    """The newest report of the watch: of the newest commit, and of these the latest."""
    return next(iter(read_watches(stream, 1)), None)


def read_watches(stream: Stream, most: int) -> list[bytes]:
    """The newest reports of the watch, oldest first."""
    found: list[bytes] = []
    for key in reversed(_list_watches(stream)):
        with suppress(KeyMissingError):  # a watch at work has just removed it
            found.append(stream.storage.read(key))
        if len(found) == most:
            break
    return found[::-1]


def _list_watches(stream: Stream) -> list[str]:
    return [entry.key for entry in stream.storage.list(stream.key(_WATCH))]


def _touch(stream: Stream, name: str) -> None:
    key = stream.key(name)
    try:
        stream.storage.renew(key)
    except KeyMissingError:
        with suppress(KeyExistsError):  # another run came to its end at the same moment
            stream.storage.create(key, b"")
