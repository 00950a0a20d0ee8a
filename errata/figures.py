"""Figures without a display or global state, and PNG files that say nothing of what drew them."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def open_figure(
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    *,
    grid: Literal["both", "y"] | None = "both",
    sharex: bool = False,
    sharey: bool = False,
) -> tuple["Figure", list["Axes"]]:
    """A figure and its axes, row by row.

    Args:
        size: width and height in inches.
        grid: which lines lie behind what is drawn.
        sharex, sharey: whether the axes have equal scales.
    """
    # Imported here: matplotlib takes a second to load.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flatten())
    for axis in axes:
        if grid:
            axis.grid(axis=grid, alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def encode_figure(figure: "Figure") -> bytes:
    """As PNG."""
    data = BytesIO()
    figure.savefig(data, format="png", dpi=150, metadata={"Software": None})
    return data.getvalue()


def save_figure(figure: "Figure", path: Path, dpi: int = 150) -> Path:
    """As a PNG file; `path`, for the caller to log."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    return path
