"""Two pictures of a calibration: where the model holds facts, and what λ trades for what. PNG, by matplotlib."""

from collections.abc import Sequence

from errata.calibration.report import CalibrationReport
from errata.calibration.tracing import Trace
from errata.calibration.trials import Trial
from errata.figures import encode_figure, open_figure

_SITES = {"subject_last": "subject’s last token", "prompt_last": "prompt’s last token"}
COLOURS = {"efficacy": "#5b3fa0", "generalization": "#c2703d", "specificity": "#2f7f6f"}


def draw_trace(trace: Trace) -> bytes:
    """Heat map, sites × layers: the share of the lost answer that comes back when one hidden state is restored."""
    rows = [trace.measure_effects(site) for site in _SITES]  # type: ignore[arg-type]
    figure, (axes,) = open_figure((max(6.0, 0.32 * len(rows[0]) + 2.5), 2.4), grid=None)
    image = axes.imshow(rows, aspect="auto", cmap="Purples", vmin=0, vmax=1)
    axes.set_yticks(range(len(_SITES)), list(_SITES.values()))
    step = max(1, len(rows[0]) // 16)
    axes.set_xticks(range(0, len(rows[0]), step))
    axes.set_xlabel("layer whose output is restored")
    told = f"Causal trace of {trace.facts} facts: probability of the answer {trace.clean:.2f}, corrupted {trace.corrupted:.2f}"
    figure.suptitle(told, fontsize=8)
    figure.colorbar(image, label="share restored")
    return encode_figure(figure)


def draw_curve(report: CalibrationReport) -> bytes:
    """Efficacy and generalization against specificity along λ for the chosen options, among all other trials."""
    figure, (left, right) = open_figure((9.5, 4.2), 1, 2)
    curve = report.curve
    for name, colour in COLOURS.items():
        known = _read(curve, name)
        left.plot([lam for lam, _ in known], [value for _, value in known], marker="o", markersize=3.5, label=name, color=colour)
    left.axvline(report.chosen.lam, color="0.5", linewidth=1, linestyle="--")
    left.set_xscale("log")
    left.set_xlabel("λ (dashed: chosen)")
    left.set_ylabel("share of prompts")
    left.set_ylim(-0.03, 1.03)
    left.legend(frameon=False, fontsize=8)
    left.set_title(f"layers {list(report.chosen.prepare.layers)}, {report.chosen.edits} edits", fontsize=9, loc="left")
    others = [trial for trial in report.trials if trial.specificity is not None]
    right.scatter([_specific(t) for t in others], [t.efficacy for t in others], s=14, color="0.75", label="other trials")
    own = [trial for trial in curve if trial.specificity is not None]
    line = [(_specific(trial), trial.efficacy) for trial in own]
    right.plot([x for x, _ in line], [y for _, y in line], marker="o", markersize=3.5, color="#5b3fa0", label="chosen options, along λ")
    if report.chosen.specificity is not None:
        right.scatter([_specific(report.chosen)], [report.chosen.efficacy], s=70, facecolors="none", edgecolors="#5b3fa0", label="chosen")
    right.set_xlabel("specificity (agreement with the base)")
    right.set_ylabel("efficacy")
    right.legend(frameon=False, fontsize=8)
    return encode_figure(figure)


def _read(curve: Sequence[Trial], name: str) -> list[tuple[float, float]]:
    return [(trial.lam, getattr(trial, name)) for trial in curve if getattr(trial, name) is not None]


def _specific(trial: Trial) -> float:
    assert trial.specificity is not None, "only trials with neighbours are drawn"
    return trial.specificity
