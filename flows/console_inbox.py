"""The command about what waits: `inbox`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from flows import lookup, views
from flows.commandline import EPILOG, AsJson, StreamName, Yes, confirm, open_here, out, print_json
from registry.setbacks import prune_aside


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(inbox)


def inbox(
    stream: StreamName = None,
    prune: Annotated[bool, typer.Option("--prune", help="Delete the files that were set aside.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """What waits, in the order it is taken: urgent files first, then the oldest.

    A file that a run failed over is tried alone, and set aside after a few times; correct it and submit it again.
    """
    _, opened = open_here(stream)
    rows = lookup.describe_inbox(opened)
    aside = [row for row in rows if row["state"] == "set aside"]
    if prune:
        confirm(f"{len(aside)} files that were set aside in {opened.name!r} are deleted. Go on?", yes)
        pruned = prune_aside(opened)
        print_json({"pruned": pruned}) if as_json else out.print(f"{pruned} files that were set aside are deleted")
        return
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print(f"nothing waits in [bold]{opened.name}[/]")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("file", "records", "size", "age", "state", "why"):
        table.add_column(name, justify="right" if name in ("records", "size") else "left", overflow="fold")
    for row in rows:
        records = "–" if row["records"] is None else str(row["records"])
        age = views.show_age(row["age_seconds"])
        table.add_row(escape(row["file"]), records, views.show_size(row["bytes"]), age, row["state"], escape(row["why"]))
    out.print(table)
