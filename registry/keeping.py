"""Which versions keep their weights: the champion, the challenger, the newest ones, one per day for a while, and every pinned one.

All others keep what cannot be made again (commits, batches, outcomes, pairs, reports) and what is small (manifests, change lists); their
artifacts and the snapshots that only they need go, and `errata rebuild --to` makes them again. A note in storage says that this has been
decided, and when by the storage's own clock; nothing of a version is deleted before that note is older than the grace.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import NamedTuple

from errata.errors import KeyExistsError, KeyMissingError, StorageError
from registry.fold import Head
from registry.storage.base import Storage


class Accepted(NamedTuple):
    """An accepted commit, as far as keeping it is concerned."""

    seq: int
    time: datetime
    """When it was made, as far as it can be known."""


def choose_kept(
    accepted: Sequence[Accepted], head: Head, pinned: Mapping[int, str], recent: int, daily_days: int
) -> dict[int, tuple[str, ...]]:
    """The versions that keep their weights, and why.

    Args:
        accepted: every accepted commit, oldest first.
        pinned: commit → why it is pinned.
        recent: how many of the newest are kept.
        daily_days: for how many days before the newest commit the last version of each day (UTC) is kept.
    """
    reasons: dict[int, list[str]] = defaultdict(list)
    for seq, why in ((head.champion, "champion"), (head.challenger, "challenger"), (head.accepted, "newest")):
        if seq is not None:
            reasons[seq].append(why)
    for seq, why in pinned.items():
        reasons[seq].append(f"pinned: {why}" if why else "pinned")
    for item in accepted[-recent:] if recent else ():
        reasons[item.seq].append("recent")
    if accepted:
        first = accepted[-1].time - timedelta(days=daily_days)
        last_of = {item.time.date(): item.seq for item in accepted if item.time >= first}
        for day, seq in last_of.items():
            reasons[seq].append(f"last of {day.isoformat()}")
    return {seq: tuple(why) for seq, why in sorted(reasons.items())}


class Notes:
    """Notes about commits of one stream, one value each: `pins/` and `archived/`.

    Args:
        prefix: e.g. `streams/main/pins`.
    """

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage, self._prefix = storage, prefix.rstrip("/")

    def read(self) -> dict[int, tuple[str, datetime]]:
        """Commit → what the note says, and since when by the storage's clock."""
        found = {}
        for entry in self._storage.list(f"{self._prefix}/"):
            name = entry.key.rpartition("/")[2].removesuffix(".txt")
            if not name.isdecimal():
                raise StorageError(f"{self._storage.url}/{entry.key}: expected the number of a commit, found {name!r}")
            with suppress(KeyMissingError):  # taken back since the listing
                found[int(name)] = self._storage.read(entry.key).decode(), entry.modified
        return dict(sorted(found.items()))

    def write(self, seq: int, text: str) -> None:
        """Note something; what was noted first stays."""
        with suppress(KeyExistsError):
            self._storage.create(self._key(seq), text.encode())

    def remove(self, seq: int) -> None:
        """A commit without a note is no error."""
        self._storage.delete(self._key(seq))

    def __contains__(self, seq: int) -> bool:
        return self._storage.exists(self._key(seq))

    def _key(self, seq: int) -> str:
        return f"{self._prefix}/{seq:08d}.txt"


def open_pins(storage: Storage, stream: str) -> Notes:
    """Commits that people want to keep, and why."""
    return Notes(storage, f"streams/{stream}/pins")


def open_archived(storage: Storage, stream: str) -> Notes:
    """Commits whose weights are given up."""
    return Notes(storage, f"streams/{stream}/archived")
