"""The command that says what editing a base takes: `plan`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from errata.settings import load_settings
from flows import views
from flows.commandline import EPILOG, REFUSED, AsJson, Editor, out, print_json
from flows.prefect_server import ready_prefect

_PLACES = {"device": "device", "memory": "main memory", "disk": "disk"}


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(plan)


def plan(
    base: Annotated[
        str, typer.Option(help="'builtin', 'builtin-contextual', a model folder, a config.json, or a Hugging Face id.")
    ] = "builtin",
    editor: Editor = "d4s",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None,
    profile: Annotated[Path | None, typer.Option(help="JSON file with the editor's options.")] = None,
    edits: Annotated[int, typer.Option(min=1, help="Live at once.")] = 1_000,
    device_memory: Annotated[str | None, typer.Option(metavar="BYTES", help="Plan for a device with so much, such as 24GiB.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what editing a base takes, and whether there is room. Nothing but its configuration is read; exits with 3 if it does not fit."""
    settings = load_settings()
    ready_prefect(settings)
    from errata.plan import read_bytes
    from tasks.onboarding import plan_source

    found = plan_source(
        settings,
        base,
        editor=editor,
        revision=revision,
        profile=None if profile is None else str(profile),
        edits=edits,
        device_memory=None if device_memory is None else read_bytes(device_memory),
    )
    facts = {**found.model_dump(mode="json"), "fits": found.fits}
    print_json(facts) if as_json else out.print(build_plan(facts, base))
    if not found.fits:
        raise typer.Exit(REFUSED)


def build_plan(facts: dict[str, Any], base: str) -> RenderableType:
    """A plan as a table, phase by phase."""
    size = views.show_size
    room = ", ".join(f"{size(facts['room'][place])} {name}" for place, name in _PLACES.items())
    rows = [
        ("base", f"[bold]{escape(base)}[/]: {facts['family']}, {facts['parameters']:,} parameters, {facts['dtype']}"),
        *(_spell_weights if facts["editor"] == "d4s" else _spell_neurons)(facts),
        ("room", room),
        ("verdict", "[green]fits[/]" if facts["fits"] else "[red]does not fit[/]"),
    ]
    table = Table(box=None, pad_edge=False)
    for name in ("when", "what", "where", "bytes", ""):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for line in facts["lines"]:
        verdict = "" if line["fits"] else "[red]no room[/]"
        table.add_row(line["phase"], line["what"], _PLACES[line["place"]], size(line["bytes"]), verdict)
    return Group(views.build_pairs(rows), "", table)


def _spell_weights(facts: dict[str, Any]) -> list[tuple[str, str]]:
    (d_out, d_in), size = facts["shapes"][-1], views.show_size
    layers = ", ".join(map(str, facts["layers"]))
    sums = f"one layer's sums {size(facts['layer_bytes'])}, whatever the number of edits"
    return [
        ("edited", f"layers {layers}, weights of {d_out:,} × {d_in:,}, spread {facts['spread']}"),
        ("one edit", f"{size(facts['pair_bytes'])} on the disk; {sums}"),
        ("factors", "of all layers are kept between batches" if facts["hoards"] else "one layer at a time: each batch factors twice"),
    ]


def _spell_neurons(facts: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("beside", f"the MLP of layer {facts['layers'][0]}, keys and values {facts['shapes'][0][0]:,} wide"),
        ("one edit", f"{views.show_size(facts['pair_bytes'])} on the disk, and as much where the model answers"),
    ]
