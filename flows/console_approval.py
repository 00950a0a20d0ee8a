"""Commands that decide about a version that waits: `approve`, `refuse`."""

from typing import Annotated

import typer
from rich.markup import escape

from flows import lookup
from flows.commandline import EPILOG, AsJson, StreamName, Yes, confirm, open_here, out, print_json
from flows.prefect_server import start_prefect
from flows.risks import list_held
from registry.undoing import choose_waiting

Waiting = Annotated[str, typer.Argument(metavar="VERSION|COMMIT", help="v3, 12 or head: what waits.")]
Reason = Annotated[str, typer.Option(help="Why, for the log.")]


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (approve, refuse):
        app.command(epilog=EPILOG)(command)


def approve(version: Waiting, stream: StreamName = None, reason: Reason = "", yes: Yes = False, as_json: AsJson = False) -> None:
    """Make a version that waits the champion (`policy.promote = "manual"` lets all of them wait, `policy.max_risk` risky ones)."""
    settings, opened = open_here(stream)
    seq = lookup.resolve_state(settings, opened, version)
    if seq != opened.head.champion:
        choose_waiting(opened, seq)
    for held in list_held(opened):
        if held["commit"] <= seq and not as_json:
            out.print(f"commit {held['commit']}: {escape(held['reason'])}")
    confirm(f"{version} becomes the champion of {opened.name!r}, in place of commit {opened.head.champion}. Go on?", yes)
    start_prefect(settings)
    from flows.approval import approve as promote

    promote(opened.name, version, reason)
    champion = opened.refresh().champion
    print_json({"stream": opened.name, "champion": champion}) if as_json else out.print(
        f"commit {champion} is the champion of [bold]{opened.name}[/]"
    )


def refuse(
    version: Waiting,
    stream: StreamName = None,
    reason: Reason = "",
    drop: Annotated[bool, typer.Option("--drop", help="Do not submit the edits that leave once more.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Return to the champion: the version that waits and what came with it leave, and their edits go into the inbox once more."""
    settings, opened = open_here(stream)
    choose_waiting(opened, lookup.resolve_state(settings, opened, version))
    fate = "leaves" if drop else "leaves and goes into the inbox once more"
    confirm(f"What came after commit {opened.head.champion}, the champion of {opened.name!r}, {fate}. Go on?", yes)
    start_prefect(settings)
    from flows.approval import refuse as turn_down

    summary = turn_down(opened.name, version, reason, not drop)
    if as_json:
        print_json(summary.model_dump(mode="json"))
        return
    out.print(
        f"{escape(version)} is refused: commit {summary.target} is the champion of [bold]{opened.name}[/] again, as commit {summary.commit}"
    )
    out.print(
        f"{len(summary.left)} edits left, {len(summary.back)} are back" + ("" if drop else "; [bold]errata apply[/] tries them once more")
    )
