"""The command that makes things unreadable for good: `erase`."""

from typing import Annotated

import typer
from rich.markup import escape

from flows.commandline import EPILOG, AsJson, StreamName, Yes, confirm, open_here, out, print_json
from flows.prefect_server import start_prefect
from registry.erasure import choose_erasable

_SHOWN = 20
"""Names shown before the rest is only counted."""


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(erase)


def erase(
    edits: Annotated[
        list[str],
        typer.Argument(metavar="EDIT…", help="Ids, beginnings of ids, or occurrences <id>@<commit>; all occurrences of the id are erased."),
    ],
    stream: StreamName = None,
    reason: Annotated[str, typer.Option(help="Why, for the log, which is never rewritten: do not quote what is erased.")] = "",
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Erase the text and the pairs of edits that are not live, with all weights that carry them, from the store and from MLflow.

    It cannot be undone. A tombstone stays: the edit's id, when it was erased, and why. What left this root before (a bundle, an exported
    model, a backup, another cache of the base's files) is out of reach.
    """
    settings, opened = open_here(stream)
    ids = choose_erasable(opened, edits)
    named = ", ".join(ids[:_SHOWN]) + (" …" if len(ids) > _SHOWN else "")
    confirm(f"{named}: erased from {opened.name!r} for good, with every version of the model that carries it. Go on?", yes)
    start_prefect(settings)
    from flows.erase import erase_edits

    facts = erase_edits(opened.name, ids, reason).model_dump(mode="json")
    if as_json:
        print_json(facts)
        return
    out.print(
        f"commit {facts['commit']} of [bold]{escape(facts['stream'])}[/]: {len(facts['erased'])} occurrences are erased; "
        f"{facts['deleted']} objects deleted, {facts['replaced']} replaced by the same without them; "
        f"served weights {facts['gap']:.1e} from those before"
    )
    if not facts["finished"]:
        out.print("[red]not everything is deleted yet:[/] the storage failed; any command that opens the stream goes on with it")
    if facts["commits"]:
        out.print(f"commits without weights now, since an edit was live in them: {', '.join(map(str, facts['commits'][:_SHOWN]))}")
    for key in facts["remains"][:_SHOWN]:
        out.print(f"[yellow]still quotes its subject or prompt:[/] {escape(key)} [dim](another edit, or a remark in a commit)[/]")
    if len(facts["remains"]) > _SHOWN:
        out.print(f"and {len(facts['remains']) - _SHOWN} more")
