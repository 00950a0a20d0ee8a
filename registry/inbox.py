"""Where producers leave files of edits. A file is taken line by line into commits, and removed once no line of it is left."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from errata.edits import digest_of
from errata.errors import InputError, KeyExistsError, KeyMissingError
from registry.rows import Lines
from registry.storage.base import Entry
from registry.stream import Stream

PART = ".part"
"""Ending of a file that its producer is still writing."""
URGENT = ".urgent.jsonl"
"""Ending of a file that goes before those that arrived earlier."""


class InboxFile(NamedTuple):
    """A file with lines left. Its bytes are an object of the stream already."""

    name: str
    digest: str
    data: bytes
    consumed: tuple[Lines, ...]
    modified: datetime
    """When it arrived, by the storage's clock."""

    @property
    def urgent(self) -> bool:
        return self.name.endswith(URGENT)


def list_files(stream: Stream) -> list[Entry]:
    """What is in the inbox, in the order it is taken: urgent files first, then by age; files that are still being written come last."""
    entries = stream.storage.list(stream.key("inbox/"))
    return sorted(entries, key=lambda entry: (entry.key.endswith(PART), not entry.key.endswith(URGENT), entry.modified, entry.key))


def list_waiting(stream: Stream) -> list[str]:
    """Names of the files in the inbox in the order they are taken; those that are still being written are not there yet."""
    prefix = stream.key("inbox/")
    return [entry.key.removeprefix(prefix) for entry in list_files(stream) if not entry.key.endswith(PART)]


def read_waiting(stream: Stream) -> Iterator[InboxFile]:
    """The files with lines left, in the order they are taken. Each is stored as an object before it is handed out, so that nothing
    depends on the inbox once a commit names it; a file whose lines are all in the log is removed on the way."""
    for entry in list_files(stream):
        if entry.key.endswith(PART):
            continue
        try:
            data = stream.storage.read(entry.key)
        except KeyMissingError:
            continue  # another writer consumed it since the listing
        digest = digest_of(data)
        use = stream.index.find_file(digest)
        if use is not None and use.done:
            stream.storage.delete(entry.key)
            continue
        stream.objects.put(data)
        yield InboxFile(entry.key.removeprefix(stream.key("inbox/")), digest, data, use.lines if use else (), entry.modified)


def drop_file(stream: Stream, name: str, data: bytes) -> str:
    """Leave a file in the inbox; its name there, which is `name`, or `name` with a number where that is taken by other bytes.

    Raises:
        InputError: the name is not that of a JSONL file.
    """
    if not name.endswith(".jsonl"):
        raise InputError(f"inbox: expected a name that ends in .jsonl, found {name!r}")
    return keep_file(stream, "inbox", name, data)


def keep_file(stream: Stream, folder: str, name: str, data: bytes) -> str:
    """Store a file in a folder of the stream; its name there, as for `drop_file`.

    Raises:
        InputError: there is no free name.
    """
    ending = next((ending for ending in (URGENT, ".jsonl") if name.endswith(ending)), "")
    stem = name.removesuffix(ending)
    for number in range(1, 10_000):
        chosen = name if number == 1 else f"{stem}-{number}{ending}"
        key = stream.key(f"{folder}/{chosen}")
        try:
            stream.storage.create(key, data)
            return chosen
        except KeyExistsError:
            if digest_of(stream.storage.read(key)) == digest_of(data):
                return chosen
    raise InputError(f"{folder}: expected a free name like {name!r}, found 10,000 of them taken")


def drop_lines(stream: Stream, lines: Sequence[bytes], *, urgent: bool = False) -> str:
    """Leave lines in the inbox under a name that says when; its name.

    A file is consumed once, by its digest. Who submits the same lines again at the console means it: an empty line more makes them
    another file.
    """
    data = b"\n".join(lines) + b"\n"
    while stream.index.find_file(digest_of(data)) is not None:
        data += b"\n"
    return drop_file(stream, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{digest_of(data)[:8]}{URGENT if urgent else '.jsonl'}", data)
