"""Commands of what answers without weights, and of what folds it in: `remember`, `distill`."""

from typing import Annotated, Any

import typer
from rich.markup import escape

from errata.settings import Settings
from flows import views
from flows.commandline import EPILOG, REFUSED, AsJson, StreamName, open_here, out, print_json
from flows.lookup import count_pending
from flows.prefect_server import start_prefect


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (remember, distill):
        app.command(epilog=EPILOG)(command)


def remember(stream: StreamName = None, as_json: AsJson = False) -> None:
    """Let what waits in the inbox answer from memory at once. The next `errata apply` writes it into the model.

    Facts are put before the questions that ask for them; no weight changes. What the base does not take from its context goes on waiting.
    """
    settings, opened = open_here(stream)
    remember_waiting(settings, opened.name, as_json)


def remember_waiting(settings: Settings, stream: str, as_json: bool) -> None:
    """Run `remember_edits` and print what became of each batch."""
    start_prefect(settings)
    from flows.remember import remember_edits

    summaries = [summary.model_dump(mode="json") for summary in remember_edits(stream)]
    if as_json:
        print_json(summaries)
    elif not summaries:
        out.print(f"nothing waits in the inbox of [bold]{stream}[/] that memory has not tried")
    else:
        out.print(views.build_batches(summaries))
        if waiting := count_pending(open_here(stream)[1]):
            out.print(f"{waiting} records are left to [bold]errata apply[/]: memory does not answer them on this base")


def distill(
    stream: StreamName = None,
    afresh: Annotated[bool, typer.Option("--afresh", help="Go on from no earlier adapter; distil what is known, too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Train, evaluate and decide; commit nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Distil the live edits into an adapter (LoRA), so that questions need no facts before them.

    The teacher is memory where an edit answers and the base elsewhere; the student is the newest version. Interrupted, it goes on where it
    was. The gate decides, and `errata rollback` leads back. An edit that is withdrawn or replaced takes the adapter with it.
    """
    settings, opened = open_here(stream)
    start_prefect(settings)
    from flows.distill import distill_edits

    summary = distill_edits(opened.name, afresh, dry_run)
    if summary is None:
        print_json(None) if as_json else out.print(f"nothing to distil in [bold]{opened.name}[/]: the adapter was taught all live edits")
        return
    facts = summary.model_dump(mode="json")
    print_json(facts) if as_json else show_distillation(facts)
    if facts["decision"] != "accept":
        raise typer.Exit(REFUSED)


def show_distillation(facts: dict[str, Any]) -> None:
    """Print what became of a distillation."""
    metrics = facts["metrics"]
    shown = (("retention", "retention"), ("generalization", "held_out.generalization"), ("specificity", "held_out.specificity"))
    commit = "none" if facts["commit"] is None else str(facts["commit"])
    out.print(
        views.build_pairs(
            [
                ("decision", f"{views.paint(facts['decision'])}, commit {commit}"),
                ("absorbed", f"{facts['absorbed']} of {facts['taught']} live edits{', on an earlier adapter' if facts['went_on'] else ''}"),
                *((name, views.show_share(metrics.get(key))) for name, key in shown),
                ("seconds", views.show_seconds(facts["seconds"])),
                ("reasons", escape(" ".join(facts["reasons"])) or "–"),
            ]
        )
    )
