"""What stands above an editor's layer in a version, as its manifest names it: an adapter, a memory. Reads headers, no tensors."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from registry.fold import EditRow, split_occurrence
from registry.objects import read_metadata
from registry.stream import Stream

ADAPTER, MEMORY = "distillmike", "mike"
"""What these layers are called in a manifest, in order of application."""


class Learned(NamedTuple):
    """Ids of edits, by what an adapter made of them."""

    absorbed: frozenset[str] = frozenset()
    """It answers them by itself."""
    unlearned: frozenset[str] = frozenset()
    """They were taught, and are not answered under it, even where weights beneath it would have."""


def read_learned(stream: Stream, manifest: str) -> Learned:
    """What the adapter of a version knows; nothing where there is none.

    Args:
        manifest: its digest.
    """
    found = _read_layer(stream, manifest, ADAPTER)
    return Learned(*(frozenset(split_occurrence(name)[0] for name in found.get(field, ())) for field in Learned._fields))


def list_tiers(stream: Stream, row: EditRow) -> list[str]:
    """Where a live edit of the newest accepted version answers from. What memory holds besides, because it is to hold everything, is not
    told."""
    learned = read_learned(stream, stream.head.manifest)
    found = (("weights", row.pairs is not None), ("adapter", row.id in learned.absorbed))
    held = row.id in learned.unlearned or not any(is_there for _, is_there in found)
    return [name for name, is_there in (*found, ("memory", held)) if is_there]


def find_unconsolidated(stream: Stream) -> list[EditRow]:
    """The live edits that nothing but memory answers, in order of arrival. Reads no artifact where every live edit is written."""
    unwritten = stream.index.find_unwritten()
    absorbed = read_learned(stream, stream.head.manifest).absorbed if unwritten else frozenset[str]()
    return [row for row in unwritten if row.id not in absorbed]


def measure_wait(stream: Stream, waiting: Sequence[EditRow]) -> float | None:
    """Seconds since the first of `find_unconsolidated` was accepted; None where there is none."""
    return (datetime.now(UTC) - stream.log.read(waiting[0].seq).time).total_seconds() if waiting else None


def describe_tiers(stream: Stream) -> dict[str, Any]:
    """How many live edits of the newest accepted version are in its weights, its adapter and its memory (an edit may be in several), how
    many are in memory only, and how long the oldest of those has been."""
    waiting = find_unconsolidated(stream)
    oldest = measure_wait(stream, waiting)
    return {
        "weights": stream.index.counts().get("live", 0) - len(stream.index.find_unwritten()),
        "adapter": len(read_learned(stream, stream.head.manifest).absorbed),
        "memory": _read_layer(stream, stream.head.manifest, MEMORY).get("count", 0),
        "unconsolidated": len(waiting),
        "oldest_seconds": None if oldest is None else round(oldest),
    }


def _read_layer(stream: Stream, manifest: str, editor: str) -> dict[str, Any]:
    """What the artifact of a layer says of itself; nothing where there is no such layer."""
    layers = stream.objects.get_json(manifest).get("layers", ())
    artifact = next((layer["artifact"] for layer in layers if layer["editor"] == editor), None)
    return read_metadata(stream.objects.get(artifact)) if artifact else {}
