"""Commands that run Errata unattended: `up`, `deploy`."""

from typing import Annotated

import typer

from errata.errors import InputError
from errata.settings import load_settings
from flows.commandline import EPILOG, out
from flows.prefect_server import reach_prefect, ready_prefect

Every = Annotated[int | None, typer.Option(min=1, help="Apply every so many seconds, instead of when prefect.yaml says.")]
NoSchedules = Annotated[bool, typer.Option("--no-schedules", help="Register the deployments without their schedules.")]


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (up, deploy):
        app.command(epilog=EPILOG)(command)


def up(
    every: Every = None,
    no_schedules: NoSchedules = False,
    port_prefect: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 4200 where free, else any.")] = None,
    port_mlflow: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 5000 where free, else any.")] = None,
) -> None:
    """Prefect, MLflow and a worker on this machine, with live schedules, until Ctrl-C. A second `up` says where the first one is."""
    settings = load_settings()
    from flows.up import run_up

    run_up(settings, out, every=every, schedules=not no_schedules, port_prefect=port_prefect, port_mlflow=port_mlflow)


def deploy(
    streams: Annotated[list[str] | None, typer.Option("--stream", "-s", help="Repeatable; default: every stream of the root.")] = None,
    pool: Annotated[str, typer.Option(envvar="PREFECT_DEFAULT_WORK_POOL_NAME", help="Work pool; made where it does not exist.")] = "errata",
    every: Every = None,
    no_schedules: NoSchedules = False,
) -> None:
    """Register the deployments of prefect.yaml at the server that PREFECT_API_URL names: each flow for each stream. Safe to repeat."""
    settings = load_settings()
    ready_prefect(settings)
    where = reach_prefect()
    if not where.startswith("http"):
        raise InputError("deploy: expected the URL of a Prefect server in PREFECT_API_URL, found none; `errata up` starts one here")
    from registry.stream import list_streams

    known = list_streams(settings.root)
    if unknown := sorted(set(streams or ()) - set(known)) or ([] if known else ["none"]):
        raise InputError(f"deploy: expected streams of {settings.root} ({', '.join(known) or 'it has none'}), found {', '.join(unknown)}")
    from flows.deploying import deploy_streams

    made = deploy_streams(streams or known, pool, every=every, schedules=not no_schedules)
    out.print(f"{len(made)} deployments at {where} in work pool [bold]{pool}[/]: {', '.join(made)}")
