"""Command about a base before any stream stands on it: `calibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from errata.errors import InputError
from errata.profiles import spell_layers
from errata.settings import load_settings
from flows import views
from flows.commandline import EPILOG, AsJson, out, print_json
from flows.prefect_server import start_prefect

_SITES = {"subject_last": "subject’s last token", "prompt_last": "prompt’s last token"}
_SHADES = ("grey23", "grey35", "medium_purple4", "medium_purple3", "medium_purple1")
"""Of the heat map, from nothing to all."""
_SHOWN = 24
"""Layers shown of the heat map; deeper models show every second one, or fewer."""


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(calibrate)


def calibrate(
    base: Annotated[str, typer.Option(help="'builtin', a model folder, or a Hugging Face id.")] = "builtin",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id; the newest is pinned without one.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Text or JSONL, or a folder of them: what the model must go on knowing.")] = None,
    facts: Annotated[
        Path | None, typer.Option(help="Edits with target_true that the model may know; by default the project's own.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0.5, help="Minutes; the search ends about then with what it has.")] = 5.0,
    edits: Annotated[int | None, typer.Option(min=4, help="Edits written in each trial; by default what the budget bears.")] = None,
    seed: Annotated[int, typer.Option(help="Of contexts, noise and the project's own facts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Measure where to write into a base, and how strongly: a profile, which `errata init` takes by itself.

    Asks the base for facts, traces where it holds them, measures its second moments, and tries places, options and λ. Every trial is a run
    in MLflow. What is measured is kept: the same command goes on with it after an interruption.
    """
    for path in (corpus, facts):
        if path is not None and not path.exists():
            raise InputError(f"{path}: expected a file or folder, found none")
    settings = load_settings()
    start_prefect(settings)
    from flows.calibrate import calibrate_base
    from tasks.onboarding import place_base, preserve_text

    placed = place_base(settings, base, revision)
    found = calibrate_base(placed.ref.digest, facts and str(facts), preserve_text(placed, corpus), budget, edits, seed)
    told = found.model_dump(mode="json")
    if as_json:
        print_json(told)
    else:
        out.print(build_calibration(told))
        out.print(f"next: [bold]errata init --base {escape(base)}[/], which takes profile {found.profile[:12]} by itself")


def build_calibration(told: dict[str, Any]) -> RenderableType:
    """The summary of a calibration."""
    prepare, remarks = told["prepare"], [Text(f"! {remark}", style="yellow") for remark in told["remarks"]]
    if told["cut_short"]:
        remarks.append(Text("! The budget ended the search before it was through; the same command with more goes on from here.", "yellow"))
    rate = f"step size {prepare['lr']:g}" if prepare["lr"] else f"step size {prepare['lr_scale']:g} · clamp · ‖h‖ / (steps · √d)"
    chosen = [
        ("profile", f"[bold]{told['profile'][:12]}[/]"),
        ("facts", f"{told['known']} of {told['asked']} known ({escape(told['source'])})"),
        (
            "writes",
            f"layers {spell_layers(prepare['layers'])} at the {_SITES[prepare.get('site', 'subject_last')]}, spread {told['spread']}",
        ),
        ("λ", f"{told['lam']:g}"),
        ("z", f"{prepare['steps']} steps, {rate}, clamp {prepare['clamp']:g}, {len(prepare['contexts'])} contexts"),
        ("searched", f"{told['trials']} trials in {told['steps']} steps of {told['edits']} edits each, {told['seconds']:.0f} s"),
    ]
    if told["max_norm_ratio"]:
        chosen.append(("weights", f"{told['foreseen']:.2f} times their norm after 1,000 edits; alert at {told['max_norm_ratio']:.2f}"))
    chosen += [("figure", escape(place)) for place in told["figures"]]
    parts: list[RenderableType] = [views.build_pairs(chosen)]
    if told["effects"]:
        parts.append(build_heat(told["effects"]))
    parts.append(build_points("measured on edits that the search never wrote", [told["chosen"], *told["rivals"]]))
    parts.append(build_points("along λ, on the edits of the search", told["curve"]))
    return Group(*remarks, *parts)


def build_heat(effects: dict[str, list[float]]) -> Table:
    """Sites × layers, as shaded numbers."""
    depth = len(next(iter(effects.values())))
    step = -(-depth // _SHOWN)
    table = Table(title="share of a lost answer that one restored state brings back, by layer", title_style="dim", title_justify="left")
    table.add_column("")
    for layer in range(0, depth, step):
        table.add_column(str(layer), justify="right")
    for site, values in effects.items():
        table.add_row(_SITES[site], *(f"[{shade(value)}]{value:.2f}[/]" for value in values[::step]))
    return table


def build_points(title: str, points: list[dict[str, Any]]) -> Table:
    """One row per point."""
    table = Table(title=title, title_style="dim", title_justify="left")
    for name in ("layers", "site", "spread", "λ", "median ρ", "efficacy", "generalization", "specificity", "score", "norm"):
        table.add_column(name, justify="right")
    for point in points:
        scores = [point[name] for name in ("fit", "efficacy", "generalization", "specificity", "score")]
        said = [f"{value:.3f}" if value is not None else "–" for value in scores]
        site = point["site"].replace("_last", "")
        table.add_row(spell_layers(point["layers"]), site, point["spread"], f"{point['lam']:g}", *said, f"{point['norm_ratio']:.2f}")
    return table


def shade(value: float) -> str:
    return _SHADES[min(max(int(value * len(_SHADES)), 0), len(_SHADES) - 1)]
