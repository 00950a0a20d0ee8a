"""What stages of a calibration hand on, and what people are told at its end. Names and numbers only."""

from errata.calibration.records import Record
from errata.profiles import Measured, PrepareOptions


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


class CalibrationSummary(Record):
    """What a calibration found."""

    base: str
    profile: str
    """Digest; `errata init` takes it by itself."""
    source: str
    """Of the facts."""
    asked: int
    known: int
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
