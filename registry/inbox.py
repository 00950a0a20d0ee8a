"""Where producers leave files of edits. A file is taken line by line into commits, and removed once no line of it is left."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from errata.edits import digest_of
from errata.errors import InputError, KeyExistsError, KeyMissingError
from registry.events import Lines
from registry.stream import Stream

PART = ".part"
"""Ending of a file that its producer is still writing."""


class InboxFile(NamedTuple):
    """A file with lines left. Its bytes are an object of the stream already."""

    name: str
    digest: str
    data: bytes
    consumed: tuple[Lines, ...]


def list_waiting(stream: Stream) -> list[str]:
    """Names of the files in the inbox, oldest first; files that are still being written are not there yet."""
    prefix = stream.key("inbox/")
    entries = [entry for entry in stream.storage.list(prefix) if not entry.key.endswith(PART)]
    return [entry.key.removeprefix(prefix) for entry in sorted(entries, key=lambda entry: (entry.modified, entry.key))]


def read_waiting(stream: Stream) -> Iterator[InboxFile]:
    """The files with lines left, oldest first. Each is stored as an object before it is handed out, so that nothing depends on the
    inbox once a commit names it; a file whose lines are all in the log is removed on the way."""
    for name in list_waiting(stream):
        key = stream.key(f"inbox/{name}")
        try:
            data = stream.storage.read(key)
        except KeyMissingError:
            continue  # another writer consumed it since the listing
        digest = digest_of(data)
        use = stream.index.find_file(digest)
        if use is not None and use.done:
            stream.storage.delete(key)
            continue
        stream.objects.put(data)
        yield InboxFile(name, digest, data, use.lines if use else ())


def drop_file(stream: Stream, name: str, data: bytes) -> str:
    """Leave a file in the inbox; its name there, which is `name`, or `name` with a number where that is taken by other bytes.

    Raises:
        InputError: the name is not that of a JSONL file.
    """
    if not name.endswith(".jsonl"):
        raise InputError(f"inbox: expected a name that ends in .jsonl, found {name!r}")
    stem = name.removesuffix(".jsonl")
    for number in range(1, 10_000):
        chosen = name if number == 1 else f"{stem}-{number}.jsonl"
        key = stream.key(f"inbox/{chosen}")
        try:
            stream.storage.create(key, data)
            return chosen
        except KeyExistsError:
            if digest_of(stream.storage.read(key)) == digest_of(data):
                return chosen
    raise InputError(f"inbox: expected a free name like {name!r}, found 10,000 of them taken")


def drop_lines(stream: Stream, lines: Sequence[bytes]) -> str:
    """Leave lines in the inbox under a name that says when; its name.

    A file is consumed once, by its digest. Who submits the same lines again at the console means it: an empty line more makes them
    another file.
    """
    data = b"\n".join(lines) + b"\n"
    while stream.index.find_file(digest_of(data)) is not None:
        data += b"\n"
    return drop_file(stream, f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{digest_of(data)[:8]}.jsonl", data)
