"""How layers should share a residual: each spread at several λ on the built-in base, the same edits each time.

    python -m benchmarks.spread [--seeds 2]

Strict argmax accuracy, as in `benchmarks.edit_quality`. ρ is what a pair alone realises of its residual, by the algebra that takes keys as
frozen; the error of z is what is missing at the site of the edited model itself, ‖z − h‖ / ‖z − h0‖, interference included.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import mean
from typing import Annotated, get_args

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import MemoryBlobs, load_builtin
from benchmarks.edit_quality import share, write_stream
from errata.builtin import CAVEAT
from errata.candidates import read_pairs
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments, collect_moments
from errata.editors.d4s.reading import read_base
from errata.editors.rows import build_rows
from errata.edits import Edit
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.monitors.norms import measure_norms
from errata.profiles import PrepareOptions, Profile, SolveOptions, Spread
from errata.suggestions import BUILTIN_SUGGESTION
from errata.world import World

LAMBDAS = (200.0, 2_000.0, 20_000.0)
SIZES = (100, 300)
BATCH = 20
_ASKED = 600
"""Paraphrases, neighbours and untouched facts that are asked, each at most."""
_PUBLISHED: Spread = "d4s_code"

out = Console(width=130)


@dataclass(frozen=True)
class Way:
    """One way to write a stream."""

    layers: tuple[int, ...]
    spread: Spread
    keys: str = "frozen"

    @property
    def name(self) -> str:
        return "cascade" if self.keys == "cascade" else self.spread

    def choose(self, options: PrepareOptions) -> PrepareOptions:
        return PrepareOptions.model_validate({**options.model_dump(), "layers": self.layers, "keying": self.keys})


def list_ways() -> list[Way]:
    """Every single layer; two and three layers with every spread, and with keys as published."""
    several = [spread for spread in get_args(Spread) if spread != "single"]
    ways = [Way((layer,), "single") for layer in (0, 1, 2)]
    for layers in ((1, 2), (0, 1, 2)):
        ways += [Way(layers, spread) for spread in several] + [Way(layers, _PUBLISHED, "cascade")]
    return ways


@dataclass(frozen=True)
class Exam:
    """What is asked about the first edits of a stream, and what the base says to it."""

    edits: Sequence[Edit]
    general: Sequence[tuple[str, str]]
    near: Sequence[tuple[str, str]]
    far: Sequence[tuple[str, str]]

    @classmethod
    def write(cls, world: World, edits: Sequence[Edit]) -> "Exam":
        general = [(prompt, edit.target_new) for edit in edits for prompt in edit.paraphrase_prompts]
        near = [(probe.prompt, probe.answers[0]) for edit in edits for probe in edit.neighborhood_prompts]
        far = world.untouched(edits)
        return cls(edits, *(rows[:: max(len(rows) // _ASKED, 1)][:_ASKED] for rows in (general, near, far)))


def run(seeds: Annotated[int, typer.Option(help="Streams of distinct persons; every figure is their mean.")] = 2) -> None:
    base, shipped, world = load_builtin()
    begun = time.process_time()
    moments = collect_moments(base, (0, 1, 2), world.corpus(seed=0))
    found: dict[tuple[Way, float, int], list[dict[str, float]]] = defaultdict(list)
    for seed in range(seeds):
        stream = world.make_edits(max(SIZES), seed, "distinct")
        exams = {size: Exam.write(world, stream[:size]) for size in SIZES}
        known: dict[int, Pairs] = {}
        for way, lam in product(list_ways(), LAMBDAS):
            editor = _make_editor(base, way, lam, moments)
            pairs = _prepare(base, editor, way, stream, known, moments)
            for size, exam in exams.items():
                found[way, lam, size].append(_measure(base, editor, way, pairs.take(range(size)), exam))
    out.print(f"[dim]{CAVEAT}[/]")
    for size in SIZES:
        out.print(_tabulate(size, {key[:2]: rows for key, rows in found.items() if key[2] == size}, seeds))
    out.print(f"{time.process_time() - begun:.0f} s of CPU time")


def _make_editor(base: Base, way: Way, lam: float, moments: Moments) -> D4S:
    prepare = way.choose(BUILTIN_SUGGESTION.prepare)
    solve = SolveOptions(lam=lam, spread=way.spread, moments="0" * 64)
    return D4S(Profile(base=base.digest, prepare=prepare, solve=solve), moments, base.layout)


def _prepare(base: Base, editor: D4S, way: Way, stream: Sequence[Edit], known: dict[int, Pairs], moments: Moments) -> Pairs:
    """The stream's pairs, in its order. Frozen ones are prepared once per last layer: residuals depend on nothing else, and keys of a
    layer on nothing but the layer. Cascading ones depend on λ."""
    top = way.layers[-1]
    if way.keys == "cascade":
        return _write(base, editor, stream)
    if top not in known:
        widest = Way(tuple(range(top + 1)), "even" if top else "single")
        known[top] = _write(base, _make_editor(base, widest, 1.0, moments), stream)
    keys = {layer: known[top].keys[layer] for layer in way.layers}
    return replace(known[top], prepare=editor.empty_state().prepare, keys=keys)


def _write(base: Base, editor: D4S, stream: Sequence[Edit]) -> Pairs:
    blobs = MemoryBlobs()
    _, refs = write_stream(blobs, base, editor, stream, BATCH)
    pairs = read_pairs(blobs, [refs[edit.edit_id] for edit in stream])
    assert pairs is not None and len(pairs) == len(stream), "distinct persons share no pairs"
    return pairs


def _measure(base: Base, editor: D4S, way: Way, pairs: Pairs, exam: Exam) -> dict[str, float]:
    state = editor.merge(editor.empty_state(), pairs, None)
    artifact = editor.solve(state)
    assert artifact is not None
    before, after = _read_site(base, way, exam.edits), None
    with attach(base, [artifact]):
        after = _read_site(base, way, exam.edits)
        shares = {
            "efficacy": share(base, [(edit.rewrite_prompt, edit.target_new) for edit in exam.edits]),
            "generalization": share(base, exam.general),
            "specificity": share(base, exam.near),
            "untouched": share(base, exam.far),
        }
    missing = (before + pairs.residuals - after).norm(dim=1) / pairs.residuals.norm(dim=1)
    ratios = [norms.mean_abs_ratio or 0.0 for norms in measure_norms(base, artifact.deltas)]
    return {
        **shares,
        "mean |W|": max(ratios),
        "ρ": float(editor.measure_fits(state, pairs).mean()),
        "z error": float(missing.mean()),
    }


@torch.no_grad()
def _read_site(base: Base, way: Way, edits: Sequence[Edit]) -> torch.Tensor:
    """[n, d] hidden states of the bare prompts at the site, of the weights as they are now."""
    rows = [build_rows(base.tokenizer, edit, ("{}",), base.span) for edit in edits]
    return read_base(base, [[row] for row in rows], way.layers[-1:]).site


def _tabulate(size: int, found: Mapping[tuple[Way, float], list[dict[str, float]]], seeds: int) -> Table:
    table = Table(title=f"{size} edits of distinct persons in batches of {BATCH}, mean over {seeds} seeds")
    columns = list(next(iter(found.values()))[0])
    for name in ("layers", "spread", "λ", *columns):
        table.add_column(name, justify="left" if name in ("layers", "spread") else "right")
    for cells in _spell(found, columns):
        table.add_row(*cells)
    return table


def _spell(found: Mapping[tuple[Way, float], list[dict[str, float]]], columns: Sequence[str]) -> Iterator[list[str]]:
    for (way, lam), rows in found.items():
        values = [mean(row[name] for row in rows) for name in columns]
        yield [", ".join(map(str, way.layers)), way.name, f"{lam:g}", *(f"{value:.3f}" for value in values)]


if __name__ == "__main__":
    typer.run(run)
