"""Commands about who is told: `alerts apply`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from errata.settings import load_settings
from flows.commandline import EPILOG, AsJson, out, print_json
from flows.prefect_server import reach_prefect, ready_prefect

alerts = typer.Typer(help="Who is told when something is wrong.", epilog=EPILOG, no_args_is_help=True)

_STYLES = {"created": "green", "updated": "yellow", "unchanged": "dim", "skipped": "magenta"}


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    app.add_typer(alerts, name="alerts")


@alerts.callback()
def group() -> None:
    """Who is told when something is wrong."""


@alerts.command("apply", epilog=EPILOG)
def apply_file(
    file: Annotated[Path, typer.Option(help="Channels and alerts, as YAML.")] = Path("deployments/alerts.yaml"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would change.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make the Prefect server's notification blocks and automations those of the file. Repeating it changes nothing."""
    settings = load_settings()
    ready_prefect(settings)
    reach_prefect()
    from tasks.alerting import apply_alerts, read_alerts

    changes = apply_alerts(read_alerts(file), os.environ, settings.watch.cooldown_minutes, dry_run)
    if as_json:
        print_json([change.model_dump() for change in changes])
        return
    table = Table(box=None, pad_edge=False)
    for name in ("", "name", "would be" if dry_run else "is", ""):
        table.add_column(name, overflow="fold")
    for change in changes:
        table.add_row(change.kind, escape(change.name), f"[{_STYLES[change.state]}]{change.state}[/]", escape(change.detail))
    out.print(table)
