"""The command that compares editing methods: `bench`."""

import os
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from errata.builtin import CAVEAT, NAMED
from errata.comparison.cells import FULL, MEASURES, QUICK
from errata.errors import InputError
from errata.settings import load_settings
from flows.commandline import EPILOG, AsJson, CorpusPath, out, print_json
from flows.prefect_server import ready_prefect

if TYPE_CHECKING:
    from errata.comparison.summary import Comparison
    from tasks.comparing import Compared

SMALL = (
    "Measured on a base of one's own. A small model that was trained for this compares the bookkeeping of methods and says little about "
    "large language models."
)
_SHOWN = ("efficacy", "generalization", "specificity", "ability", "norm_ratio")


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(bench)


def bench(
    methods: Annotated[str, typer.Option(help="Names with commas between, or 'all'.")] = "all",
    edits: Annotated[int | None, typer.Option(min=2, help="Of each stream: 1,000, or 100.")] = None,
    batch: Annotated[str | None, typer.Option(help="Sizes of batches, with commas between: 1,10,100, or 1,20.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Streams: 3, or 2.")] = None,
    base: Annotated[str, typer.Option(help="'builtin', 'builtin-contextual', a model folder, or a Hugging Face id.")] = "builtin",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None,
    data: Annotated[Path | None, typer.Option(help="Edits in any form that `errata submit` reads; the built-in world's without.")] = None,
    kind: Annotated[str, typer.Option(help="Of the built-in world's edits: 'slots', 'distinct', or 'mixed' with re-edits.")] = "slots",
    profile: Annotated[str | None, typer.Option(help="Of D4S, shared by all that write weights: JSON file or digest.")] = None,
    corpus: CorpusPath = None,
    lam: Annotated[float, typer.Option(min=1e-6, help="λ of all that have one, as a multiple of the profile's.")] = 1.0,
    judged: Annotated[int | None, typer.Option(min=1, help="Edits asked about with all their probes at each stop: 200, or 60.")] = None,
    said: Annotated[int | None, typer.Option(min=1, help="Edits asked for a greedy answer at each stop: 50, or 30.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes side by side; by default one per core, or one on a GPU.")] = None,
    to: Annotated[Path, typer.Option("--out", help="Folder for the report.")] = Path("errata-bench"),
    quick: Annotated[
        bool, typer.Option(help="The whole table within ten minutes on two cores: of two sizes named here the second.")
    ] = False,
    afresh: Annotated[bool, typer.Option(help="Measure again what was measured before.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare editing methods: one stream of edits through each of them, from the same base, with the same probes.

    What is measured is kept: the same command goes on where it was interrupted, and one with more methods, batches or seeds measures only
    those. The report, its pictures and the raw numbers go to a folder, and into MLflow.
    """
    settings = load_settings()
    if kind not in ("slots", "distinct", "mixed"):
        raise InputError(f"kind: expected 'slots', 'distinct' or 'mixed', found {kind!r}")
    if data is not None and not data.exists():
        raise InputError(f"{data}: expected a file of edits, found none")
    ready_prefect(settings)
    from errata.comparison.catalogue import RECIPES, choose_methods
    from errata.comparison.report import Heading, write_report
    from errata.modeling.loading import choose_device
    from tasks.comparing import Request, attach_report, compare_methods

    default = QUICK if quick else FULL
    length = edits or default.edits
    cores = 1 if str(choose_device(settings.device)) != "cpu" else os.cpu_count() or 1
    request = Request(
        base=base,
        methods=tuple(choose_methods(methods)),
        edits=length,
        batches=_read_batches(batch, length) if batch is not None else tuple(size for size in default.batches if size <= length),
        seeds=seeds or default.seeds,
        revision=revision,
        data=data,
        kind=kind,  # type: ignore[arg-type]
        profile=profile,
        corpus=corpus,
        lam=lam,
        judged=judged or default.judged,
        said=said or default.said,
        jobs=jobs or cores,
        afresh=afresh,
    )
    compared = compare_methods(settings, request)
    heading = Heading(
        title="Editing methods, one stream of edits through each",
        command=" ".join(["errata", *sys.argv[1:]]),
        base=_describe_base(base, compared),
        data=compared.materials[0].source,
        caveat=CAVEAT if base in NAMED else SMALL,
        remarks=[f"λ is {lam:g} times the profile's"] if lam != 1 else [],
    )
    files = write_report(compared.comparison, RECIPES, heading, to)
    attach_report(compared, files)
    if as_json:
        told = {"report": [str(path) for path in files], "run": compared.runs.run_id, "measured": compared.measured}
        print_json({**told, "cells": [result.model_dump(mode="json", exclude={"rows"}) for result in compared.comparison.results]})
        return
    for size in compared.comparison.batches:
        out.print(_build_table(compared.comparison, size))
    out.print(f"[dim]{heading.caveat}[/]")
    out.print(
        f"report: [bold]{escape(str(files[0]))}[/], {escape(str(files[1]))}, the raw numbers beside; MLflow run {compared.runs.run_id[:12]}"
    )


def _build_table(comparison: "Comparison", batch: int) -> Table:
    """Means at the end of the stream; the report has the rest, and the spread."""
    shown = {name: MEASURES[name] for name in _SHOWN}
    table = Table(
        title=f"after the last edit, batches of {batch}; means of {len(comparison.seeds)}", title_style="dim", title_justify="left"
    )
    table.add_column("method", no_wrap=True)
    for measure in shown.values():
        table.add_column(measure.title, justify="right")
    for method in comparison.methods:
        values = [comparison.gather(method, batch, None, name) for name in shown]
        cells = [f"{fmean(some):.{shown[name].digits}f}" if some else "–" for name, some in zip(shown, values, strict=True)]
        table.add_row(comparison.titles[method], *cells)
    return table


def _read_batches(spelled: str, edits: int) -> tuple[int, ...]:
    try:
        sizes = sorted({int(part) for part in spelled.split(",")})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise InputError(f"batch: expected numbers such as 1,10,100, found {spelled!r}")
    if sizes[-1] > edits:
        raise InputError(f"batch: expected at most the {edits} edits of a stream, found {sizes[-1]}")
    return tuple(sizes)


def _describe_base(named: str, compared: "Compared") -> str:
    return f"`{named}` {compared.scope.base[:12]}, profile {compared.scope.profile[:12]}, neurons {compared.scope.neurons[:12]}"
