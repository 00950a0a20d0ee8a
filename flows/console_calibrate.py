"""Command about a base before any stream stands on it: `calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from errata.calibration.summary import CalibrationSummary, GateSummary

_SITES = {"subject_last": "subject’s last token", "prompt_last": "prompt’s last token"}
_SHADES = ("grey23", "grey35", "medium_purple4", "medium_purple3", "medium_purple1")
"""Of the heat map, from nothing to all."""
_SHOWN = 24
"""Layers shown of the heat map; deeper models show every second one, or fewer."""


def add_commands(app: typer.Typer) -> None:
    """Make this command part of the `errata` command."""
    app.command(epilog=EPILOG)(calibrate)


def calibrate(
    base: Annotated[str, typer.Option(help="'builtin', 'builtin-contextual', a model folder, or a Hugging Face id.")] = "builtin",
    editor: Annotated[str, typer.Option(help="'d4s' or 'ireva'.")] = "d4s",
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

    For ireva: reads how near paraphrases, and everything else, come to the keys of its neurons, and tries layers, thresholds and gains.
    It needs no text.
    """
    for path in (corpus, facts):
        if path is not None and not path.exists():
            raise InputError(f"{path}: expected a file or folder, found none")
    if editor == "ireva" and corpus is not None:
        raise InputError(f"corpus: expected none for {editor}, which measures no second moments, found {corpus}")
    settings = load_settings()
    start_prefect(settings)
    from errata.editors.catalogue import require_editor
    from flows.calibrate import calibrate_base, calibrate_gate
    from tasks.onboarding import place_base, preserve_text

    require_editor(editor)
    placed = place_base(settings, base, revision)
    given, source = (placed.ref.digest, facts and str(facts)), f"--base {escape(base)}"
    found: CalibrationSummary | GateSummary
    if editor == "ireva":
        found, build, source = calibrate_gate(*given, budget, edits, seed), build_gate, f"{source} --editor ireva"
    else:
        found, build = calibrate_base(*given, preserve_text(placed, corpus), budget, edits, seed), build_calibration
    told = found.model_dump(mode="json")
    if as_json:
        print_json(told)
    else:
        out.print(build(told))
        out.print(f"next: [bold]errata init {source}[/], which takes profile {found.profile[:12]} by itself")


def build_calibration(told: dict[str, Any]) -> RenderableType:
    """The summary of a calibration."""
    prepare = told["prepare"]
    rate = f"step size {prepare['lr']:g}" if prepare["lr"] else f"step size {prepare['lr_scale']:g} · clamp · ‖h‖ / (steps · √d)"
    chosen = [
        *_begin_pairs(told),
        (
            "writes",
            f"layers {spell_layers(prepare['layers'])} at the {_SITES[prepare.get('site', 'subject_last')]}, spread {told['spread']}",
        ),
        ("λ", f"{told['lam']:g}"),
        ("z", f"{prepare['steps']} steps, {rate}, clamp {prepare['clamp']:g}, {len(prepare['contexts'])} contexts"),
        _tell_effort(told),
    ]
    if told["max_norm_ratio"]:
        chosen.append(("weights", f"{told['foreseen']:.2f} times their norm after 1,000 edits; alert at {told['max_norm_ratio']:.2f}"))
    chosen += [("figure", escape(place)) for place in told["figures"]]
    parts: list[RenderableType] = [views.build_pairs(chosen)]
    if told["effects"]:
        parts.append(build_heat(told["effects"]))
    parts.append(build_points("measured on edits that the search never wrote", [told["chosen"], *told["rivals"]]))
    parts.append(build_points("along λ, on the edits of the search", told["curve"]))
    return Group(*_build_remarks(told), *parts)


def build_gate(told: dict[str, Any]) -> RenderableType:
    """The summary of a calibration of iReVa's gate."""
    chosen = [
        *_begin_pairs(told),
        ("answers", f"beside the MLP of layer {told['layer']}"),
        ("θ", f"{told['theta']:g}"),
        ("gain", f"{told['gain']:g} times the value where the input is the key"),
        ("fires at", ", ".join(f"{share:.1%} of {kind}" for kind, share in told["fired"].items())),
        _tell_effort(told),
        *(("figure", escape(place)) for place in told["figures"]),
    ]
    layers = Table(title="cosines by layer: paraphrases against everything else", title_style="dim", title_justify="left")
    for name in ("layer", "told apart", "θ from", "to"):
        layers.add_column(name, justify="right")
    for read in told["layers"]:
        layers.add_row(str(read["layer"]), *(f"{read[name]:.3f}" for name in ("separation", "low", "high")))
    return Group(
        *_build_remarks(told),
        views.build_pairs(chosen),
        layers,
        _build_gates("measured on edits that the search never wrote", [told["chosen"], *told["rivals"]]),
        _build_gates("along θ, on the edits of the search", told["curve"]),
        _build_gates("along the gain", told["gains"]),
    )


def _begin_pairs(told: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("profile", f"[bold]{told['profile'][:12]}[/]"),
        ("facts", f"{told['known']} of {told['asked']} known ({escape(told['source'])})"),
    ]


def _tell_effort(told: dict[str, Any]) -> tuple[str, str]:
    return "searched", f"{told['trials']} trials in {told['steps']} steps of {told['edits']} edits each, {told['seconds']:.0f} s"


def _build_remarks(told: dict[str, Any]) -> list[Text]:
    remarks = list(told["remarks"])
    if told["cut_short"]:
        remarks.append("The budget ended the search before it was through; the same command with more goes on from here.")
    return [Text(f"! {remark}", style="yellow") for remark in remarks]


def _build_gates(title: str, points: list[dict[str, Any]]) -> Table:
    """One row per point."""
    table = Table(title=title, title_style="dim", title_justify="left")
    for name in ("layer", "θ", "gain", "efficacy", "generalization", "specificity", "score"):
        table.add_column(name, justify="right")
    for point in points:
        scores = [point[name] for name in ("efficacy", "generalization", "specificity", "score")]
        said = [f"{value:.3f}" if value is not None else "–" for value in scores]
        table.add_row(str(point["layer"]), f"{point['theta']:g}", f"{point['gain']:g}", *said)
    return table


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
