"""What an edit costs (the data side of the D4S paper): what is written, against how far the weights grow and what else they then say.

    python -m benchmarks.edit_costs [--edits 300] [--seeds 3] [--batch 50] [--radius 0.75 --radius 3]

D4S writes streams of equal persons and facts into the built-in base, one stream after the other, each into the untouched base: the three
forms of the paper (yes or no, multiple choice, direct), and direct prompts with targets of 1, 2, 4 and 8 words drawn from all objects of
the world, two distinct targets or another one per edit. The shipped profile keeps δ in a ball of .75 ‖h‖; most of these targets end on its
surface, which hides what they would take. So the same is done with a wider ball and three times the steps. Nothing else is changed.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks.common import MemoryBlobs, load_builtin
from benchmarks.edit_quality import write_stream
from benchmarks.neuron_quality import print_load
from errata.builtin import CAVEAT
from errata.candidates import load_artifacts, read_pairs
from errata.editors.d4s.editor import D4S
from errata.edits import Edit, Risk
from errata.evaluation.evaluate import evaluate_candidate
from errata.evaluation.risk import measure_risks
from errata.figures import open_figure, save_figure
from errata.forms import make_formed_edits
from errata.modeling.loading import Base
from errata.settings import EvaluateSettings
from errata.world import RELATIONS, World

LENGTHS = (1, 2, 4, 8)
FEW = 2
SHIPPED, WIDE = 0.75, 3.0
FIGURE = Path(__file__).parent / "figures" / "edit_costs.png"
_WORDS = tuple(word for relation in RELATIONS for word in relation.one_word_objects)

out = Console(width=150)


class Cost(NamedTuple):
    """One edit: what was foretold, and what it took."""

    risk: Risk
    own: float
    """‖Δ‖, Frobenius over the edited layers, of its pair alone in the model."""


class Point(NamedTuple):
    """One stream, written."""

    seed: int
    radius: float
    stream: str
    risk: float
    """Median of its edits, in nats."""
    tokens: float
    distinct: int
    """Different targets."""
    growth: float
    """mean |W| / mean |W0| of the layer that grew most."""
    specificity: float
    """Agreement with the base on its neighbours."""
    efficacy: float
    generalization: float
    costs: tuple[Cost, ...]


def run(
    edits: Annotated[int, typer.Option(min=2, help="Edits per stream.")] = 300,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Edits per batch.")] = 50,
    radii: Annotated[list[float] | None, typer.Option("--radius", help="Radii of the ball of δ, in ‖h‖.")] = None,
    figure: Annotated[Path, typer.Option(help="Where the plot goes.")] = FIGURE,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    print_load("at the start")
    base, editor, world = load_builtin()
    jobs = [
        (radius, seed, name, stream)
        for radius in radii or (SHIPPED, WIDE)
        for seed in range(seeds)
        for name, stream in make_streams(world, edits, seed).items()
    ]
    points = [
        measure_stream(base, widen(editor, radius), seed, radius, name, stream, batch)
        for radius, seed, name, stream in track(jobs, "streams", console=out, transient=True)
    ]
    for chosen in dict.fromkeys(point.radius for point in points):
        some = [point for point in points if point.radius == chosen]
        print_points(some)
        print_orderings(some)
        print_correlations(some)
    draw_costs(points, figure)
    print_load("at the end")
    out.print(f"drawn: {figure}")


def make_streams(world: World, count: int, seed: int) -> dict[str, list[Edit]]:
    """Name → stream; persons, facts and batches are the same in all of them."""
    direct = make_formed_edits(world, count, seed, "direct")
    streams = {
        "yes/no": make_formed_edits(world, count, seed, "judgement"),
        "choice": make_formed_edits(world, count, seed, "choice"),
        "direct": direct,
    }
    for length in LENGTHS:
        for name, distinct in (("few", FEW), ("many", count)):
            rng = random.Random(f"targets {length} {distinct} {seed}")
            pool = [" ".join(rng.sample(_WORDS, length)) for _ in range(distinct)]
            targets = pool if distinct == count else [rng.choice(pool) for _ in direct]
            streams[f"{length} × {name}"] = [
                edit.model_copy(update={"target_new": target}) for edit, target in zip(direct, targets, strict=True)
            ]
    return streams


def widen(editor: D4S, radius: float) -> D4S:
    """The editor with another ball, and three times the steps in a wider one: its step size grows with the ball and shrinks with steps."""
    prepare = editor._profile.prepare
    steps = prepare.steps * (3 if radius > prepare.clamp else 1)
    return editor.change(editor._profile.model_copy(update={"prepare": prepare.model_copy(update={"clamp": radius, "steps": steps})}))


def measure_stream(base: Base, editor: D4S, seed: int, radius: float, name: str, stream: Sequence[Edit], batch: int) -> Point:
    risks = measure_risks(base, stream, batch_tokens=EvaluateSettings().batch_tokens)
    blobs = MemoryBlobs()
    manifest, refs = write_stream(blobs, base, editor, stream, batch)
    report = evaluate_candidate(base, load_artifacts(blobs, manifest), stream, [], None, EvaluateSettings())
    costs = []
    for edit in stream:
        alone = editor.solve_exact(editor.merge(editor.empty_state(), read_pairs(blobs, [refs[edit.edit_id]]), None))
        costs.append(Cost(risks[edit.edit_id], math.hypot(*(float(delta.norm()) for delta in alone.values()))))
    return Point(
        seed=seed,
        radius=radius,
        stream=name,
        risk=median(cost.risk.figure for cost in costs),
        tokens=median(cost.risk.tokens for cost in costs),
        distinct=len({edit.target_new for edit in stream}),
        growth=max(norms.mean_abs_ratio or math.inf for norms in report.norms),
        specificity=report.paper.specificity.value or 0.0,
        efficacy=report.efficacy.value or 0.0,
        generalization=report.paper.generalization.value or 0.0,
        costs=tuple(costs),
    )


def print_points(points: Sequence[Point]) -> None:
    """One line per stream: the mean of the seeds, and of the growth the range."""
    table = Table(title=f"radius {points[0].radius:g} ‖h‖: means of {len({point.seed for point in points})} seeds")
    table.add_column("stream")
    for name in ("median risk, nats", "tokens", "distinct", "mean |W|", "(range)", "specificity lost", "efficacy", "generalization"):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(point.stream for point in points):
        own = [point for point in points if point.stream == name]
        mean = {field: sum(getattr(point, field) for point in own) / len(own) for field in Point._fields[3:10]}
        grown = [point.growth for point in own]
        table.add_row(
            name,
            f"{mean['risk']:.1f}",
            f"{mean['tokens']:.1f}",
            f"{mean['distinct']:.0f}",
            f"{mean['growth']:.3f}",
            f"{min(grown):.3f}–{max(grown):.3f}",
            *(f"{value:.3f}" for value in (1 - mean["specificity"], mean["efficacy"], mean["generalization"])),
            end_section=name == "direct",
        )
    out.print(table)


def print_orderings(points: Sequence[Point]) -> None:
    """The paper's orderings of norm growth, each stated as holding or not on each seed; a tie holds."""
    chains = {
        "yes/no ≤ choice ≤ direct": ("yes/no", "choice", "direct"),
        "longer ≥ shorter, few targets": tuple(f"{length} × few" for length in LENGTHS),
        "longer ≥ shorter, many targets": tuple(f"{length} × many" for length in LENGTHS),
        **{f"many ≥ few targets, length {length}": (f"{length} × few", f"{length} × many") for length in LENGTHS},
    }
    table = Table(title=f"radius {points[0].radius:g} ‖h‖: does mean |W| grow in this order?")
    table.add_column("ordering")
    seeds = sorted({point.seed for point in points})
    for seed in seeds:
        table.add_column(f"seed {seed}")
    for name, chain in chains.items():
        cells = []
        for seed in seeds:
            grown = {point.stream: point.growth for point in points if point.seed == seed}
            values = [grown[stream] for stream in chain]
            cells.append(("holds" if values == sorted(values) else "does not hold") + f" ({', '.join(f'{value:.2f}' for value in values)})")
        table.add_row(name, *cells)
    out.print(table)


def print_correlations(points: Sequence[Point]) -> None:
    """Which figure of the target foretells the cost: Spearman's rank correlations. Specificity is compared between streams of direct
    prompts only, whose neighbours are the same."""
    table = Table(title=f"radius {points[0].radius:g} ‖h‖: rank correlation (Spearman) of what is foretold with what it took")
    table.add_column("foretold by")
    for name in ("‖Δ‖ of each edit alone, all streams", "of streams: mean |W|", "of direct streams: specificity lost"):
        table.add_column(name, justify="right")
    costs = [cost for point in points for cost in point.costs]
    direct = [place for place, point in enumerate(points) if point.stream not in ("yes/no", "choice")]
    figures = {
        "perplexity": lambda risk: risk.perplexity or math.inf,
        "tokens": lambda risk: risk.tokens,
        "risk: tokens · ln perplexity": lambda risk: risk.figure,
    }
    for name, read in figures.items():
        middles = [median(read(cost.risk) for cost in point.costs) for point in points]
        table.add_row(
            name,
            f"{correlate([read(cost.risk) for cost in costs], [cost.own for cost in costs]):+.2f}",
            f"{correlate(middles, [point.growth for point in points]):+.2f}",
            f"{correlate([middles[place] for place in direct], [1 - points[place].specificity for place in direct]):+.2f}",
        )
    out.print(table)


def correlate(one: Sequence[float], other: Sequence[float]) -> float:
    return float(spearmanr(one, other).statistic)


def draw_costs(points: Sequence[Point], path: Path) -> None:
    """Per stream, risk against growth and against specificity lost; per edit, risk against its own contribution. A row per radius."""
    radii = list(dict.fromkeys(point.radius for point in points))
    figure, axes = open_figure((13, 3.8 * len(radii)), len(radii), 3)
    grid = [axes[3 * row : 3 * row + 3] for row in range(len(radii))]
    names = list(dict.fromkeys(point.stream for point in points))
    for row, radius in zip(grid, radii, strict=True):
        for index, name in enumerate(names):
            some = [point for point in points if (point.radius, point.stream) == (radius, name)]
            look = {"color": f"C{index % 10}", "marker": "o^s"[index % 3], "label": name}
            risks = [point.risk for point in some]
            row[0].scatter(risks, [point.growth for point in some], **look)
            row[1].scatter(risks, [1 - point.specificity for point in some], **look)
            costs = [cost for point in some for cost in point.costs if math.isfinite(cost.risk.figure)]
            row[2].scatter([cost.risk.figure for cost in costs], [cost.own for cost in costs], s=4, alpha=0.4, **look)
        labels = ("mean |W| / mean |W0|", "specificity lost (disagreement with the base)", "‖Δ‖ of each edit alone")
        for axis, label in zip(row, labels, strict=True):
            axis.set(xlabel="risk, nats" if axis is row[2] else "median risk of the stream, nats", ylabel=label, xscale="log")
            axis.set_title(f"radius {radius:g} ‖h‖", fontsize=9)
    grid[0][0].legend(fontsize=7)
    figure.suptitle(CAVEAT, fontsize=7)
    save_figure(figure, path, dpi=110)


if __name__ == "__main__":
    typer.run(run)
