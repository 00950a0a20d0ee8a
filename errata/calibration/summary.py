"""What stages of a calibration hand on, and what people are told at its end. Names and numbers only."""

from errata.calibration.records import Record
from errata.profiles import GatePoint, Measured, PrepareOptions


class Asked(Record):
    """A base was asked for facts."""

    sheet: str
    """Digest of the `FactSheet`."""
    source: str
    asked: int
    known: int
    traced: int


class Taken(Record):
    """A step was measured."""

    number: int
    told: str
    fault: str | None
    score: float | None
    """The best of its trials."""
    seconds: float


class Surveyed(Record):
    """Cosines were read."""

    sheet: str
    """Digest of the `FactSheet` with its edits completed."""
    survey: str
    """Digest of the `Survey`."""
    completed: int
    """Edits that were given paraphrases."""


class _Ended(Record):
    """What every calibration says at its end."""

    base: str
    profile: str
    """Digest; `errata init` takes it by itself."""
    source: str
    """Of the facts."""
    asked: int
    known: int
    edits: int
    """Written in each trial."""
    steps: int
    trials: int
    cut_short: bool
    seconds: float
    figures: tuple[str, ...]
    run: str
    """MLflow's id of the search."""
    remarks: tuple[str, ...]
    """What somebody who relies on these numbers has to know."""


class CalibrationSummary(_Ended):
    """What a calibration found for D4S."""

    effects: dict[str, tuple[float, ...]]
    """Site → per layer, the share of the lost answer that a restored state brings back; empty where nothing was traced."""
    prepare: PrepareOptions
    lam: float
    spread: str
    chosen: Measured
    """On edits that the search never wrote."""
    rivals: tuple[Measured, ...]
    curve: tuple[Measured, ...]
    growth: tuple[tuple[int, float], ...]
    max_norm_ratio: float | None
    """At which people are alerted."""
    foreseen: float | None
    """The norm ratio to expect after 1,000 edits."""


class LayerRead(Record):
    """What the cosines of one layer leave for θ."""

    layer: int
    separation: float
    """The best that any θ can do: share of paraphrases above it less the share of all else."""
    low: float
    high: float
    """Where θ is sought."""


class GateSummary(_Ended):
    """What a calibration found for iReVa."""

    layer: int
    theta: float
    gain: float
    fired: dict[str, float]
    """Kind of prompt → the share of them at which a neuron fires, at the chosen layer and θ."""
    layers: tuple[LayerRead, ...]
    """All that were read."""
    chosen: GatePoint
    """On edits that the search never wrote."""
    rivals: tuple[GatePoint, ...]
    """On the same edits: the published gate, and the best of other layers."""
    curve: tuple[GatePoint, ...]
    """By θ, on the edits of the search."""
    gains: tuple[GatePoint, ...]
