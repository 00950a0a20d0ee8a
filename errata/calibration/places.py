"""Where to try writing: sites and layer ranges that a trace, or published values, make likely. The measured search decides between them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from errata.calibration.tracing import Trace
from errata.profiles import Site

_CARRIES = 0.5
"""Share of the lost answer that a restored state must bring back for its place to count as one the fact passes."""
_PEAK = 0.9
"""Share of a site's best effect down to which a layer counts as its peak."""
_MOST = 8
_LENGTHS = (2, 3, 1, 5)
"""Layers written side by side, the likeliest first."""


class Place(NamedTuple):
    """Where residuals are written."""

    site: Site
    layers: tuple[int, ...]


def propose_places(depth: int, trace: Trace | None, published: Sequence[int] | None) -> list[Place]:
    """At most `_MOST` places, the most promising first.

    Layers end where the subject's last token still carries the fact (ROME §2.2 found the early site, MEMIT §4.2 writes up to it), and
    below the last block, since z must have blocks to act through. Where the subject's last token carries nothing, the prompt's last one
    is proposed, from the layer on where the fact has arrived; else it comes last, as a rival.

    Args:
        depth: blocks of the model.
        trace: None where the model knows too few facts.
        published: layers that were published for the family, scaled to this depth.

    Raises:
        ValueError: a model of one block has no place.
    """
    if depth < 2:
        raise ValueError(f"expected a model of at least two blocks, found {depth}")
    found: dict[Place, None] = {}
    if published and published[-1] <= depth - 2:
        found[Place("subject_last", tuple(published))] = None
    ends = _guess_ends(depth) if trace is None else _find_ends(depth, trace)
    arrived = [] if trace is None else _find_arrivals(depth, trace)
    late = [Place("prompt_last", layers) for end in arrived for layers in _end_at(end, (1, 2))]
    early = [Place("subject_last", layers) for round_ in _rounds(ends) for layers in round_]
    # One place of the prompt's end is among the rivals: that the trace points elsewhere is no measurement of it.
    chosen = [*early[: _MOST - len(found) - bool(late)], *late[:1]] if ends else late[:_MOST]
    found |= dict.fromkeys(chosen)
    return list(found)


def _find_ends(depth: int, trace: Trace) -> list[int]:
    """Last layers at the subject's last token: the end of the peak, then its neighbours, then places deeper in the peak."""
    effects = trace.measure_effects("subject_last")[: depth - 1]
    peak = max(effects)
    if peak < _CARRIES:
        return []
    top = max(layer for layer, effect in enumerate(effects) if effect >= _PEAK * peak)
    ends = [top, top - 1, top + 1, round(top * 0.75), round(top * 0.5)]
    return [end for end in dict.fromkeys(ends) if 0 <= end <= depth - 2 and effects[end] >= _CARRIES * peak]


def _find_arrivals(depth: int, trace: Trace) -> list[int]:
    """Layers at the prompt's last token: the first to which the fact has come, and the one after it."""
    effects = trace.measure_effects("prompt_last")[: depth - 1]
    there = [layer for layer, effect in enumerate(effects) if effect >= _CARRIES]
    return there[:2]


def _guess_ends(depth: int) -> list[int]:
    """Nobody knows: a third, a half and a sixth of the depth, where published sites lie."""
    return list(dict.fromkeys(min(round(depth * share), depth - 2) for share in (0.33, 0.5, 0.17)))


def _end_at(end: int, lengths: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(range(end - length + 1, end + 1)) for length in lengths if length <= end + 1]


def _rounds(ends: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """Every length at the first end, then the two likeliest of each other one."""
    for index, end in enumerate(ends):
        yield _end_at(end, _LENGTHS if index == 0 else _LENGTHS[:2])
