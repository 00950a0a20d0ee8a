"""Files of the inbox that a run failed over: tried alone, and set aside after a few times, so that the others go on.

setbacks/<digest of the file>/<n>.json     why the n-th try failed
aside/<name>                               the file, as it came; numbered where another one of its name is there
aside/<name>.report.json                   why it is there
untaken/<digest of the file>-<judged under>   memory could not answer all of it; it waits for the next batch
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from errata.edits import canonical_json
from errata.errors import KeyExistsError, KeyMissingError
from registry.inbox import InboxFile, keep_file
from registry.storage.base import Entry
from registry.stream import Stream

REPORT = ".report.json"
_LONGEST = 2_000
"""Characters of a reason that are kept."""


def note_setback(stream: Stream, files: Iterable[str], reason: str) -> None:
    """Note that a run failed over edits of these files.

    Args:
        files: digests.
    """
    known = read_setbacks(stream)
    for digest in files:
        number = len(known.get(digest, ())) + 1
        with suppress(KeyExistsError):  # two writers at once: one note is enough
            said = canonical_json({"reason": reason[:_LONGEST], "time": datetime.now(UTC)})
            stream.storage.create(stream.key(f"setbacks/{digest}/{number:04d}.json"), said)


def read_setbacks(stream: Stream) -> dict[str, list[str]]:
    """Digest of a file → why each try failed, oldest first."""
    found: dict[str, list[str]] = defaultdict(list)
    prefix = stream.key("setbacks/")
    for entry in stream.storage.list(prefix):
        with suppress(KeyMissingError):
            found[entry.key.removeprefix(prefix).partition("/")[0]].append(json.loads(stream.storage.read(entry.key))["reason"])
    return dict(found)


def forget_setbacks(stream: Stream, files: Iterable[str]) -> None:
    """Their edits were settled after all, or the files are set aside."""
    for digest in files:
        for prefix in (f"setbacks/{digest}/", f"untaken/{digest}-"):
            for entry in list(stream.storage.list(stream.key(prefix))):
                stream.storage.delete(entry.key)


def note_untaken(stream: Stream, files: Iterable[str], under: str) -> None:
    """Note that memory cannot answer what is left of these files, judged under settings of this digest."""
    for digest in files:
        with suppress(KeyExistsError):
            stream.storage.create(stream.key(f"untaken/{digest}-{under}"), b"")


def read_untaken(stream: Stream, under: str) -> set[str]:
    """Digests of such files."""
    prefix, ending = stream.key("untaken/"), f"-{under}"
    names = (entry.key.removeprefix(prefix) for entry in stream.storage.list(prefix))
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}


def set_aside(stream: Stream, file: InboxFile, reasons: Iterable[str]) -> None:
    """Move a file out of the inbox, with a report. Lines of it that are in the log already stay there."""
    report = {"file": file.name, "digest": file.digest, "consumed": file.consumed, "reasons": list(reasons), "time": datetime.now(UTC)}
    name = keep_file(stream, "aside", file.name, file.data)
    with suppress(KeyExistsError):  # an earlier try was cut off
        stream.storage.create(stream.key(f"aside/{name}{REPORT}"), canonical_json(report))
    forget_setbacks(stream, [file.digest])
    stream.storage.delete(stream.key(f"inbox/{file.name}"))


def list_aside(stream: Stream) -> list[tuple[Entry, Mapping[str, Any]]]:
    """Files that were set aside, oldest first, each with its report."""
    prefix = stream.key("aside/")
    entries = {entry.key.removeprefix(prefix): entry for entry in stream.storage.list(prefix)}
    found = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].modified):
        if not name.endswith(REPORT):
            told = f"{name}{REPORT}"
            found.append((entry, json.loads(stream.storage.read(prefix + told)) if told in entries else {}))
    return found


def prune_aside(stream: Stream) -> int:
    """Delete what was set aside; how many files."""
    found = list_aside(stream)
    for entry, _ in found:
        stream.storage.delete(entry.key)
        stream.storage.delete(f"{entry.key}{REPORT}")
    return len(found)
