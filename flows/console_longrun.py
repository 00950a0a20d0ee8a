"""Commands that keep a stream fit for years: `compact`."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from errata.settings import load_settings
from flows.commandline import EPILOG, AsJson, StreamName, out, print_json
from flows.prefect_server import start_prefect

FAULT = 1


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    app.command(epilog=EPILOG)(compact)


def compact(
    stream: StreamName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Sum, solve and compare; commit nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the sums anew from the stored pairs of all live edits, so that the rounding of many additions and subtractions goes.

    The weights must agree with the champion's to 1e-8; if they do not, nothing is committed and the exit code is 1. `errata apply` does
    this by itself whenever `apply.refresh_every` pairs have been added or removed.
    """
    settings = load_settings(stream=stream)
    start_prefect(settings)
    from flows.replay import compact as rebuild_sums

    summary = rebuild_sums(settings.stream, dry_run)
    print_json(summary.model_dump(mode="json")) if as_json else show_compaction(summary.model_dump(mode="json"), dry_run)
    if not summary.accepted:
        raise typer.Exit(FAULT)


def show_compaction(facts: dict[str, Any], dry_run: bool) -> None:
    """Print what became of a compaction."""
    what = f"{facts['pairs']} pairs of {facts['live']} live edits in [bold]{facts['stream']}[/]"
    if facts["decision"] == "refuse":
        out.print(f"[red]refused[/]: {what}: {escape('; '.join(facts['reasons']))}")
    elif facts["decision"] == "nothing to do":
        out.print(f"nothing to do for {what}: {escape('; '.join(facts['reasons']))}")
    else:
        made = "would be summed anew" if dry_run else f"are summed anew, as commit {facts['commit']}"
        out.print(
            f"{what} {made}; {facts['operations']} had been added or removed since the last time, "
            f"and the weights {'would move' if dry_run else 'moved'} by {facts['gap']:.1e} of their size"
        )
