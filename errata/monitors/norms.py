"""Growth of the edited weights against the base: the earliest sign that a lifelong editor is about to break its model (design §7)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from errata.figures import open_figure, save_figure
from errata.modeling.loading import Base
from errata.modeling.offload import read_parameter
from errata.modeling.patch import add_once
from errata.report import Casting, WeightNorms

_TOLERANCE = 1e-6
_MAX_ITERATIONS = 300


@dataclass(frozen=True)
class NormPoint:
    """The norms of one accepted commit."""

    commit: int
    live: int
    """Live edits after it."""
    norms: tuple[WeightNorms, ...]


@torch.no_grad()
def measure_norms(base: Base, deltas: Mapping[str, torch.Tensor], conditions: Mapping[str, float] | None = None) -> tuple[WeightNorms, ...]:
    """Norms of `W = W0 + Δ` for each edited weight, in the order of their names.

    The base must be untouched: call it outside of `attach`.

    Args:
        deltas: parameter name → Δ [d_out, d_in].
        conditions: parameter name → condition number of the matrix that was solved with, where the editor knows it.
    """
    measured = []
    for name, delta in sorted(deltas.items()):
        stored = read_parameter(base.model, name)
        weight = stored.float()
        change = base.layout.orient(delta).to(weight.device, torch.float32)
        edited = weight + change
        spectral = spectral_norm(change)
        condition = (conditions or {}).get(name)
        measured.append(
            WeightNorms(
                weight=name,
                mean_abs_ratio=_ratio(edited.abs().mean().item(), weight.abs().mean().item()),
                frobenius_ratio=_ratio(edited.norm().item(), weight.norm().item()),
                spectral=_ratio(spectral, 1.0),
                spectral_ratio=_ratio(spectral, spectral_norm(weight)),
                condition=condition if condition is not None and math.isfinite(condition) else None,
                casting=measure_casting(stored, change),
            )
        )
    return tuple(measured)


def measure_casting(weight: torch.Tensor, change: torch.Tensor) -> Casting | None:
    """What a weight of fewer bits loses of a float32 change of its own shape; None where the weight has as many, where there is no
    change, or where the sum is not finite."""
    written = change != 0
    if weight.element_size() >= change.element_size() or not written.any():
        return None
    total = add_once(weight, change)
    norm = change.double().norm().item()
    error = ((total.double() - weight.double()) - change.double()).norm().item() / norm
    if not math.isfinite(error):
        return None
    entries = int(written.sum())
    return Casting(error=error, lost=int((written & (total == weight)).sum()) / entries, norm=norm, entries=entries)


def spectral_norm(matrix: torch.Tensor) -> float:
    """Largest singular value by power iteration on MᵀM in float64, to about 1e-6 relative; NaN if an entry is not finite.

    A full decomposition of a 7B model's projection takes minutes per layer, this takes a few hundred products with vectors. The start
    is fixed, so that equal matrices give equal numbers.
    """
    if not torch.isfinite(matrix).all():
        return math.nan
    matrix = matrix.double()
    start = torch.randn(matrix.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = start.to(matrix.device) / start.norm()
    value = 0.0
    for _ in range(_MAX_ITERATIONS):
        image = matrix.T @ (matrix @ vector)
        length = image.norm().item()
        if length == 0:
            return 0.0
        vector, previous, value = image / length, value, math.sqrt(length)
        if abs(value - previous) <= _TOLERANCE * value:
            break
    return value


def plot_norms(history: Iterable[NormPoint], path: Path) -> Path:
    """Draw mean |W| / mean |W0| of every edited weight against live edits, one marker per commit, as a PNG.

    Returns:
        `path`, for the caller to log.
    """
    points = sorted(history, key=lambda point: point.commit)
    figure, (axes,) = open_figure((7, 4.2))
    for name in sorted({norms.weight for point in points for norms in point.norms}):
        line = [(point.live, norms.mean_abs_ratio) for point in points for norms in point.norms if norms.weight == name]
        known = [(live, ratio) for live, ratio in line if ratio is not None]
        axes.plot([live for live, _ in known], [ratio for _, ratio in known], marker="o", markersize=3.5, linewidth=1.5, label=name)
    axes.axhline(1.0, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.set_xlabel("live edits")
    axes.set_ylabel("mean |W| / mean |W0|")
    axes.set_title(_title(points), fontsize=10)
    if any(point.norms for point in points):
        axes.legend(frameon=False, fontsize=8, title="edited weight (dashed: the base)", title_fontsize=8)
    return save_figure(figure, path)


def _title(points: Sequence[NormPoint]) -> str:
    if not points:
        return "Norm of the edited weights: no commit yet"
    return f"Norm of the edited weights, commits {points[0].commit} to {points[-1].commit}"


def _ratio(value: float, reference: float) -> float | None:
    ratio = value / reference if reference else math.nan
    return ratio if math.isfinite(ratio) else None
