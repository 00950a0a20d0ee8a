"""Commands that take things back: `withdraw`, `rollback`, `resubmit`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.markup import escape

from errata.errors import InputError
from errata.settings import Settings
from flows import lookup, views
from flows.commandline import (
    EPILOG,
    REFUSED,
    AsJson,
    StreamName,
    Yes,
    confirm,
    open_here,
    out,
    print_json,
    show_committed,
)
from flows.prefect_server import start_prefect
from registry.events import RollbackCommit, WithdrawalCommit
from registry.stream import Stream
from registry.undoing import choose_live, choose_target, compare_live, find_gone, submit_gone

_SHOWN = 20
"""Edits named before the rest is only counted."""

Reason = Annotated[str, typer.Option(help="Why, for the log.")]


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (withdraw, rollback, resubmit):
        app.command(epilog=EPILOG)(command)


def withdraw(
    edits: Annotated[list[str], typer.Argument(metavar="EDIT…", help="Ids, beginnings of ids, or occurrences <id>@<commit>.")],
    stream: StreamName = None,
    reason: Reason = "",
    check: Annotated[bool, typer.Option("--check", help="Compare the weights with a rebuild from all remaining edits.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Subtract, evaluate and decide; commit nothing.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Take live edits back: the model is as if they had never come. What they had replaced stays replaced."""
    settings, opened = open_here(stream)
    with show_done(settings, opened, dry_run):
        rows = choose_live(opened, edits)
    if not dry_run:
        named = ", ".join(row.occurrence for row in rows[:_SHOWN]) + (" …" if len(rows) > _SHOWN else "")
        confirm(f"{len(rows)} edits of {opened.name!r} are withdrawn, if the gate accepts the model without them: {named}. Go on?", yes)
    start_prefect(settings)
    from flows.undo import withdraw_edits

    summary = withdraw_edits(opened.name, edits, reason, dry_run, check)
    if as_json:
        print_json(summary.model_dump(mode="json"))
    else:
        out.print(views.build_withdrawal(summary.model_dump(mode="json")))
    if not summary.accepted:
        raise typer.Exit(REFUSED)


def rollback(
    target: Annotated[str, typer.Argument(metavar="COMMIT|VERSION", help="12, head~1, or v3.")],
    stream: StreamName = None,
    reason: Reason = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would leave and come back.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Make the state of an earlier commit the champion again, as a new commit; the next batch builds on it."""
    settings, opened = open_here(stream)
    seq = lookup.resolve_version(settings, opened, target) if lookup.is_version(target) else opened.resolve_commit(target)
    with show_done(settings, opened, dry_run):
        commit = choose_target(opened, seq)
    if not dry_run and not yes:
        told = [outcome.told for outcome in compare_live(opened, commit.seq)]
        back, left = told.count("live"), sum(word not in ("live", "regrouped") for word in told)
        confirm(
            f"Commit {commit.seq} of {commit.time:%d %b %Y %H:%M} is served again in {opened.name!r}: {left} edits leave, "
            f"{back} come back. Go on?",
            yes,
        )
    start_prefect(settings)
    from flows.undo import rollback as roll_back

    summary = roll_back(opened.name, str(commit.seq), reason, dry_run).model_dump(mode="json")
    if as_json:
        print_json(summary)
        return
    out.print(
        f"commit {summary['target']} {'would be' if dry_run else 'is'} the champion of [bold]{opened.name}[/] again"
        + ("" if dry_run else f", as commit {summary['commit']}")
        + f"; {summary['live']} edits live, {len(summary['back'])} of them back, {len(summary['left'])} no longer live"
    )
    for word, names in (("back", summary["back"]), ("no longer live", summary["left"])):
        for name in names[:_SHOWN]:
            out.print(f"  {escape(name)} [dim]{word}[/]")
        if len(names) > _SHOWN:
            out.print(f"  and {len(names) - _SHOWN} more {word}" + ("" if dry_run else f": [bold]errata show {summary['commit']}[/]"))
    if summary["left"] and not dry_run:
        out.print(f"[bold]errata resubmit {summary['commit']}[/] puts what is no longer live into the inbox once more")


@contextmanager
def show_done(settings: Settings, stream: Stream, dry_run: bool) -> Iterator[None]:
    """What is refused may be done already, by a command that died before MLflow showed it: then it is shown now."""
    try:
        yield
    except InputError:
        if not dry_run and isinstance(stream.log.read(stream.head.seq), WithdrawalCommit | RollbackCommit):
            show_committed(settings, stream)
        raise


def resubmit(
    commit: Annotated[str | None, typer.Argument(metavar="COMMIT", help="The rollback; without one, the newest.")] = None,
    stream: StreamName = None,
    as_json: AsJson = False,
) -> None:
    """Put the edits that a rollback took out into the inbox once more, but for those whose place a newer edit has."""
    _, opened = open_here(stream)
    seq, gone = find_gone(opened, opened.resolve_commit(commit) if commit is not None else None)
    name = submit_gone(opened, gone)
    if as_json:
        overtaken = {row.occurrence: newer.occurrence for row, newer in gone.overtaken}
        print_json({"rollback": seq, "submitted": [row.occurrence for row in gone.rows], "overtaken": overtaken, "file": name})
    else:
        for row, newer in gone.overtaken:
            out.print(f"{escape(row.occurrence)} [dim]stays out: {escape(newer.occurrence)} has its place now[/]")
        where = f" in inbox/{name}; [bold]errata apply[/] writes them" if name else ""
        out.print(f"{len(gone.rows)} edits that commit {seq} took out are submitted to [bold]{opened.name}[/]{where}")
    if not gone.rows:
        raise typer.Exit(InputError.exit_code)
