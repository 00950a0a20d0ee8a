"""Whether a second run of a comparison says what the first one said: two folders of `errata bench --out`, number by number.

    python -m benchmarks.reproduction FIRST SECOND

Compares every number that both hold: of a method, a size of batches, a stream, a stop and a measure. What a run costs (seconds, memory)
differs by nature and is told apart, as a ratio of second to first. Ends with 1 where a mean over streams leaves the spread that the first
report prints, from the least to the most of its streams.
"""

import math
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

_KEY = ["method", "batch", "seed", "edits", "measure"]
_COSTS = ("write_seconds", "build_seconds", "peak_mib")
_ROUNDING = 1e-9

out = Console(width=140, soft_wrap=True)


def run(
    first: Annotated[Path, typer.Argument(help="Folder with points.parquet.")],
    second: Annotated[Path, typer.Argument(help="The other run's.")],
) -> None:
    both = read_both(first, second)
    costs = both[both.measure.isin(_COSTS)]
    both = both[~both.measure.isin(_COSTS)]
    apart = both[(both.value_x - both.value_y).abs() > 0]
    cells = len(both[["method", "batch", "seed"]].drop_duplicates())
    out.print(f"{len(both):,} numbers of {cells:,} cells are in both: {len(both) - len(apart):,} are equal to the bit")
    for name, some in apart.groupby("measure"):
        out.print(f"  {name}: {len(some):,} differ, by {(some.value_x - some.value_y).abs().max():.3g} at most")
    for name, some in costs.groupby("measure"):
        ratio = (some.value_y / some.value_x).replace([math.inf, -math.inf], math.nan).dropna()
        if len(ratio):
            out.print(f"  [dim]{name}: second ÷ first {ratio.median():.2f} (median of {len(ratio):,})[/]")
    left = find_left(both)
    for row in left.itertuples():
        where = f"{row.method}, batches of {row.batch}, after {row.edits}"
        out.print(f"outside the spread: {where}: {row.measure} {row.first:.4g}, then {row.second:.4g}")
    out.print(f"{'no mean leaves' if left.empty else f'{len(left)} means leave'} the spread that the first report prints")
    raise typer.Exit(0 if left.empty else 1)


def read_both(first: Path, second: Path) -> pd.DataFrame:
    """Numbers that both have, side by side as `value_x` and `value_y`."""
    one, other = (pd.read_parquet(folder / "points.parquet") for folder in (first, second))
    return one.merge(other, on=_KEY).dropna(subset=["value_x", "value_y"])


def find_left(both: pd.DataFrame) -> pd.DataFrame:
    """Means over streams of the second that lie beyond the least or the most stream of the first."""
    spread = both.groupby(["method", "batch", "edits", "measure"]).agg(
        first=("value_x", "mean"), least=("value_x", "min"), most=("value_x", "max"), second=("value_y", "mean")
    )
    slack = _ROUNDING * spread["most"].abs().clip(lower=1)
    return spread[(spread.second < spread.least - slack) | (spread.second > spread.most + slack)].reset_index()


if __name__ == "__main__":
    typer.run(run)
