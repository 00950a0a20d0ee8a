"""D4S and iReVa side by side on the same streams of the built-in base.

    python -m benchmarks.neuron_quality [--sizes 100,300,1000,5000] [--seeds 3] [--batch 20] [--mixed 300]
        [--figure benchmarks/figures/neuron_quality.png]

Each stream holds another fact each time, several of one person among them, and is measured on its way; a size for which the base does not
know three times as many facts becomes the largest for which it does. D4S has its shipped profile and key groups, iReVa its published values
(layer 4 of 5, θ .75, gain 80), as initialised and with retrofit. Strict argmax accuracy: every token of the answer must be the model's
first choice, teacher forced. Specificity and untouched facts are counted against the truth, the base's own share beside them; retention
is the efficacy of the stream's first 100 edits, those of them that are live, after the last. Decoding is of random tokens.
"""

import copy
import os
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from benchmarks.common import MemoryBlobs, Stopwatch, load_builtin
from benchmarks.edit_quality import Grown, grow_stream, share
from errata.builtin import CAVEAT
from errata.candidates import load_artifacts
from errata.editors.artifacts import Artifact
from errata.editors.base import Editor
from errata.editors.ireva.editor import IReVa
from errata.edits import SLOT, Edit
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.figures import open_figure, save_figure
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.profiles import NeuronProfile, Retrofit
from errata.suggestions import suggest_neurons
from errata.world import World

MEASURES = ("efficacy", "generalization", "specificity", "untouched", "retention")
D4S_NAME, PLAIN, TRAINED = "D4S", "iReVa", "iReVa, retrofit"
_FIRST = 100
_UNTOUCHED = 2_000
_ROUNDS = 3
"""How often the whole context is decoded for the overhead."""

out = Console(width=150)


@dataclass(frozen=True)
class Point:
    """What one editor has made of the first edits of one stream."""

    stream: str
    size: int
    editor: str
    shares: Mapping[str, float]
    base: Mapping[str, float]
    """The unedited base's share, where that says something."""
    wall: float
    """Seconds per edit: preparing, merging, solving, storing."""
    cpu: float
    pairs: float
    """Bytes per edit of all pairs that were stored, those included that another grouping took the place of."""
    artifact: float
    """Bytes per edit of artifact and parts."""
    overhead: float
    """Extra time per decoded token over the unedited base."""


def run(
    sizes: Annotated[str, typer.Option(help="Edits at which streams are measured, comma-separated.")] = "100,300,1000,5000",
    seeds: Annotated[int, typer.Option(min=1, help="Streams.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Edits per batch; sizes are rounded down to whole batches.")] = 20,
    mixed: Annotated[int, typer.Option(min=0, help="Edits of the mixed streams: re-edits and targets of two words; 0: none.")] = 300,
    figure: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("benchmarks/figures/neuron_quality.png"),
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    print_load("start")
    base, d4s, world = load_builtin()
    known = _count_known(base, world)
    marks = _choose_sizes([int(size) for size in sizes.split(",")], known, batch)
    out.print(f"The base knows {known:,} of its {len(world.facts):,} facts; at most a third of them may be edited: {known // 3:,}.")
    editors: dict[str, Editor[Any]] = {
        D4S_NAME: d4s,
        **{name: IReVa(choose_published(base, name), base.layout) for name in (PLAIN, TRAINED)},
    }
    points: list[Point] = []
    for seed in range(seeds):
        streams = {"slots": (world.make_edits(marks[-1], seed, "slots"), marks)}
        if mixed:
            streams["mixed"] = (world.make_edits(mixed, seed, "mixed"), [mixed])
        for stream, (edits, at) in streams.items():
            said = ask_base(base, world, edits)
            for name, editor in editors.items():
                found = _follow_stream(base, editor, world, edits, said, batch, at)
                points += [Point(stream, size, name, **measured) for size, measured in found.items()]
            out.print(f"[dim]{stream}, seed {seed}: done[/]")
    _print_quality(points)
    _print_costs(points)
    _print_retrofit(points)
    print_load("after the streams")
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw_scores([point for point in points if point.stream == "slots"], figure)
    out.print(f"picture: {figure}")


def choose_published(base: Base, name: str) -> NeuronProfile:
    """Published values for this base."""
    suggested = suggest_neurons(base.layout.count_layers(base.model), builtin=True)
    trained = Retrofit(theta=suggested.solve.theta, gain=suggested.solve.gain) if name == TRAINED else None
    return NeuronProfile(base=base.digest, prepare=suggested.prepare.model_copy(update={"retrofit": trained}), solve=suggested.solve)


def _count_known(base: Base, world: World) -> int:
    """Facts that the base says, asked by a phrasing that it was trained on."""
    rows = [(fact.trained_templates[0].replace(SLOT, fact.subject), fact.object) for fact in world.facts]
    return round(share(base, rows) * len(rows))


def _choose_sizes(asked: Sequence[int], known: int, batch: int) -> list[int]:
    """Sizes of which the base knows three times as many facts, in whole batches; a larger one becomes the largest there is."""
    return sorted({min(size, known // 3) // batch * batch for size in asked} - {0})


def _follow_stream(
    base: Base,
    editor: Editor[Any],
    world: World,
    stream: Sequence[Edit],
    said: Collection[tuple[str, str]],
    batch: int,
    at: Sequence[int],
) -> dict[int, dict[str, Any]]:
    """Size → the fields of its point."""
    blobs, watch, stored, points = MemoryBlobs(), Stopwatch(), set[str](), {}
    for number, grown in enumerate(grow_stream(blobs, base, editor, stream, batch, watch=watch), start=1):
        stored |= {ref.pairs for ref in grown.refs.values()}
        size = min(number * batch, len(stream))
        if size in at:
            (artifact,) = load_artifacts(blobs, grown.manifest)
            (layer,) = grown.manifest.layers
            parts = [digest for digest in (layer.artifact, *layer.parts) if digest]
            points[size] = {
                **measure_edits(base, world, stream, said, grown, artifact),
                "wall": sum(watch.wall.values()) / size,
                "cpu": sum(watch.cpu.values()) / size,
                "pairs": sum(len(blobs.get(digest)) for digest in stored) / size,
                "artifact": sum(len(blobs.get(digest)) for digest in parts) / size,
                "overhead": _measure_overhead(base, artifact),
            }
    return points


def ask_base(base: Base, world: World, stream: Sequence[Edit]) -> set[tuple[str, str]]:
    """What the unedited base says as the world has it, of all that a stream is asked which it does not edit."""
    rows = list(dict.fromkeys([*_list_neighbours(stream), *world.untouched(stream)[:_UNTOUCHED]]))
    scored = score_targets(base, rows, batch_tokens=2_048)
    return {row for row in rows if all_correct(scored[row].chosen, scored[row].target)}


def _list_neighbours(edits: Sequence[Edit]) -> list[tuple[str, str]]:
    return [(probe.prompt, probe.answers[0]) for edit in edits for probe in edit.neighborhood_prompts]


def measure_edits(
    base: Base, world: World, stream: Sequence[Edit], said: Collection[tuple[str, str]], grown: Grown, artifact: Artifact
) -> dict[str, Any]:
    """Shares with the artifact, and those of the base.

    Args:
        said: `ask_base` of the stream.
    """
    live = list(grown.live.values())
    firsts = {edit.edit_id for edit in stream[:_FIRST]}
    rows = {
        "efficacy": [(edit.rewrite_prompt, edit.target_new) for edit in live],
        "generalization": [(prompt, edit.target_new) for edit in live for prompt in edit.paraphrase_prompts],
        "specificity": _list_neighbours(live),
        "untouched": world.untouched(stream)[:_UNTOUCHED],
        "retention": [(edit.rewrite_prompt, edit.target_new) for edit in live if edit.edit_id in firsts],
    }
    own = {name: statistics.mean(row in said for row in rows[name]) for name in ("specificity", "untouched")}
    with attach(base, [artifact]):
        return {"shares": {name: share(base, asked) for name, asked in rows.items()}, "base": own}


def _measure_overhead(base: Base, artifact: Artifact) -> float:
    """Median extra time of a token decoded with a KV cache, batch 1, over that of the unedited base. The two, each a model of its own, take
    turns at every token."""
    edited = replace(base, model=copy.deepcopy(base.model))
    models = {"base": base.model, "edited": edited.model}
    ids = torch.randint(base.model.config.vocab_size, (1, base.context), generator=torch.Generator().manual_seed(0))
    taken: dict[str, list[float]] = {name: [] for name in models}
    with attach(edited, [artifact]), torch.inference_mode():
        for _ in range(_ROUNDS):
            caches = {name: DynamicCache(config=base.model.config) for name in models}
            for place in range(base.context):
                for name in sorted(models, reverse=bool(place % 2)):
                    start = time.perf_counter()
                    models[name](ids[:, place : place + 1], past_key_values=caches[name])
                    taken[name].append(time.perf_counter() - start)
    extra = statistics.median(after - before for before, after in zip(taken["base"], taken["edited"], strict=True))
    return extra / statistics.median(taken["base"])


def _group(points: Sequence[Point]) -> list[tuple[tuple[str, int, str], list[Point]]]:
    """Points of all seeds by stream, size and editor."""

    def key(point: Point) -> tuple[str, int, str]:
        return point.stream, point.size, point.editor

    order = [D4S_NAME, PLAIN, TRAINED]
    ordered = sorted(points, key=lambda point: (point.stream != "slots", point.size, order.index(point.editor)))
    return [(name, list(group)) for name, group in groupby(ordered, key)]


def _print_quality(points: Sequence[Point]) -> None:
    table = Table(title="strict argmax accuracy, mean of the streams; (least) over them")
    for name in ("stream", "edits", "editor"):
        table.add_column(name)
    for name in ("efficacy", "generalization", "specificity", "(base)", "untouched", "(base)", "retention of the first 100"):
        table.add_column(name, justify="right")
    for (stream, size, editor), group in _group(points):
        cells = {name: [point.shares[name] for point in group] for name in MEASURES}
        own = {name: [point.base[name] for point in group] for name in group[0].base}
        spelt = {name: f"{spell_share(statistics.mean(values))} ({spell_share(min(values))})" for name, values in cells.items()}
        near, far = (spell_share(statistics.mean(own[name])) for name in ("specificity", "untouched"))
        shares = [spelt["efficacy"], spelt["generalization"], spelt["specificity"], near, spelt["untouched"], far, spelt["retention"]]
        table.add_row(stream, f"{size:,}", editor, *shares, end_section=editor == TRAINED)
    out.print(table)


def _print_costs(points: Sequence[Point]) -> None:
    table = Table(title="what it costs: mean of the streams, of all edits so far; decoding: median of the streams")
    for name in ("stream", "edits", "editor"):
        table.add_column(name)
    for name in ("wall s per edit", "CPU s per edit", "pairs, bytes per edit", "artifact, bytes per edit", "decoding, extra"):
        table.add_column(name, justify="right")
    for (stream, size, editor), group in _group(points):
        wall, cpu, pairs, artifact = (
            statistics.mean(getattr(point, name) for point in group) for name in ("wall", "cpu", "pairs", "artifact")
        )
        overhead = statistics.median(point.overhead for point in group)
        cells = (f"{wall:.4f}", f"{cpu:.4f}", f"{pairs:,.0f}", f"{artifact:,.0f}", f"{overhead:+.1%}")
        table.add_row(stream, f"{size:,}", editor, *cells, end_section=editor == TRAINED)
    out.print(table)


def _print_retrofit(points: Sequence[Point]) -> None:
    largest = max(point.size for point in points if point.stream == "slots")
    rates = {
        name: 1 / statistics.mean(point.cpu for point in points if (point.stream, point.size, point.editor) == ("slots", largest, name))
        for name in (PLAIN, TRAINED)
    }
    out.print(
        f"Written per CPU-second, {largest:,} edits: {rates[PLAIN]:.0f} as initialised, {rates[TRAINED]:.0f} with retrofit. The published "
        "code takes .58 s and 2.7 s per edit, one at a time (1.6 and 7.5 hours for 10,000 on an A800, GPT-2 XL): a model almost a thousand "
        "times as large, so this is no comparison."
    )


def spell_share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def draw_scores(points: Sequence[Point], path: Path) -> None:
    """Scores against the number of edits: a line per editor, the streams' range as a band, the base's own share dotted."""
    figure, axes = open_figure((13, 3.6), 1, len(MEASURES), sharex=True)
    names = list(dict.fromkeys(point.editor for point in points))
    sizes = sorted({point.size for point in points})
    for axis, measure in zip(axes, MEASURES, strict=True):
        for name in names:
            values = [[point.shares[measure] for point in points if (point.editor, point.size) == (name, size)] for size in sizes]
            (line,) = axis.plot(sizes, [statistics.mean(some) for some in values], marker="o", markersize=3, label=name)
            axis.fill_between(sizes, list(map(min, values)), list(map(max, values)), alpha=0.15, color=line.get_color(), linewidth=0)
        if measure in points[0].base:
            own = [statistics.mean(point.base[measure] for point in points if point.size == size) for size in sizes]
            axis.plot(sizes, own, linestyle=":", color="black", label="base")
        axis.set(title=measure, xscale="log", xlabel="edits")
    axes[2].legend(fontsize=8)
    figure.suptitle(CAVEAT, fontsize=7)
    save_figure(figure, path, dpi=120)


def print_load(when: str) -> None:
    out.print(f"[dim]load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {when}[/]")


if __name__ == "__main__":
    typer.run(run)
