"""Where MEMIT without history begins to forget, or to collapse, and whether D4S holds there: the whole grid, nothing chosen afterwards.

    python -m benchmarks.collapse [--edits 1000] [--seeds 2] [--lambdas 1,0.1,0.01] [--kinds slots,mixed] [--jobs 2] [--quick]

Streams of the built-in world, one edit at a time: `slots` (another fact each time, several of one person among them) and `mixed` (three
edits per person, some of them re-edits of one fact, half of the targets of two words), under the profile's λ and fractions of it. Each
line of the grid is one `errata bench`, kept in the cache like any other, with MEMIT on the drifting model, MEMIT with history, ROME and
D4S. Efficacy is over all live edits, teacher forced; the norm is mean |W| / mean |W0| of the weight that grew most. † destroyed.
"""

import os
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from errata.builtin import CAVEAT
from errata.comparison.cells import MEASURES
from errata.comparison.summary import Comparison, spell_spread
from errata.settings import load_settings
from tasks.comparing import Request, compare_methods

METHODS = ("base", "d4s", "memit", "memit_history", "rome")
MEASURED = ("efficacy", "generalization", "specificity", "ability", "norm_ratio")

out = Console(width=170)


def run(
    edits: Annotated[int, typer.Option(min=10, help="Of each stream.")] = 1_000,
    seeds: Annotated[int, typer.Option(min=1, help="Streams per line.")] = 2,
    lambdas: Annotated[str, typer.Option(help="Multiples of the profile's λ.")] = "1,0.1,0.01",
    kinds: Annotated[str, typer.Option(help="Of slots, mixed and distinct.")] = "slots,mixed",
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = os.cpu_count() or 1,
    quick: Annotated[bool, typer.Option(help="60 edits and one stream per line, to see it run.")] = False,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    settings = load_settings()
    edits, seeds = (60, 1) if quick else (edits, seeds)
    for kind in kinds.split(","):
        for lam in map(float, lambdas.split(",")):
            request = Request("builtin", METHODS, edits, (1,), seeds, kind=kind, lam=lam, said=10, jobs=jobs)  # type: ignore[arg-type]
            _print_line(compare_methods(settings, request).comparison, kind, lam)
    out.print(f"[dim]load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores at the end[/]")


def _print_line(comparison: Comparison, kind: str, lam: float) -> None:
    """One line of the grid: all methods at every stop."""
    stops = comparison.list_stops(1)
    streams = f"{len(comparison.seeds)} stream{'s' if len(comparison.seeds) > 1 else ''}"
    table = Table(title=f"{kind}, λ × {lam:g}: {stops[-1]:,} edits one by one, {streams}", title_justify="left")
    table.add_column("method")
    table.add_column("measure")
    for stop in stops:
        table.add_column(f"{stop:,}", justify="right")
    for method in METHODS[1:]:
        for measure in MEASURED:
            cells = [spell_spread(comparison.gather(method, 1, stop, measure), measure) for stop in stops]
            first = measure == MEASURED[0]
            table.add_row(_name(comparison, method) if first else "", MEASURES[measure].title, *cells, end_section=measure == MEASURED[-1])
    out.print(table)


def _name(comparison: Comparison, method: str) -> str:
    faults = [found.fault for seed in comparison.seeds if (found := comparison.find(method, 1, seed)) and found.fault]
    return f"{comparison.titles[method]} † {'; '.join(faults)}" if faults else comparison.titles[method]


if __name__ == "__main__":
    typer.run(run)
