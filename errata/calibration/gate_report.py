"""What a calibration of a gate found, as it is stored."""

from typing import Literal

from errata.calibration.cosines import Cosines, Survey
from errata.calibration.gates import GateDone, GateStart, GateTrial, list_line
from errata.calibration.records import Record
from errata.calibration.report import FactSheet
from errata.profiles import GatePoint, NeuronNote

_TOLD_APART = 0.5
"""Separation below which somebody has to be told."""


class GateSearch(Record):
    """What is to be searched. Its digest names the steps that are stored."""

    base: str
    """Digest."""
    facts: str
    """Digest of the `FactSheet`, its edits completed."""
    survey: str
    """Digest of the `Survey`."""
    edits: int
    """How many of its search edits are written."""
    starts: tuple[GateStart, ...]


class GateReport(Record):
    """Everything that was measured."""

    format: Literal[1] = 1
    search: GateSearch
    facts: FactSheet
    survey: Survey
    steps: tuple[GateDone, ...]
    """In the order they were taken."""
    chosen: GateTrial
    validation: tuple[GateTrial, ...]
    """On edits that the search never wrote: the chosen gate, the published one, the best of each other layer; none of them twice."""
    cut_short: bool
    """The budget ended the search before it was through."""

    @property
    def trials(self) -> list[GateTrial]:
        return [trial for step in self.steps for trial in step.trials]

    @property
    def cosines(self) -> Cosines:
        """At the chosen layer."""
        return self.survey.find(self.chosen.point.layer)

    @property
    def curve(self) -> list[GatePoint]:
        """At the chosen layer and gain, by θ."""
        return [trial.point for trial in list_line(self._here, self.chosen.point.gain)]

    @property
    def gains(self) -> list[GatePoint]:
        """At the chosen layer and θ, by gain."""
        same = {trial.point.gain: trial.point for trial in self._here if trial.point.theta == self.chosen.point.theta}
        return [same[gain] for gain in sorted(same)]

    @property
    def doubts(self) -> list[str]:
        """What somebody who relies on the choice has to know."""
        if self.cosines.separation >= _TOLD_APART:
            return []
        return [
            f"Layer {self.cosines.layer} hardly tells paraphrases from other prompts ({self.cosines.separation:.2f} of 1): at any θ, "
            "neurons answer where they should not, or do not where they should."
        ]

    @property
    def _here(self) -> list[GateTrial]:
        return [trial for trial in self.trials if trial.point.layer == self.chosen.point.layer]

    def write_note(self, digest: str) -> NeuronNote:
        """The part that goes into the profile; `digest` is this report's own."""
        chosen, *rivals = map(_shorten, (trial.point for trial in self.validation))
        return NeuronNote(
            report=digest,
            known=self.facts.known,
            edits=self.search.edits,
            chosen=chosen,
            rivals=tuple(rivals),
            curve=tuple(map(_shorten, self.curve)),
            gains=tuple(map(_shorten, self.gains)),
        )


def _shorten(point: GatePoint) -> GatePoint:
    return point.model_copy(update={"score": round(point.score, 4)})
