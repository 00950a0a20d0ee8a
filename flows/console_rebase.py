"""The command that takes a stream to another base or profile: `rebase`."""

from typing import Annotated

import typer
from rich.markup import escape

from flows import views
from flows.commandline import EPILOG, REFUSED, AsJson, CorpusPath, Yes, confirm, open_here, out, print_json
from flows.prefect_server import start_prefect


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(rebase)


def rebase(
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Whose live edits.")],
    base: Annotated[
        str | None, typer.Option(help="'builtin', 'builtin-contextual', a model folder, or a Hugging Face id; its own base without one.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id; the newest is pinned without one.")] = None,
    profile: Annotated[str | None, typer.Option(help="JSON file with `prepare` options and `lam`, or a stored profile's digest.")] = None,
    corpus: CorpusPath = None,
    drop_answered: Annotated[bool, typer.Option("--drop-answered", help="Take back edits that the base answers without them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Prepare, evaluate and decide; commit nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Prepare the live edits anew on another base, or at another site, and write them there.

    Says first what that takes. An interrupted run goes on where it was; the champion serves until the new version is accepted, and
    `errata rollback` leads back across the change.
    """
    settings, opened = open_here(stream)
    start_prefect(settings)
    from tasks.onboarding import place_target
    from tasks.rebasing import estimate_rebase

    placed = place_target(settings, opened, base, revision=revision, profile=profile, corpus=corpus)
    estimate = estimate_rebase(settings, opened, placed.ref.digest, placed.profile, drop_answered).model_dump(mode="json")
    if not as_json:
        out.print(views.build_estimate(estimate, placed.ref.digest, placed.profile, drop_answered))
    confirm("Go on?", yes or as_json)
    from flows.replay import rebase as carry_over

    summary = carry_over(opened.name, placed.ref.digest, placed.profile, drop_answered, dry_run)
    facts = summary.model_dump(mode="json")
    if as_json:
        print_json({"estimate": estimate, **facts})
    else:
        out.print(views.build_rebase(facts))
        for occurrence, why in summary.quarantined.items():
            out.print(f"[dim]quarantined:[/] {escape(occurrence)}: {escape(why)}")
    if not summary.accepted:
        raise typer.Exit(REFUSED)
