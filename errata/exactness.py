"""Whether weights that edits were subtracted from are those that the remaining edits alone would give (algorithms.md §T 4)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from errata.candidates import load_state, read_pairs
from errata.editors.base import Blobs, Editor
from errata.manifests import Manifest, PairRef
from errata.report import Exactness

RELATIVE = 1e-8
"""Most that weights of two machines may differ by, in float64, as ‖ours − theirs‖ / ‖theirs‖."""
_BLOCK = 500
"""Pairs read and added at a time."""


def measure_exactness(blobs: Blobs, editor: Editor[Any], manifest: Manifest, live: Sequence[PairRef]) -> Exactness:
    """Compare the state a manifest names with one rebuilt from the stored pairs of the live edits, by the weights both solve to.

    Args:
        live: the pairs of all edits that are live with this manifest, in any order.

    Raises:
        EditorError: a system cannot be solved.
    """
    kept, rebuilt = load_state(blobs, editor, manifest.layers[0].state), editor.empty_state()
    for start in range(0, len(live), _BLOCK):
        rebuilt = editor.merge(rebuilt, read_pairs(blobs, live[start : start + _BLOCK]), None)
    found, wanted = editor.solve_exact(kept), editor.solve_exact(rebuilt)
    artifact, stored = editor.solve(rebuilt), manifest.layers[0].artifact
    identical = blobs.get(stored) == artifact.to_bytes() if stored and artifact else stored is None and artifact is None
    if found.keys() != wanted.keys():
        return Exactness(relative=1.0, identical=identical)
    return Exactness(relative=max((_compare(found[name], wanted[name]) for name in wanted), default=0.0), identical=identical)


def measure_gap(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Largest ‖ours − theirs‖ / ‖theirs‖ over the weights, in float64; infinite where they are of other weights or shapes."""
    if {name: delta.shape for name, delta in ours.items()} != {name: delta.shape for name, delta in theirs.items()}:
        return math.inf
    gaps = []
    for name, delta in theirs.items():
        wanted = delta.double()
        gap, scale = float((ours[name].double() - wanted).norm()), float(wanted.norm())
        gaps.append(gap / scale if scale else gap and math.inf)
    return max((gap if math.isfinite(gap) else math.inf for gap in gaps), default=0.0)


def _compare(found: torch.Tensor, wanted: torch.Tensor) -> float:
    scale = wanted.abs().max().item()
    gap = (found - wanted).abs().max().item()
    return gap / scale if scale else gap
