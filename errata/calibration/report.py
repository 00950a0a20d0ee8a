"""What a calibration found, as it is stored and shown."""

import math
from collections.abc import Sequence
from typing import Literal

from errata.calibration.records import Record
from errata.calibration.search import Done
from errata.calibration.tracing import Trace
from errata.calibration.trials import Trial
from errata.edits import Edit
from errata.profiles import CalibrationNote, Measured, PrepareOptions

FORESEEN = 1_000
"""Edits for which the growth of the weights is foreseen."""
_MARGIN = 1.25
_USABLE = 0.5
"""Efficacy below this is no choice: most edits of a stream would be refused."""


class FactSheet(Record):
    """The edits of a calibration, and what the base said when it was asked for the old answers."""

    source: str
    """Where they come from, for people."""
    asked: int
    known: int
    """Facts that it knew."""
    traced: tuple[Edit, ...]
    """Those that are traced; empty where it knew too few."""
    search: tuple[Edit, ...]
    """Written over and over."""
    validation: tuple[Edit, ...]
    """Written once, at the end."""


class Search(Record):
    """What is to be searched. Its digest names the steps that are stored."""

    base: str
    """Digest."""
    moments: str
    """Digest of the second moments, which cover every layer of `starts`."""
    facts: str
    """Digest of the `FactSheet`."""
    edits: int
    """How many of its search edits are written."""
    starts: tuple[PrepareOptions, ...]


class CalibrationReport(Record):
    """Everything that was measured."""

    format: Literal[1] = 1
    search: Search
    facts: FactSheet
    trace: Trace | None
    steps: tuple[Done, ...]
    """In the order they were taken."""
    chosen: Trial
    rivals: tuple[Trial, ...]
    validation: tuple[Trial, ...]
    """The chosen one, then its rivals, on edits that the search never wrote."""
    growth: tuple[tuple[int, float], ...]
    """(edits, mean |W| / mean |W0| of the layer that grew most)."""
    cut_short: bool
    """The budget ended the search before it was through."""

    @property
    def trials(self) -> list[Trial]:
        return [trial for step in self.steps for trial in step.trials]

    @property
    def curve(self) -> list[Trial]:
        """Trials that differ from the chosen one in λ alone, by λ; each λ once."""
        same = {trial.lam: trial for trial in self.trials if (trial.prepare, trial.spread) == (self.chosen.prepare, self.chosen.spread)}
        return [same[lam] for lam in sorted(same)]

    @property
    def doubts(self) -> list[str]:
        """What somebody who relies on the choice has to know."""
        return doubt_choice(self.validation[0] if self.validation else self.chosen)

    def write_note(self, digest: str) -> CalibrationNote:
        """The part that goes into the profile; `digest` is this report's own."""
        return CalibrationNote(
            report=digest,
            known=self.facts.known,
            edits=self.search.edits,
            chosen=_measure(self.validation[0] if self.validation else self.chosen),
            rivals=tuple(map(_measure, self.validation[1:] or self.rivals)),
            curve=tuple(map(_measure, self.curve)),
            growth=self.growth,
        )


def foresee_norm(growth: Sequence[tuple[int, float]], edits: int = FORESEEN) -> float | None:
    """mean |W| / mean |W0| to expect after so many edits, from smaller numbers of them; None without any.

    Edits of different subjects add changes at nearly right angles, so that the square of the norm grows by the same for each:
    ratio² = 1 + c · edits, with c by least squares.
    """
    pairs = [(count, ratio * ratio - 1) for count, ratio in growth if count and math.isfinite(ratio)]
    if not pairs:
        return None
    slope = sum(count * value for count, value in pairs) / sum(count * count for count, _ in pairs)
    return math.sqrt(1 + max(slope, 0.0) * edits)


def set_alarm(growth: Sequence[tuple[int, float]]) -> float | None:
    """The norm ratio at which people are to be alerted: a quarter above what `FORESEEN` edits are expected to bring."""
    foreseen = foresee_norm(growth)
    return None if foreseen is None else round(max(_MARGIN * foreseen, _MARGIN), 2)


def doubt_choice(trial: Trial) -> list[str]:
    """A reason not to take what was chosen, where there is one."""
    if trial.efficacy >= _USABLE:
        return []
    why = (
        "z itself rarely says the target: try more steps, or a larger clamp"
        if trial.reached < _USABLE
        else "z says the target, the weights do not: try a smaller λ, or other layers"
    )
    return [f"No option that was tried writes most edits: with what was chosen {trial.efficacy:.1%} take. Give it more minutes. ({why})"]


def _measure(trial: Trial) -> Measured:
    return Measured(
        layers=trial.prepare.layers,
        site=trial.prepare.site,
        lam=trial.lam,
        spread=trial.spread,
        fit=round(trial.fit, 4),
        efficacy=trial.efficacy,
        generalization=trial.generalization,
        specificity=trial.specificity,
        score=round(trial.score, 4),
        norm_ratio=round(trial.norm_ratio, 4),
    )
