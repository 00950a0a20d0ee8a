"""Hints to pairs that were stored before their batch was committed, so that a retry after a crash does not compute them again.

A hint only saves work: losing one costs the computation, and a wrong one cannot exist, because it names an immutable object.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress

from errata.edits import canonical_json
from errata.errors import KeyExistsError, KeyMissingError
from registry.stream import Stream

Place = tuple[str, int, list[float | None]]
"""Digest of a pairs object, the row in it, and the losses its optimisation ended with, in nats per token of the target, edit by edit."""


def remember_pairs(stream: Stream, prepare: str, pairs: str, losses: Mapping[str, Sequence[float | None]]) -> None:
    """Note that rows 0, 1, … of the object `pairs` are the pairs of these names, and how far their edits came.

    Args:
        prepare: digest of what the pairs depend on besides the edit: base and prepare options.
    """
    with suppress(KeyExistsError):  # an earlier try stored the same pairs
        stream.storage.create(stream.key(f"prepared/{prepare}/{pairs}.json"), canonical_json(list(losses.items())))


def recall_pairs(stream: Stream, prepare: str) -> dict[str, Place]:
    """Name of a pair → where it lies."""
    found: dict[str, Place] = {}
    prefix = stream.key(f"prepared/{prepare}/")
    for entry in stream.storage.list(prefix):
        pairs = entry.key.removeprefix(prefix).removesuffix(".json")
        if stream.objects.exists(pairs):
            try:
                rows = json.loads(stream.storage.read(entry.key))
            except KeyMissingError:
                continue  # another writer has committed them since the listing
            found |= {name: (pairs, row, losses) for row, (name, losses) in enumerate(rows)}
    return found


def forget_pairs(stream: Stream, prepare: str, pairs: Sequence[str]) -> None:
    """Drop the hints to objects that a commit names now."""
    for digest in pairs:
        stream.storage.delete(stream.key(f"prepared/{prepare}/{digest}.json"))
