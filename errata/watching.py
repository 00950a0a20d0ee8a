"""What the watch found of a champion, and what of it people must hear of. Pure; no torch: commands that only read it stay quick."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from errata.edits import canonical_json
from errata.errors import FormatError
from errata.report import Locality, Mean, WeightNorms
from errata.settings import GateSettings, WatchSettings

NORM = "errata.norm.exceeded"
FORGETTING = "errata.forgetting.exceeded"
LOCALITY = "errata.locality.exceeded"
REJECTED = "errata.batch.rejected"
STALLED = "errata.stream.stalled"
FAILED = "errata.watch.failed"
CHANGED = "errata.champion.changed"
EVENTS = (NORM, FORGETTING, LOCALITY, REJECTED, STALLED, FAILED, CHANGED)
"""Every event there is."""

_HOUR = 3_600.0


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerWatch(_Part):
    """One edited weight."""

    layer: int
    part: str = ""
    """Module of the block, where it is not the one that edits are written into: an adapter changes others."""
    norms: WeightNorms
    growth: float | None
    """mean |W| / mean |W0| gained per 100 live edits: `find_growth`."""

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.part}" if self.part else str(self.layer)


class AgeRetention(_Part):
    """A sample of the live edits of one age."""

    age: str
    """Label of the bucket, in commits since acceptance."""
    immediate: Mean
    """Efficacy when they were accepted."""
    retained: Mean
    """Efficacy now."""
    forgotten: tuple[str, ...] = ()
    """Some of those that no longer take."""


class Ability(_Part):
    """Accuracy on an ability set."""

    source: str
    base: Mean
    champion: Mean


class Alarm(_Part):
    """One thing that people must hear of; the event that carries it."""

    event: str
    measure: str
    """What was measured, in a few words."""
    value: float | None
    """None where there is no one number."""
    threshold: float | None
    message: str
    """A sentence for people."""


class WatchReport(_Part):
    """All that one run of the watch measured of one champion."""

    format: Literal[1] = 1
    stream: str
    time: str
    """ISO 8601 with offset."""
    run: str | None
    """Id of the flow run."""
    commit: int
    """The champion's."""
    head: int
    version: int | None
    """MLflow's number of the champion; None where it shows none."""
    shown: int | None
    """The commit that MLflow's alias shows."""
    live: int
    """Live edits at the head."""
    layers: tuple[LayerWatch, ...]
    """Empty while no edit is live."""
    ages: tuple[AgeRetention, ...]
    """Those that have live edits, youngest first."""
    locality: Locality
    perplexity_base: float | None
    """On the texts of the fixed probe."""
    perplexity: float | None
    ability: Ability | None
    seconds: float
    alarms: tuple[Alarm, ...] = ()

    @property
    def perplexity_ratio(self) -> float | None:
        """Champion over base."""
        return self.perplexity / self.perplexity_base if self.perplexity and self.perplexity_base else None

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises FormatError: not a watch report, or one of a newer format."""
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "report"
            raise FormatError(f"watch report: expected format 1 of this Errata, found a mismatch at {where}: {first['msg']}") from None

    def metrics(self) -> dict[str, float]:
        """The measured numbers under flat names, for a tracking server."""
        named: dict[str, float | None] = {
            "live": self.live,
            "locality.kl": self.locality.kl,
            "locality.agreement": self.locality.agreement,
            "perplexity": self.perplexity,
            "perplexity_base": self.perplexity_base,
            "perplexity_ratio": self.perplexity_ratio,
            "alarms": len(self.alarms),
        }
        for item in self.layers:
            named |= {f"norms.{item.name}.{name}": value for name, value in item.norms.numbers.items()}
            named[f"norms.{item.name}.growth_per_100"] = item.growth
        for age in self.ages:
            named[f"retention.{age.age}.immediate"] = age.immediate.value
            named[f"retention.{age.age}.retained"] = age.retained.value
        if self.ability:
            named |= {"ability.base": self.ability.base.value, "ability.champion": self.ability.champion.value}
        return {name: float(value) for name, value in named.items() if value is not None}


def find_growth(points: Mapping[int, float]) -> float | None:
    """Slope of mean |W| / mean |W0| against live edits, per 100 edits, by least squares; the base, (0, 1), is one of the points.

    Args:
        points: live edits → ratio, of recent commits. None is returned where all have no live edits.
    """
    every = {0: 1.0} | {live: ratio for live, ratio in points.items() if live}
    middle, mean = sum(every) / len(every), sum(every.values()) / len(every)
    spread = sum((live - middle) ** 2 for live in every)
    return 100 * sum((live - middle) * (ratio - mean) for live, ratio in every.items()) / spread if spread else None


def find_alarms(report: WatchReport, norm_ratio: float, settings: WatchSettings, n_min: int) -> tuple[Alarm, ...]:
    """The thresholds that a champion exceeds.

    Args:
        norm_ratio: of mean |W| / mean |W0|, resolved from settings and profile.
        n_min: a share over fewer edits than this says nothing.
    """
    found = []
    for layer in report.layers:
        ratio = layer.norms.mean_abs_ratio
        if ratio is None or ratio > norm_ratio:
            said = "is not finite" if ratio is None else f"is {ratio:.2f} times the base's"
            message = f"mean |W| of layer {layer.name} {said}, expected at most {norm_ratio:.2f} times."
            measure = f"norm ratio of layer {layer.name}"
            found.append(Alarm(event=NORM, measure=measure, value=ratio, threshold=norm_ratio, message=message))
    for age in report.ages:
        kept = age.retained
        if kept.value is not None and kept.edits >= n_min and kept.value < settings.min_retention - 1e-9:
            before = "" if age.immediate.value is None else f" ({age.immediate.value:.3f} when they were accepted)"
            message = (
                f"Retention of edits {age.age} commits old is {kept.value:.3f} over {kept.edits} edits{before}, "
                f"expected at least {settings.min_retention:.3f}."
            )
            measure = f"retention at age {age.age}"
            found.append(Alarm(event=FORGETTING, measure=measure, value=kept.value, threshold=settings.min_retention, message=message))
    kl, most = report.locality.kl, settings.max_locality_kl
    if report.locality.positions and (kl is None or kl > most):
        said = "is not finite" if kl is None else f"is {kl:.3f} nats"
        message = f"KL(base ‖ champion) on the fixed probe {said} over {report.locality.positions} positions, expected at most {most:.3f}."
        found.append(Alarm(event=LOCALITY, measure="locality KL", value=kl, threshold=most, message=message))
    return tuple(found)


def find_stall(waited: float | None, accepted: float, succeeded: float, hours: float) -> Alarm | None:
    """Whether nobody is at work any more.

    Args:
        waited: seconds since the oldest file of the inbox came; None where none waits.
        accepted: seconds since the newest accepted commit, or the stream's first.
        succeeded: seconds since a run last came to its end.
        hours: more than this is a stall.
    """
    if succeeded > hours * _HOUR:
        message = f"No run has come to its end for {succeeded / _HOUR:.1f} hours, expected one every {hours:g}."
        return Alarm(event=STALLED, measure="hours without a successful run", value=succeeded / _HOUR, threshold=hours, message=message)
    idle = min(waited, accepted) if waited is not None else 0.0
    if idle > hours * _HOUR:
        message = f"Edits wait, and none has been accepted for {idle / _HOUR:.1f} hours, expected some within {hours:g}."
        return Alarm(event=STALLED, measure="hours that edits wait", value=idle / _HOUR, threshold=hours, message=message)
    return None


def explain_rejection(metrics: Mapping[str, float], reasons: tuple[str, ...], gate: GateSettings) -> tuple[Alarm, ...]:
    """A batch that the gate refused, and the budgets of the whole that it exceeded. They are events of their own, since what they tell of
    is the same growth, forgetting or drift, met before anybody is served it.

    Args:
        metrics: of the last round, as `Report.metrics` names them.
    """
    norms = {name: value for name, value in metrics.items() if name.startswith("norms.") and name.endswith(".mean_abs_ratio")}
    worst = max(norms, key=norms.__getitem__, default="")
    retained, kl = metrics.get("retention"), metrics.get("locality.kl")
    found = []
    if worst and norms[worst] > gate.max_norm_ratio:
        weight = worst.removeprefix("norms.").removesuffix(".mean_abs_ratio")
        found.append((NORM, f"norm ratio of {weight}", norms[worst], gate.max_norm_ratio))
    if retained is not None and retained < gate.min_retention - 1e-9:
        found.append((FORGETTING, "retention", retained, gate.min_retention))
    if kl is not None and kl > gate.max_locality_kl:
        found.append((LOCALITY, "locality KL", kl, gate.max_locality_kl))
    told = reasons[0] if reasons else "no reason is known"
    first = found[0] if found else (REJECTED, "the gate's decision", None, None)
    rejected = Alarm(event=REJECTED, measure=first[1], value=first[2], threshold=first[3], message=f"The gate refused a batch: {told}")
    blocked = (
        Alarm(event=event, measure=name, value=value, threshold=least, message=f"Blocked by the gate: {name} would be {value:.3f}.")
        for event, name, value, least in found
    )
    return (rejected, *blocked)
