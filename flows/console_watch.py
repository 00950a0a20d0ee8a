"""Commands about how the champion is: `watch`, `metrics`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from errata.errors import InputError
from errata.settings import load_settings
from flows import views
from flows.commandline import EPILOG, AsJson, StreamName, open_here, out, print_json
from flows.prefect_server import start_prefect


def add_commands(app: typer.Typer) -> None:
    """Make these commands part of the `errata` command."""
    for command in (watch, metrics):
        app.command(epilog=EPILOG)(command)


def watch(stream: StreamName = None, as_json: AsJson = False) -> None:
    """Measure the champion: weight norms, forgetting by age, distance from its base, abilities. What exceeds [watch] becomes an event."""
    settings, opened = open_here(stream)
    start_prefect(settings)
    from flows.watch import watch_model

    facts = watch_model(opened.name).model_dump(mode="json")
    print_json(facts) if as_json else out.print(build_watch(facts))


def metrics(
    stream: StreamName = None,
    textfile: Annotated[Path | None, typer.Option(help="Write them there, for node_exporter's textfile collector.")] = None,
    serve: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Serve them there at /metrics until Ctrl-C.")] = None,
) -> None:
    """Print what Prometheus scrapes, of one stream or of all streams of the root. Measures nothing: `errata watch` does."""
    settings = load_settings()
    if stream is not None:
        settings, _ = open_here(stream)
    from tasks.exposing import build_registry, serve_metrics, spell_metrics, write_metrics

    registry = build_registry(settings, [stream] if stream else [])
    if textfile is not None:
        write_metrics(registry, textfile)
    if serve is not None:
        server, thread = serve_metrics(registry, *split_address(serve))
        out.print(f"metrics at http://{server.server_name}:{server.server_port}/metrics")
        thread.join()
    if textfile is None and serve is None:
        sys.stdout.write(spell_metrics(registry))


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        InputError: it is no such address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"metrics: expected an address such as 127.0.0.1:9464, found {address!r}")
    return host.strip("[]"), int(port)


def build_watch(facts: dict[str, Any]) -> RenderableType:
    """A report of the watch as tables."""
    locality, share = facts["locality"], views.show_share
    ratio = facts["perplexity"] / facts["perplexity_base"] if facts["perplexity"] and facts["perplexity_base"] else None
    kl = "–" if locality["kl"] is None else f"{locality['kl']:.4f} nats"
    version = f"version {facts['version']}" if facts["version"] else "no version"
    rows = [
        ("champion", f"commit {facts['commit']} of [bold]{escape(facts['stream'])}[/], {version}, {facts['live']} live edits"),
        ("locality", f"KL {kl}, agreement with the base {share(locality['agreement'])} over {locality['positions']} positions"),
        ("perplexity", f"{share(ratio)} times the base's on the probe"),
    ]
    if cast := {f"layer {name_layer(item)}": item["norms"]["casting"] for item in facts["layers"] if item["norms"].get("casting")}:
        rows.append(("cast", views.describe_casting(cast)))
    if ability := facts["ability"]:
        said = f"{share(ability['champion']['value'])} of {ability['champion']['edits']} questions, base {share(ability['base']['value'])}"
        rows.append(("ability", f"{said} ({escape(ability['source'])})"))
    rows += [("[red]alarm[/]", f"{alarm['event']}: {escape(alarm['message'])}") for alarm in facts["alarms"]]
    if not facts["alarms"]:
        rows.append(("alarms", "[green]none[/]"))
    layers = Table(box=None, pad_edge=False)
    for name in ("layer", "mean |W|", "Frobenius", "‖ΔW‖₂", "of ‖W0‖₂", "per 100 edits", "condition"):
        layers.add_column(name, justify="right")
    for item in facts["layers"]:
        norms = item["norms"]
        shares = (share(norms[name]) for name in ("mean_abs_ratio", "frobenius_ratio", "spectral", "spectral_ratio"))
        condition = "–" if norms["condition"] is None else f"{norms['condition']:.1e}"
        layers.add_row(name_layer(item), *shares, "–" if item["growth"] is None else f"{item['growth']:+.3f}", condition)
    ages = Table(box=None, pad_edge=False)
    for name in ("age in commits", "sampled", "when accepted", "now"):
        ages.add_column(name, justify="right")
    for age in facts["ages"]:
        ages.add_row(age["age"], str(age["retained"]["edits"]), share(age["immediate"]["value"]), share(age["retained"]["value"]))
    tables = [*(["", layers] if facts["layers"] else []), *(["", ages] if facts["ages"] else [])]
    return Group(views.build_pairs(rows), *tables)


def name_layer(facts: dict[str, Any]) -> str:
    """A layer as people read it: an adapter's with the module that it changes."""
    return f"{facts['layer']}.{facts['part']}" if facts.get("part") else str(facts["layer"])
