"""The command that writes the page for people: `report`."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from errata.errors import InputError
from flows import views
from flows.commandline import EPILOG, StreamName, open_here, out


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(report)


def report(
    stream: StreamName = None,
    to: Annotated[Path | None, typer.Option(help="The file; errata-STREAM.html in this folder without it.")] = None,
    show: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
) -> None:
    """Write a page about the stream: what became of edits, quality and norms commit by commit, retention, the latest batch.

    One HTML file that needs no other and loads nothing; what is there is replaced. It quotes edits: share it with who may read them.
    """
    settings, opened = open_here(stream)
    from flows.chronicle import describe_stream
    from flows.page import render_page

    path = (to or Path(f"errata-{opened.name}.html")).absolute()
    data = render_page(describe_stream(settings, opened)).encode()
    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"--to: expected a file that can be written, found {path} ({error.strerror})") from None
    out.print(f"{escape(str(path))}: {views.show_size(len(data))}, as of commit {opened.head.seq}", soft_wrap=True)
    if show:
        webbrowser.open(path.as_uri())
