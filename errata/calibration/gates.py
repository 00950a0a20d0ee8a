"""The order of a search for a layer, θ and gain, as a pure function of what has been measured: every likely layer at two θ and all gains,
then the best one at all θ. Whoever runs it again with the same trials gets the same next step."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

from errata.calibration.cosines import Cosines
from errata.calibration.records import Record
from errata.calibration.search import TOLERANCE
from errata.edits import canonical_json, digest_of
from errata.profiles import GateOptions, GatePoint

PUBLISHED = GateOptions()
GAINS = (80.0, 40.0, 160.0, 20.0)
"""The published one first."""
_CANDIDATES = 3
"""Layers that are tried."""
_BETWEEN = 5
"""θ from one end of the range to the other."""
_HIGHEST = 0.995
_WIDE_ENOUGH = 0.5
"""Share of the widest plateau that a smaller gain must leave."""

Gate = tuple[float, float]
"""θ and gain."""


class GateStart(Record):
    """A layer with the θ to try there."""

    layer: int
    thetas: tuple[float, ...]
    """Ascending; the published one is among them."""
    middle: float
    """Of the range that its cosines leave."""
    least: float
    """θ that may be chosen: below it something that no edit is about fires, of which specificity asks only the neighbours. 0 where the
    distributions overlap, so that there is no such θ."""


class GateTrial(Record):
    """What one setting of the gate did to the same edits as all others of its search."""

    point: GatePoint
    edits: int
    seconds: float


class GateStep(Record):
    """Edits read at one layer, and asked through several gates."""

    phase: Literal["layers", "gates"]
    layer: int
    gates: tuple[Gate, ...]
    told: str
    """What it is about, for people."""

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json", include={"layer", "gates"})))


class GateDone(Record):
    """A step and what it found: nothing where `fault` says why it could not be measured."""

    step: GateStep
    trials: tuple[GateTrial, ...] = ()
    fault: str | None = None
    seconds: float


def propose_starts(layers: Sequence[Cosines], published: int) -> tuple[GateStart, ...]:
    """Layers to try, the most promising first: the published share of the depth, then those whose cosines are told apart best.

    Args:
        layers: what was read; without the published layer, that one is left out.
    """
    ordered = sorted(layers, key=lambda one: (one.layer != published, -round(one.separation, 3), -one.layer))
    return tuple(_make_start(one) for one in ordered[:_CANDIDATES])


def propose_gates(starts: Sequence[GateStart], done: Sequence[GateDone], hurry: bool) -> GateStep | None:
    """What to measure next; None when the search is over.

    Args:
        done: what was measured, in any order.
        hurry: try no other layer once there is one.
    """
    known = {item.step.digest for item in done}
    trials = [trial for item in done for trial in item.trials]
    if not hurry or not trials:
        for start in starts:
            thetas = dict.fromkeys((start.middle, PUBLISHED.theta))
            gates = tuple((theta, gain) for gain in GAINS for theta in thetas)
            step = GateStep(phase="layers", layer=start.layer, gates=gates, told=f"layer {start.layer}")
            if step.digest not in known:
                return step
    if not trials:
        return None
    best = choose_layer(trials, starts)
    start = next(start for start in starts if start.layer == best)
    tried = {gate for item in done if (item.step.phase, item.step.layer) == ("layers", best) for gate in item.step.gates}
    gates = tuple((theta, gain) for gain in GAINS for theta in start.thetas if (theta, gain) not in tried)
    step = GateStep(phase="gates", layer=best, gates=gates, told=f"θ and gain at layer {best}")
    return None if step.digest in known else step


def choose_layer(trials: Sequence[GateTrial], starts: Sequence[GateStart]) -> int:
    """The layer with the highest score; of equal ones the first of `starts`."""
    best = {layer: max(trial.point.score for trial in trials if _at(trial, layer)) for layer in {trial.point.layer for trial in trials}}
    top = max(best.values())
    return next(start.layer for start in starts if best.get(start.layer, -1.0) >= top - TOLERANCE)


def choose_gate(trials: Sequence[GateTrial], starts: Sequence[GateStart], layer: int) -> GateTrial:
    """The trial with the largest margin among those of one layer that are within `TOLERANCE` of the highest score.

    At each gain, neighbouring θ that are that good make a plateau. Taken is the smallest gain that has one at least half as wide as the
    widest of all: louder neurons bear a higher θ, but what they say by mistake is louder, too. In it the θ nearest to its middle, the
    higher one of two.
    """
    least = next(start.least for start in starts if start.layer == layer)
    trials = [trial for trial in trials if _at(trial, layer) and trial.point.theta >= least]
    top = max(trial.point.score for trial in trials)
    plateaus: list[list[GateTrial]] = []
    for gain in sorted({trial.point.gain for trial in trials}):
        line = list_line(trials, gain)
        plateaus += [list(run) for good, run in groupby(line, lambda trial: trial.point.score >= top - TOLERANCE) if good]
    widest = max(map(_measure_width, plateaus))
    wide = [run for run in plateaus if _measure_width(run) >= _WIDE_ENOUGH * widest]
    chosen = min(wide, key=lambda run: (run[0].point.gain, -_measure_width(run)))
    middle = (chosen[0].point.theta + chosen[-1].point.theta) / 2
    return min(chosen, key=lambda trial: (round(abs(trial.point.theta - middle), 6), -trial.point.theta))


def list_line(trials: Sequence[GateTrial], gain: float) -> list[GateTrial]:
    """Trials of one gain by θ, each θ once."""
    line = {trial.point.theta: trial for trial in trials if trial.point.gain == gain}
    return [line[theta] for theta in sorted(line)]


def _make_start(cosines: Cosines) -> GateStart:
    """θ over the range, and one as far below it as it is wide, which shows what is lost there."""
    low, high = cosines.range
    step = (high - low) / (_BETWEEN - 1)
    within = [_keep_valid(low + number * step) for number in range(_BETWEEN)]
    middle = within[_BETWEEN // 2]
    thetas = {_keep_valid(2 * low - high), *within, PUBLISHED.theta}
    return GateStart(layer=cosines.layer, thetas=tuple(sorted(thetas)), middle=middle, least=0.0 if cosines.overlap else within[0])


def _keep_valid(theta: float) -> float:
    return round(min(max(theta, 0.0), _HIGHEST), 3)


def _measure_width(run: Sequence[GateTrial]) -> float:
    return run[-1].point.theta - run[0].point.theta


def _at(trial: GateTrial, layer: int) -> bool:
    return trial.point.layer == layer
