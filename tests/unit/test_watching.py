"""What of a watch's numbers is an alarm, and the arithmetic of growth."""

import pytest

from errata.errors import FormatError
from errata.report import Locality, Mean, WeightNorms
from errata.settings import GateSettings, WatchSettings
from errata.watching import (
    FORGETTING,
    LOCALITY,
    NORM,
    REJECTED,
    STALLED,
    AgeRetention,
    LayerWatch,
    WatchReport,
    explain_rejection,
    find_alarms,
    find_growth,
    find_stall,
)


def make_report(ratio: float | None = 1.2, retained: float = 1.0, edits: int = 10, kl: float | None = 0.1) -> WatchReport:
    norms = WeightNorms(weight="h.3", mean_abs_ratio=ratio, frobenius_ratio=1.1, spectral=1.0, spectral_ratio=0.2, condition=50.0)
    return WatchReport(
        stream="main",
        time="2026-11-01T12:00:00+00:00",
        run=None,
        commit=7,
        head=8,
        version=6,
        shown=7,
        live=40,
        layers=(LayerWatch(layer=3, norms=norms, growth=0.5),),
        ages=(AgeRetention(age="1-9", immediate=Mean(value=1.0, edits=edits), retained=Mean(value=retained, edits=edits)),),
        locality=Locality(kl=kl, agreement=0.9, positions=100),
        perplexity_base=10.0,
        perplexity=11.0,
        ability=None,
        seconds=1.5,
    )


def alarms(report: WatchReport) -> list[str]:
    return [alarm.event for alarm in find_alarms(report, 2.0, WatchSettings(), 5)]


def test_a_champion_within_the_thresholds_alarms_nobody() -> None:
    assert alarms(make_report()) == []


def test_each_threshold_is_an_event_with_value_and_threshold() -> None:
    found = find_alarms(make_report(ratio=3.0, retained=0.5, kl=0.9), 2.0, WatchSettings(), 5)
    assert [(alarm.event, alarm.value, alarm.threshold) for alarm in found] == [
        (NORM, 3.0, 2.0),
        (FORGETTING, 0.5, 0.85),
        (LOCALITY, 0.9, 0.5),
    ]
    assert found[0].message == "mean |W| of layer 3 is 3.00 times the base's, expected at most 2.00 times."
    assert "1-9 commits old is 0.500 over 10 edits (1.000 when they were accepted)" in found[1].message


def test_what_is_not_finite_is_an_alarm_and_a_small_sample_is_none() -> None:
    assert alarms(make_report(ratio=None, kl=None)) == [NORM, LOCALITY]
    assert alarms(make_report(retained=0.0, edits=4)) == []


def test_growth_is_the_slope_from_the_base_per_hundred_edits() -> None:
    assert find_growth({100: 1.5, 200: 2.0}) == pytest.approx(0.5)
    assert find_growth({50: 1.1}) == pytest.approx(0.2)
    assert find_growth({}) is None and find_growth({0: 1.0}) is None


HOUR = 3_600.0


@pytest.mark.parametrize(
    ("waited", "accepted", "succeeded", "measure"),
    [
        (None, 100 * HOUR, HOUR, None),
        (HOUR, 100 * HOUR, HOUR, None),  # a quiet stream, and a file that has just come
        (30 * HOUR, HOUR, HOUR, None),  # a long queue that is being worked off
        (30 * HOUR, 40 * HOUR, HOUR, "hours that edits wait"),
        (None, HOUR, 25 * HOUR, "hours without a successful run"),
    ],
)
def test_a_stall(waited: float | None, accepted: float, succeeded: float, measure: str | None) -> None:
    found = find_stall(waited, accepted, succeeded, 24.0)
    assert (found.measure if found else None) == measure
    assert found is None or (found.event == STALLED and found.value and found.value > 24 and found.threshold == 24)


def test_a_rejection_names_the_budget_that_was_exceeded() -> None:
    metrics = {"norms.h.1.mean_abs_ratio": 3.0, "norms.h.2.mean_abs_ratio": 12.0, "norms.h.2.spectral": 99.0, "locality.kl": 0.1}
    rejected, blocked = explain_rejection(metrics, ("mean |W| of h.2 is too large.",), GateSettings())
    assert (rejected.event, rejected.value, rejected.threshold) == (REJECTED, 12.0, 10.0)
    assert "mean |W| of h.2 is too large." in rejected.message
    assert (blocked.event, blocked.measure, blocked.value) == (NORM, "norm ratio of h.2", 12.0)
    (alone,) = explain_rejection({"efficacy": 1.0}, ("e1: It did not take.",), GateSettings())
    assert (alone.event, alone.value) == (REJECTED, None)


def test_reports_are_read_back_and_others_refused() -> None:
    report = make_report()
    assert WatchReport.from_bytes(report.to_bytes()) == report
    assert report.metrics()["perplexity_ratio"] == pytest.approx(1.1)
    assert report.metrics()["norms.3.condition"] == 50.0
    with pytest.raises(FormatError, match="format"):
        WatchReport.from_bytes(report.to_bytes().replace(b'"format":1', b'"format":2'))
