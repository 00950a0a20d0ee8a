"""The log as a replay reads it, commit by commit, and what it makes of it."""

from dataclasses import dataclass
from typing import Any

from errata.editors.base import Editor
from errata.manifests import Manifest, PairRef


@dataclass(frozen=True)
class Step:
    """What one commit does to the state, as its outcomes say it."""

    remove: tuple[PairRef, ...] = ()
    add: tuple[PairRef, ...] = ()
    fresh: bool = False
    """The state begins anew: it is the sum of `add`, all that is live."""
    adopts: bool = False
    """The state stays, and is solved under another profile."""


@dataclass(frozen=True)
class Site:
    """What pairs are valid for, and the editor that merges them there."""

    editor: Editor[Any]
    base: str
    profile: str


@dataclass(frozen=True)
class Entry:
    """One accepted commit."""

    seq: int
    parent: int
    """The accepted commit before."""
    manifest: str
    restates: int | None = None
    """The commit whose state it takes over; else what it did is asked for."""
    rebuilt: bool = False
    """Its objects stand in for those of the commit before, of which some are gone."""
    site: Site | None = None
    """Where its state is, if not where that of the accepted commit before is."""


@dataclass(frozen=True)
class Point:
    """Where the replay stands after a commit."""

    state: Any
    recipe: str
    manifest: Manifest | None
    """None where it is lost and cannot be made again."""


@dataclass(frozen=True)
class Remade:
    """The state of a commit in new objects, where some of its own are gone for good."""

    manifest: str
    instead_of: frozenset[str]
    """Digests that nobody needs any more."""


def list_named(digest: str, manifest: Manifest | None) -> set[str]:
    """A manifest's own digest and those that it names."""
    layers = manifest.layers if manifest else ()
    return {digest} | {name for layer in layers for name in (*layer.stored, *layer.state_stored)}
