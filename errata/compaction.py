"""The sums of a version, built anew from the stored pairs of its live edits (design §5; algorithms.md, resolution D).

Thousands of additions and subtractions each round in the last bit. Pairs that are added up once, in one order, do not remember them: the
state is that of a stream to which exactly the live edits were added, and its recipe begins there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.candidates import load_state, restart_state, store_restart
from errata.editors.base import Blobs, Editor
from errata.exactness import measure_gap
from errata.manifests import Manifest, PairRef, replace_bottom


@dataclass(frozen=True)
class Compaction:
    """A manifest whose objects are stored, and how far its weights are from those it stands in for."""

    manifest: Manifest
    gap: float
    """Relative, in float64; infinite where the head's state holds another number of pairs."""
    uncovered: Mapping[str, str]
    """`Editor.find_uncovered` of the head's state."""


def compact_state(blobs: Blobs, editor: Editor[Any], head: Manifest, live: Sequence[PairRef]) -> Compaction:
    """Sum the pairs of all live edits from nothing, solve, and compare with the head. Memory holds two states at most, and one block of
    pairs.

    Args:
        live: in any order; a pair that several edits share counts once.

    Raises:
        KeyMissingError, ObjectCorruptError: the head's state, or a live pair, is missing or damaged.
        BaseMismatchError: a pair is not of this base and profile.
        EditorError: a system cannot be solved.
    """
    before = load_state(blobs, editor, head.layers[0].state)
    count, wanted, uncovered = before.count, editor.solve_exact(before), editor.find_uncovered(before)
    del before
    made = restart_state(blobs, editor, head.base, head.profile, live)
    gap = measure_gap(editor.solve_exact(made.state), wanted) if made.state.count == count else float("inf")
    return Compaction(replace_bottom(head, store_restart(blobs, editor, head.base, head.profile, made)), gap, uncovered)
