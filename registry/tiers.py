"""What stands above an editor's layer in a version, as its manifest names it: an adapter, a memory. Reads headers, no tensors."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from registry.fold import split_occurrence
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


def describe_tiers(stream: Stream) -> dict[str, Any]:
    """How many live edits of the newest accepted version are in its weights, its adapter and its memory (an edit may be in several), how
    many are in memory only, and how long the oldest of those has been."""
    unwritten = stream.index.find_unwritten()
    absorbed, _ = read_learned(stream, stream.head.manifest)
    waiting = [row for row in unwritten if row.id not in absorbed]
    since = stream.log.read(waiting[0].seq).time if waiting else None
    return {
        "weights": stream.index.counts().get("live", 0) - len(unwritten),
        "adapter": len(absorbed),
        "memory": _read_layer(stream, stream.head.manifest, MEMORY).get("count", 0),
        "unconsolidated": len(waiting),
        "oldest_seconds": None if since is None else round((datetime.now(UTC) - since).total_seconds()),
    }


def _read_layer(stream: Stream, manifest: str, editor: str) -> dict[str, Any]:
    """What the artifact of a layer says of itself; nothing where there is no such layer."""
    layers = stream.objects.get_json(manifest).get("layers", ())
    artifact = next((layer["artifact"] for layer in layers if layer["editor"] == editor), None)
    return read_metadata(stream.objects.get(artifact)) if artifact else {}
