"""What the commands of the console share: options, output, questions, and the way into the inbox. Imports nothing heavy."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from errata.settings import Settings, load_settings
from flows.prefect_server import ready_prefect
from registry.stream import Stream, open_stream

EPILOG = "Exit codes: 0 done, 1 fault, 2 bad input, 3 refused by the gate, 4 conflict with another writer."
REFUSED = 3

StreamName = Annotated[str | None, typer.Option("--stream", "-s", help="Stream; the default is in errata.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
CorpusPath = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        metavar="FILE|DIR",
        help="What the model must go on knowing: text, a passage per line, or JSONL with the field 'text'.",
    ),
]
Editor = Annotated[str, typer.Option(help="'d4s' writes into weights, 'ireva' adds neurons beside them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]

out = Console()


def open_here(name: str | None) -> tuple[Settings, Stream]:
    settings = load_settings(stream=name)
    return settings, open_stream(settings.root, settings.stream, settings.cache)


def show_committed(settings: Settings, stream: Stream) -> None:
    """Make up for a command that died between its commit and its version: there is nothing left to do but to show it in MLflow."""
    ready_prefect(settings)
    from tasks.projecting import show_log

    show_log(settings, stream)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def confirm(question: str, yes: bool) -> None:
    """Ask where somebody can answer."""
    if not yes and sys.stdin.isatty() and sys.stdout.isatty() and not typer.confirm(question):
        raise typer.Exit(0)
