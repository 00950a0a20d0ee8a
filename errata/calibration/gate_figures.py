"""Two pictures of a gate's calibration: what lies on either side of θ, and what θ and gain trade for what. PNG, by matplotlib."""

from collections.abc import Sequence
from typing import Any

from errata.calibration.cosines import OWN
from errata.calibration.figures import COLOURS
from errata.calibration.gate_report import GateReport
from errata.figures import encode_figure, open_figure
from errata.profiles import GatePoint

_BINS = 60


def draw_cosines(report: GateReport) -> bytes:
    """Distributions at the chosen layer: paraphrases with their own key, everything else with the nearest key, by kind; θ between."""
    cosines, point = report.cosines, report.chosen.point
    kinds = {f"{OWN} (own key)": cosines.own, **cosines.foreign}
    low = min(min(values) for values in kinds.values())
    figure, rows = open_figure((7.5, 1.0 + 0.85 * len(kinds)), len(kinds), grid=None, sharex=True)
    fired = cosines.measure_fired(point.theta)
    for axes, (kind, values), share in zip(rows, kinds.items(), fired.values(), strict=True):
        own = kind.startswith(OWN)
        axes.hist(values, bins=_BINS, range=(low, 1.0), weights=[1 / len(values)] * len(values), color="#5b3fa0" if own else "0.6")
        axes.axvline(point.theta, color="#c2703d", linewidth=1.2, linestyle="--")
        axes.set_title(f"{kind}, {len(values)}: {share:.1%} fire", fontsize=8, loc="left", pad=2)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    rows[-1].set_xlabel("cosine with the key (other than paraphrases: with the nearest one)")
    figure.suptitle(f"Layer {point.layer}, {report.search.edits} edits; dashed: θ = {point.theta:g}", fontsize=9)
    return encode_figure(figure)


def draw_gate(report: GateReport) -> bytes:
    """Efficacy, generalization and specificity along θ, and along the gain, at the chosen layer."""
    point = report.chosen.point
    figure, (left, right) = open_figure((9.5, 4.2), 1, 2, sharey=True)
    _draw_lines(left, report.curve, "theta", point.theta, "θ (dashed: chosen)")
    _draw_lines(right, report.gains, "gain", point.gain, "gain (dashed: chosen)")
    right.set_xscale("log", base=2)
    right.set_xticks([each.gain for each in report.gains], [f"{each.gain:g}" for each in report.gains])
    left.set_title(f"layer {point.layer}, gain {point.gain:g}, {report.search.edits} edits", fontsize=9, loc="left")
    right.set_title(f"layer {point.layer}, θ = {point.theta:g}", fontsize=9, loc="left")
    left.set_ylabel("share of prompts")
    left.legend(frameon=False, fontsize=8)
    return encode_figure(figure)


def _draw_lines(axes: Any, points: Sequence[GatePoint], along: str, chosen: float, label: str) -> None:
    for name, colour in COLOURS.items():
        known = [(getattr(point, along), getattr(point, name)) for point in points if getattr(point, name) is not None]
        axes.plot([x for x, _ in known], [y for _, y in known], marker="o", markersize=3.5, label=name, color=colour)
    axes.axvline(chosen, color="0.5", linewidth=1, linestyle="--")
    axes.set_xlabel(label)
    axes.set_ylim(-0.03, 1.03)
