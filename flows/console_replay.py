"""Commands that make a model again from its log, or take it elsewhere: `rebuild`, `export`, `bundle`, `unbundle`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from errata.errors import InputError
from errata.settings import load_settings
from flows import lookup, views
from flows.commandline import EPILOG, AsJson, StreamName, open_here, out, print_json
from flows.prefect_server import ready_prefect, start_prefect

FAULT = 1

Reference = Annotated[str, typer.Argument(metavar="COMMIT|VERSION", help="12, head, head~1, or v3 for an MLflow version.")]


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (rebuild, export, bundle, unbundle):
        app.command(epilog=EPILOG)(command)


def rebuild(
    stream: StreamName = None,
    to: Annotated[str | None, typer.Option("--to", metavar="COMMIT", help="Replay up to this commit; the newest without it.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare every commit and change nothing; exit code 1 if they part.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replay the stored pairs of the log, compare with what is stored, and mend what is missing or damaged."""
    settings = load_settings(stream=stream)
    seq = resolve_number(stream, to)
    start_prefect(settings)
    from flows.replay import rebuild as replay

    report = replay(settings.stream, seq, check)
    facts = report.model_dump(mode="json") | {"sound": report.sound}
    print_json(facts) if as_json else out.print(views.build_rebuild(facts))
    if not report.sound:
        raise typer.Exit(FAULT)


def resolve_number(stream: str | None, ref: str | None) -> int | None:
    """The commit that a person means. A plain number needs no intact log."""
    if ref is None or (ref.isascii() and ref.isdecimal()):
        return int(ref) if ref else None
    return lookup.resolve_state(*open_here(stream), ref)


def export(
    reference: Reference,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="New or empty folder.")],
    stream: StreamName = None,
    pyfunc: Annotated[bool, typer.Option("--pyfunc", help="A folder for `mlflow.pyfunc.load_model`, base included.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the model of a commit as an ordinary Hugging Face folder with merged weights, for any server.

    Neurons are no weights: a stream that has them is exported with --pyfunc.
    """
    settings, opened = open_here(stream)
    seq = lookup.resolve_state(settings, opened, reference)
    ready_prefect(settings)
    from tasks.exporting import export_commit, export_pyfunc

    place = export_pyfunc(settings, opened, seq, to) if pyfunc else export_commit(settings, opened, seq, to)
    loader = "mlflow.pyfunc" if pyfunc else "transformers"
    if as_json:
        print_json({"stream": opened.name, "commit": seq, "folder": str(place)})
    else:
        out.print(f"commit {seq} of [bold]{opened.name}[/] is in {escape(str(place))}; {loader} loads it as any other model")


def bundle(
    stream: StreamName = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE", help="New .tar or .tar.gz; <stream>-<commit>.tar without it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also objects that no commit names.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a stream into one file: its commits, their objects, and the base, moments and profile it needs."""
    settings, opened = open_here(stream)
    from registry.bundle import write_bundle
    from registry.history import open_history
    from tasks._progress import show_progress

    target = to or Path(f"{opened.name}-{opened.head.seq}.tar")
    with show_progress("bundling objects") as on_progress:
        made = write_bundle(open_history(settings.root, opened.name), target, everything=everything, on_progress=on_progress)
    waiting = lookup.count_pending(opened)
    if as_json:
        size = target.stat().st_size
        print_json({**describe_bundled(made), "file": str(target), "bytes": size, "waiting": waiting})
        return
    size = views.show_size(target.stat().st_size)
    out.print(f"{escape(str(target))}: {size}, {made.commits} commits and {made.objects} objects of [bold]{escape(made.stream)}[/]")
    warn_omitted(made.omitted)
    if waiting:
        out.print(f"[yellow]not in it:[/] {waiting} records that wait in the inbox")


def unbundle(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `errata bundle` wrote.")],
    root: Annotated[str | None, typer.Option(help="Folder or s3://bucket/prefix; the default is in errata.toml.")] = None,
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="Another name for the stream.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the stream of a bundle in a root, after everything in it has been checked. Safe to repeat after an interruption."""
    settings = load_settings(root=root)
    if not file.is_file():
        raise InputError(f"unbundle: expected a file, found none at {file}")
    from registry.storage.base import open_storage
    from registry.unbundle import read_bundle
    from tasks._progress import show_progress

    with show_progress("storing objects") as on_progress:
        made = read_bundle(open_storage(settings.root), file, name, on_progress)
    if as_json:
        print_json({**describe_bundled(made), "root": settings.root})
        return
    out.print(f"stream [bold]{escape(made.stream)}[/] in {escape(settings.root)}: {made.commits} commits, {made.objects} objects")
    warn_omitted(made.omitted)
    out.print(
        f"next: [bold]errata rebuild --check -s {made.stream}[/], and [bold]errata repair -s {made.stream}[/] for its MLflow versions"
    )


def describe_bundled(made: Any) -> dict[str, Any]:
    facts: dict[str, Any] = made._asdict()
    return facts | {"omitted": [item.model_dump() for item in made.omitted]}


def warn_omitted(omitted: Sequence[Any]) -> None:
    for item in omitted:
        out.print(f"[yellow]not in it:[/] {item.what} {item.digest[:12]} of commit {item.commit}, which is {item.fault}")
