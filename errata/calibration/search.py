"""The order of a search, as a pure function of what has been measured: places first, then one option after the other around the best,
then how layers share the residual, then the whole curve over λ. Whoever runs it again with the same trials gets the same next step."""

from collections.abc import Iterator, Sequence
from typing import Literal

from errata.calibration.records import Record
from errata.calibration.trials import Trial
from errata.edits import canonical_json, digest_of
from errata.profiles import PrepareOptions, Spread, spell_layers
from errata.suggestions import choose_spread

TOLERANCE = 0.001
"""Scores that differ by less are equal; of equals, what grows the weights less is better."""
_COARSE = (0.95, 0.75, 0.5)
"""Median ρ tried at every step: a small model needs nearly all of its residual, large ones about half (resolution G)."""
_FINE = (0.98, 0.96, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)

_MOST_OPTIONS = 14
"""Steps around the best: each improvement moves it, and there must be an end."""

Phase = Literal["places", "options", "spread", "curve"]


class Step(Record):
    """Edits prepared in one way, solved under each of `spreads` at λ for each of `fits`."""

    phase: Phase
    prepare: PrepareOptions
    spreads: tuple[Spread, ...]
    fits: tuple[float, ...]
    told: str
    """What it is about, for people."""

    @property
    def digest(self) -> str:
        return digest_of(canonical_json(self.model_dump(mode="json", exclude={"told", "phase"})))


class Done(Record):
    """A step and what it found: nothing where `fault` says why it could not be measured."""

    step: Step
    trials: tuple[Trial, ...] = ()
    fault: str | None = None
    seconds: float


def propose_step(starts: Sequence[PrepareOptions], done: Sequence[Done], hurry: bool) -> Step | None:
    """What to measure next; None when the search is over.

    Args:
        starts: a place with options each, in the order they are to be tried.
        done: what was measured, in any order.
        hurry: leave out everything but the curve, which is what the choice of λ stands on.
    """
    known = {item.step.digest for item in done}
    trials = [trial for item in done for trial in item.trials]
    if not hurry or not trials:
        for step in _list_places(starts):
            if step.digest not in known:
                return step
    if not trials:
        return None
    best = choose_best(trials)
    if not hurry:
        if sum(item.step.phase == "options" for item in done) < _MOST_OPTIONS:
            for step in _vary(best):
                if step.digest not in known:
                    return step
        spread = _compare_spreads(best)
        if spread is not None and spread.digest not in known:
            return spread
    curve = Step(phase="curve", prepare=best.prepare, spreads=(best.spread,), fits=_FINE, told="trade-off over λ")
    return None if curve.digest in known else curve


def choose_best(trials: Sequence[Trial]) -> Trial:
    """Of those within `TOLERANCE` of the highest score, the one that grows the weights least."""
    top = max(trial.score for trial in trials)
    return min((trial for trial in trials if trial.score >= top - TOLERANCE), key=lambda trial: (trial.norm_ratio, -trial.score))


def choose_rivals(trials: Sequence[Trial], best: Trial, most: int) -> list[Trial]:
    """The best trial of every other place, option or spread, best first."""
    others: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if (trial.prepare, trial.spread) != (best.prepare, best.spread):
            others.setdefault((trial.prepare.digest, trial.spread), []).append(trial)
    return sorted((choose_best(group) for group in others.values()), key=lambda trial: -trial.score)[:most]


def _list_places(starts: Sequence[PrepareOptions]) -> Iterator[Step]:
    for start in starts:
        told = f"layers {spell_layers(start.layers)}, {start.site.replace('_', '’s ')} token"
        yield Step(phase="places", prepare=start, spreads=(choose_spread(len(start.layers)),), fits=_COARSE, told=told)


def _vary(best: Trial) -> Iterator[Step]:
    """One option after the other, each from the best there is: what is better moves the start of what follows."""
    now = best.prepare
    variants: list[tuple[str, PrepareOptions]] = []
    if now.lr is None:
        variants += [(f"step size {scale:g}", now.model_copy(update={"lr_scale": scale})) for scale in (0.75, 1.5, 3.0)]
    variants += [(f"clamp {clamp:g}", now.model_copy(update={"clamp": clamp})) for clamp in (0.5, 0.75, 1.25, 4.0)]
    variants += [(f"{steps} steps", now.model_copy(update={"steps": steps})) for steps in (15, 25, 40)]
    variants += [("the bare prompt alone", now.model_copy(update={"contexts": now.contexts[:1]}))]
    for told, options in variants:
        if options != now:
            yield Step(phase="options", prepare=options, spreads=(best.spread,), fits=_COARSE, told=told)


def _compare_spreads(best: Trial) -> Step | None:
    if len(best.prepare.layers) == 1:
        return None
    return Step(phase="spread", prepare=best.prepare, spreads=("even", "refresh"), fits=_COARSE, told="spread over the layers")
