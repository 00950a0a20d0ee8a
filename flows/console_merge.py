"""The command that brings two streams together: `merge`."""

from collections import Counter
from typing import Annotated

import typer
from rich.markup import escape

from errata.settings import load_settings
from flows import views
from flows.commandline import EPILOG, REFUSED, AsJson, Yes, confirm, open_here, out, print_json, show_committed
from flows.prefect_server import start_prefect
from registry.stream import open_stream


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(merge)


def merge(
    source: Annotated[str, typer.Argument(metavar="STREAM", help="Whose live edits; it is left as it is.")],
    into: Annotated[str, typer.Argument(metavar="INTO", help="The stream that gets them.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Merge, evaluate and decide; commit nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write the live edits of one stream into another on the same base and profile, with the pairs they have.

    Each counts as submitted now: it replaces the live edit of its slot, unless that one was submitted later.
    """
    settings, opened = open_here(into)
    from tasks.merging import propose_merge

    _, proposal = propose_merge(settings, opened, open_stream(settings.root, load_settings(stream=source).stream, settings.cache))
    replaced = sorted({name for addition in proposal.additions for name in addition.replaces})
    counts = Counter(item.outcome for item in proposal.settled)
    facts = {"additions": len(proposal.additions), "replaces": replaced, "settled": dict(counts)}
    if not proposal.additions:
        if not dry_run:
            show_committed(settings, opened)
        told = f"nothing of [bold]{escape(source)}[/] is to be written into [bold]{escape(into)}[/]: {views.show_counts(dict(counts))}"
        print_json({**facts, "batches": []}) if as_json else out.print(told)
        return
    if not dry_run:
        also = f", {views.show_counts(dict(counts))}" if counts else ""
        confirm(f"{len(proposal.additions)} edits of {source!r} come into {into!r}, {len(replaced)} edits there leave{also}. Go on?", yes)
    start_prefect(settings)
    from flows.merge import merge_streams

    summaries = [summary.model_dump(mode="json") for summary in merge_streams(source, into, dry_run)]
    if as_json:
        print_json({**facts, "batches": summaries})
    else:
        out.print(views.build_batches(summaries))
        for name in replaced:
            out.print(f"[dim]conflict:[/] {escape(name)} gives way to the edit of {escape(source)}")
        for item in proposal.settled:
            if item.outcome in ("stale", "superseded", "withheld"):
                out.print(f"[dim]{item.outcome}:[/] {escape(item.arrival.record.origin)}: {escape(item.reason)}")
        for summary in summaries:
            for reason in summary["reasons"] if summary["decision"] in ("reject", "hold") else ():
                out.print(f"{'[dim]refused:[/] ' if summary['decision'] == 'reject' else ''}{escape(reason)}")
    if any(summary["decision"] == "reject" for summary in summaries):
        raise typer.Exit(REFUSED)
