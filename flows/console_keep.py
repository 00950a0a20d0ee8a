"""Commands about what is kept: `gc`, `du`, `pin`, `unpin`."""

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from errata.errors import InputError
from flows import lookup, views
from flows.commandline import EPILOG, AsJson, StreamName, open_here, out, print_json
from flows.prefect_server import start_prefect
from registry.keeping import open_pins


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (gc, du, pin, unpin):
        app.command(epilog=EPILOG)(command)


def gc(
    stream: StreamName = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Archive versions beyond [keep], and delete what nothing has needed for longer than gc.grace_hours by the storage's own clock."""
    settings, opened = open_here(stream)
    start_prefect(settings)
    from flows.keep import collect_garbage

    facts = collect_garbage(opened.name, dry_run).model_dump(mode="json")
    if as_json:
        print_json(facts)
        return
    table = Table(box=None, pad_edge=False)
    for name, side in (("", "left"), ("objects", "right"), ("size", "right"), ("", "left")):
        table.add_column(name, justify="right" if side == "right" else "left")
    for what, rows in (("would be deleted" if dry_run else "deleted", facts["deleted"]), ("not old enough yet", facts["waiting"])):
        for category, (count, size) in sorted(rows.items()):
            table.add_row(category, str(count), views.show_size(size), what)
    out.print(table if table.row_count else "nothing is there that is not needed")
    out.print(f"{facts['archived']} versions archived, {facts['stale']} old checkpoints and hints {'to remove' if dry_run else 'removed'}")


def du(stream: StreamName = None, as_json: AsJson = False) -> None:
    """What is stored, how much of it, and why."""
    settings, opened = open_here(stream)
    from tasks.keeping import describe_storage

    rows = describe_storage(settings, opened)
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("objects", justify="right")
    table.add_column("size", justify="right")
    table.add_column("why", overflow="fold")
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        table.add_row(row["category"], str(row["objects"]), views.show_size(row["bytes"]), escape(row["why"]))
    table.add_row("all", str(sum(row["objects"] for row in rows)), views.show_size(sum(row["bytes"] for row in rows)), "")
    out.print(table)


def pin(
    reference: Annotated[str | None, typer.Argument(metavar="COMMIT|VERSION", help="12, head~1, or v3; without it all pins.")] = None,
    reason: Annotated[str, typer.Option(help="Why it is kept.")] = "",
    stream: StreamName = None,
    as_json: AsJson = False,
) -> None:
    """Keep the weights of a version for good, whatever [keep] says; without an argument, list what is pinned."""
    settings, opened = open_here(stream)
    pins = open_pins(opened.storage, opened.name)
    if reference is not None:
        from tasks.keeping import pin_commit

        seq = pin_commit(opened, lookup.resolve_state(settings, opened, reference))
        pins.write(seq, reason)
    found = [{"commit": seq, "reason": text, "since": since.isoformat()} for seq, (text, since) in pins.read().items()]
    if as_json:
        print_json(found)
    elif not found:
        out.print(f"nothing is pinned in [bold]{opened.name}[/]")
    for row in found if not as_json else ():
        out.print(f"commit {row['commit']} is pinned since {str(row['since'])[:19]} {escape(str(row['reason']))}".rstrip())


def unpin(
    reference: Annotated[str, typer.Argument(metavar="COMMIT|VERSION", help="12, head~1, or v3.")],
    stream: StreamName = None,
) -> None:
    """Let [keep] decide about a version again."""
    settings, opened = open_here(stream)
    pins, seq = open_pins(opened.storage, opened.name), lookup.resolve_state(settings, opened, reference)
    if seq not in pins:
        known = ", ".join(map(str, pins.read())) or "none"
        raise InputError(f"unpin: expected a pinned commit ({known}), found {seq}")
    pins.remove(seq)
    out.print(f"commit {seq} of [bold]{opened.name}[/] is not pinned any more")
