"""The pictures of a comparison."""

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from errata.comparison.cells import MEASURES
from errata.comparison.summary import Comparison
from errata.figures import open_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osv^D<>PX*hd"
_CAP = 1e4
"""Norm ratios beyond this are drawn there."""


def draw_course(comparison: Comparison, batch: int, path: Path, caption: str) -> Path:
    """Efficacy, generalization, specificity and norms over the length of the stream: mean over seeds, the bar from least to most."""
    measures = ("efficacy", "generalization", "specificity", "norm_ratio")
    figure, axes = open_figure((13, 9), 2, 2)
    for axis, measure in zip(axes, measures, strict=True):
        for number, method in enumerate(comparison.methods):
            stops = [stop for stop in comparison.list_stops(batch) if comparison.gather(method, batch, stop, measure)]
            values = [[min(item, _CAP) for item in comparison.gather(method, batch, stop, measure)] for stop in stops]
            if not stops or method == "base":
                continue
            means = [fmean(some) for some in values]
            # A mean of equal numbers may leave them by rounding, to either side.
            below = [max(mean - min(some), 0.0) for mean, some in zip(means, values, strict=True)]
            above = [max(max(some) - mean, 0.0) for mean, some in zip(means, values, strict=True)]
            axis.errorbar(stops, means, yerr=[below, above], label=comparison.titles[method], **_style(number))
        axis.set(xscale="log", xlabel="edits so far", title=MEASURES[measure].title)
        if measure == "norm_ratio":
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.03, 1.03)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return _save(figure, path, f"batches of {batch}. {caption}")


def draw_trade(comparison: Comparison, batch: int, path: Path, caption: str) -> Path:
    """What is learned against what is left alone, at the end of the stream."""
    figure, axes = open_figure((13, 5.5), 1, 2)
    for axis, (across, up) in zip(axes, (("generalization", "specificity"), ("efficacy", "ability")), strict=True):
        for number, method in enumerate(comparison.methods):
            left, right = (comparison.gather(method, batch, None, name) for name in (across, up))
            if left and right:
                axis.plot(fmean(left), fmean(right), label=comparison.titles[method], **{**_style(number), "linestyle": ""})
        axis.set(xlabel=MEASURES[across].title, ylabel=MEASURES[up].title, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return _save(figure, path, f"after the last edit, batches of {batch}. {caption}")


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"C{number % 10}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": ("-", "--", ":")[number // 10 % 3],
        "markersize": 5,
    }


def _save(figure: "Figure", path: Path, caption: str) -> Path:
    figure.suptitle(caption, fontsize=8, x=0.01, ha="left")  # the legend is at the right
    return save_figure(figure, path, dpi=110)
