"""Facts in context, and folded into a LoRA, beside D4S, on the built-in base that reads facts: the orderings of MIKE and DistillMIKE.

    OMP_NUM_THREADS=1 python -m benchmarks.context_quality [--seeds 3] [--edits 0] [--judged 300] [--parts sweep,methods,ablations,cost]
        [--figure benchmarks/figures/context_quality.png] [--quick]

sweep      D4S alone on growing streams; the first of `slots` (another fact each time, several of one person among them) whose held-out
           paraphrases take less than .95 is what the rest is measured on, unless `--edits` says how many.
methods    Another stream per seed. "Always in context" puts an edit's own fact, with MIKE's demonstrations, before every question about it,
           neighbours too (as IKE does); MIKE is an `EditMemory` of all edits; DistillMIKE is D4S and a LoRA that this memory taught.
ablations  Seed 0: without the base as teacher, a student from the base, fewer demonstrations.
options    Seed 0: step size, passes and tokens per step of the distillation. Only when asked for.
cost       Seed 0: seconds per question and length of the prompt, taking turns; what a cache of the likeliest tokens loses.

All methods are asked the same about the same edits, `--judged` of a stream. Strict argmax accuracy, teacher forced, on probes that no
method was taught (`split_probes`). ES, PS, NS: the new object is likelier than the old one, or for NS less likely. What was measured lies
in the cache, in `context_quality`: the same command goes on where it was. Delete that folder after changing code.
"""

import copy
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.common import load_builtin
from benchmarks.context_streams import (
    ALWAYS,
    BASE,
    D4S_NAME,
    DISTILLED,
    MIKE,
    MIKE_PAPER,
    SHOWN,
    STUDENTS,
    Kind,
    Shares,
    Stream,
    Teaching,
    out,
    tell,
)
from errata.builtin import CAVEAT, CONTEXTUAL
from errata.distill_options import DistillOptions
from errata.distillation.distil import measure_truncation
from errata.editors.memory import open_encoder
from errata.edits import SLOT
from errata.evaluation.scoring import score_targets
from errata.figures import open_figure, save_figure
from errata.modeling.patch import attach
from errata.modeling.queries import encode_queries
from errata.retrieval.routing import FLOOR, PLACEHOLDER, find_floor
from errata.settings import load_settings
from errata.world import RELATIONS

METHODS = (BASE, ALWAYS, D4S_NAME, MIKE, MIKE_PAPER, DISTILLED)
SWEEP: tuple[tuple[Kind, int], ...] = (
    ("distinct", 300),
    ("slots", 300),
    ("slots", 600),
    ("slots", 1_000),
    ("slots", 1_200),
    ("slots", 1_500),
    ("slots", 2_000),
)
WANTED = 0.95
GRID = tuple(
    Teaching(DistillOptions(lr=lr, epochs=epochs, batch_tokens=batch_tokens), from_base)
    for lr, epochs, batch_tokens, from_base in (
        (5e-3, 10, 1_024, False),
        (5e-3, 20, 256, False),
        (2e-3, 20, 256, False),
        (1e-2, 20, 256, False),
        (5e-3, 10, 1_024, True),
        (5e-3, 20, 256, True),
    )
)
_MEASURES = ("efficacy", "generalization", "agreement", "truth", "same subject, agreement", "same subject, truth", "ES", "PS", "NS")
_TIMED, _ROUNDS = 60, 3
_TRUNCATED, _TOP_KS = 150, (1, 4, 16, 64)

Found = Mapping[int, Mapping[str, Shares]]
"""Seed → method → shares."""


def run(
    seeds: Annotated[int, typer.Option(min=1, help="Streams.")] = 3,
    edits: Annotated[int, typer.Option(min=0, help="Edits per stream; 0: the first size of the sweep that D4S does not master.")] = 0,
    judged: Annotated[int, typer.Option(min=1, help="Edits per stream that are asked about.")] = 300,
    parts: Annotated[str, typer.Option(help="Of sweep, methods, ablations, options and cost.")] = "sweep,methods,ablations,cost",
    figure: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("benchmarks/figures/context_quality.png"),
    quick: Annotated[bool, typer.Option(help="One stream of 40 edits, to see it run.")] = False,
) -> None:
    torch.set_num_threads(1)
    seeds, edits, judged = (1, 40, 40) if quick else (seeds, edits, judged)
    out.print(f"[dim]{CAVEAT}[/]")
    _print_load("at the start")
    base, editor, world = load_builtin(CONTEXTUAL)
    work = load_settings().cache / "context_quality"
    work.mkdir(parents=True, exist_ok=True)

    def open_stream(kind: Kind, size: int, seed: int) -> Stream:
        return Stream(base, editor, world, kind, size, seed, judged, work)

    asked = set(parts.split(","))
    size = edits or _sweep_sizes(open_stream)
    first = open_stream("slots", size, 0)
    if "options" in asked:
        _print_options(first)
    if "methods" in asked:
        found: dict[int, dict[str, Shares]] = {}
        for seed in range(seeds):
            stream = open_stream("slots", size, seed) if seed else first
            found[seed] = {name: stream.measure(name) for name in METHODS}
            _print_shares(f"seed {seed}: {size:,} edits of distinct slots, {min(judged, size)} of them asked about", found[seed])
            _print_training(stream, [DISTILLED])
        _print_routing(first)
        _print_means(found)
        _print_orderings(found)
        figure.parent.mkdir(parents=True, exist_ok=True)
        draw_methods(found, figure)
        out.print(f"picture: {figure}")
    if "ablations" in asked:
        names = (BASE, D4S_NAME, *SHOWN, MIKE, MIKE_PAPER, *STUDENTS)
        _print_shares("ablations, seed 0; MIKE shows 12 where nothing is said", {name: first.measure(name) for name in names})
        _print_training(first, list(STUDENTS))
    if "cost" in asked:
        _print_cost(first)
        _print_truncation(first)
    _print_load("at the end")
    out.print(f"[dim]{time.process_time():.0f} CPU-s[/]")


def _sweep_sizes(open_stream: Callable[[Kind, int, int], Stream]) -> int:
    """D4S on growing streams, until it fails on paraphrases that nobody taught it."""
    table = Table(title=f"D4S alone, seed 0: the first stream of slots with a generalization below {WANTED} is taken")
    for name in ("stream", "edits", "efficacy", "generalization", "specificity, agreement", "truth", "truth, base"):
        table.add_column(name, justify="right")
    size = 0
    for kind, size in SWEEP:
        stream = open_stream(kind, size, 0)
        shares, own = stream.measure(D4S_NAME), stream.measure(BASE)
        values = [*(shares[name] for name in ("efficacy", "generalization", "agreement", "truth")), own["truth"]]
        table.add_row(kind, f"{size:,}", *map(_spell, values))
        if kind == "slots" and shares["generalization"] < WANTED:
            break
    out.print(table)
    return size


def _print_shares(title: str, rows: Mapping[str, Shares]) -> None:
    table = Table(title=title)
    table.add_column("method")
    for name in _MEASURES:
        table.add_column(name, justify="right")
    for method, shares in rows.items():
        table.add_row(method, *(_spell(shares.get(name)) for name in _MEASURES))
    out.print(table)


def _print_means(found: Found) -> None:
    table = Table(title=f"mean of {len(found)} streams (least to most)")
    table.add_column("method")
    for name in _MEASURES:
        table.add_column(name, justify="right")
    for method in METHODS:
        columns = [[shares[method][name] for shares in found.values()] for name in _MEASURES]
        table.add_row(method, *(f"{_spell(statistics.mean(some))} ({_spell(min(some))}–{_spell(max(some))})" for some in columns))
    out.print(table)


def _print_orderings(found: Found) -> None:
    """Each link of the orderings of algorithms.md, Part 6."""
    links = [(name, *pair) for name in ("agreement", "truth", "NS") for pair in ((ALWAYS, "<", D4S_NAME), (D4S_NAME, "<", DISTILLED))]
    links += [(name, DISTILLED, "≤", BASE) for name in ("agreement", "truth", "NS")]
    links += [(name, *pair) for name in ("generalization", "PS") for pair in ((D4S_NAME, "<", DISTILLED), (DISTILLED, "≤", MIKE))]
    table = Table(title="orderings, seed by seed")
    for title in ("measure", "wanted", *(f"seed {seed}" for seed in found)):
        table.add_column(title)
    for measure, left, sign, right in links:
        cells = []
        for methods in found.values():
            one, other = methods[left][measure], methods[right][measure]
            holds = one < other if sign == "<" else one <= other
            cells.append(f"{'holds' if holds else '[red]does not[/]'}: {_spell(one)}, {_spell(other)}")
        table.add_row(measure, f"{left} {sign} {right}", *cells)
    out.print(table)


def _print_routing(stream: Stream) -> None:
    """Which fact memory finds for what is asked, against the floor that would suit this world's few templates best."""
    templates = [(relation.name, template.replace(SLOT, PLACEHOLDER)) for relation in RELATIONS for template in relation.templates]
    rows = open_encoder(stream.memory.options.encoder).encode([template for _, template in templates])
    scores: dict[bool, list[float]] = {True: [], False: []}
    for (one, _), left in zip(templates, rows, strict=True):
        for (other, _), right in zip(templates, rows, strict=True):
            if left is not right:
                scores[one == other].append(float(left @ right))
    fitting = find_floor(scores[True], scores[False])
    memories = {
        f"guarded, floor {FLOOR}": stream.memory,
        f"guarded, floor {fitting:.3f}: fitted to this world": stream.change_memory(floor=fitting),
        "paper": stream.change_memory(scope="paper"),
    }
    kinds = ("rewrite", "paraphrase", "neighbour", "same")
    table = Table(title=f"routing, seed {stream.seed}: share of questions that got the fact of their edit (that got another one)")
    for name in ("scope", *kinds):
        table.add_column(name, justify="right")
    for name, memory in memories.items():
        routes = memory.route([row.prompt for row in stream.questions])
        own, other = ({kind: [] for kind in kinds} for _ in range(2))
        for row, route in zip(stream.questions, routes, strict=True):
            own[row.kind].append(route.fact is not None and route.fact.id == row.edit.edit_id)
            other[row.kind].append(route.fact is not None and route.fact.id != row.edit.edit_id)
        table.add_row(name, *(f"{_spell(statistics.mean(own[kind]))} ({_spell(statistics.mean(other[kind]))})" for kind in kinds))
    out.print(table)


def _print_training(stream: Stream, names: Sequence[str]) -> None:
    table = Table(title=f"distillation, seed {stream.seed}: one thread; KL on validation, nats per position, in scope and out of scope")
    titles = ("lessons in, out", "rows (from the disk)", "teacher s", "student s", "steps", "best epoch", "KL before", "after")
    for title in ("student", *titles):
        table.add_column(title, justify="right")
    for name in names:
        report = stream.read_report(STUDENTS[name])
        table.add_row(
            name,
            f"{report['lessons_inside']:,}, {report['lessons_outside']:,}",
            f"{report['teacher_rows']:,} ({report['teacher_reused']:,})",
            f"{report['teacher_seconds']:.0f}",
            f"{report['student_seconds']:.0f}",
            f"{report['steps']:,}",
            f"{report['best_epoch']} of {len(report['curve'])}",
            *(", ".join(f"{report[when][scope]:.3f}" for scope in ("inside", "outside")) for when in ("before", "after")),
        )
    out.print(table)


def _print_options(stream: Stream) -> None:
    table = Table(title=f"how to distil: {stream.size:,} edits, seed {stream.seed}")
    for name in ("student from", "lr", "epochs", "batch_tokens", "steps", "best epoch", "student s", "KL after", *_MEASURES[:6]):
        table.add_column(name, justify="right")
    for teaching in GRID:
        options = teaching.options
        shares, report = stream.measure_student(teaching), stream.read_report(teaching)
        best = f"{report['best_epoch']} of {len(report['curve'])}"
        spelt = ", ".join(f"{report['after'][scope]:.3f}" for scope in ("inside", "outside"))
        settings = ("base" if teaching.from_base else D4S_NAME, f"{options.lr:g}", str(options.epochs), str(options.batch_tokens))
        cells = (*settings, f"{report['steps']:,}", best, f"{report['student_seconds']:.0f}", spelt)
        table.add_row(*cells, *(_spell(shares.get(name)) for name in _MEASURES[:6]))
        tell(" ".join(map(str, cells)) + "  " + " ".join(_spell(shares.get(name)) for name in _MEASURES[:6]))
    out.print(table)


def _print_cost(stream: Stream) -> None:
    """The methods, each on a model of its own, take turns at every question; the next token is read, batch 1."""
    names = (BASE, D4S_NAME, DISTILLED, MIKE, MIKE_PAPER)
    table = Table(title="one question, read to its next token: median of all, and of each question's own ratio to the base")
    for title in ("question", "method", "seconds", "of the base", "routing alone, s", "routing and writing, s", "tokens read"):
        table.add_column(title, justify="right")
    draw = random.Random(0)
    with ExitStack() as stack:
        seated = {name: replace(stream.base, model=copy.deepcopy(stream.base.model)) for name in names}
        for name, own in seated.items():
            stack.enter_context(attach(own, stream.find_artifacts(name)))
        for kind in ("paraphrase", "neighbour"):
            prompts = [row.prompt for row in stream.questions if row.kind == kind][:_TIMED]
            taken: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(-1, _ROUNDS):
                for prompt in prompts:
                    for name in draw.sample(names, len(names)):
                        seconds = _time(lambda own=seated[name], prompt=prompt: score_targets(own, [(prompt, None)], batch_tokens=1))  # type: ignore[misc]
                        if turn >= 0:  # the first is for warming up
                            taken[name].append(seconds)
            for name in names:
                ratios = [own / other for own, other in zip(taken[name], taken[BASE], strict=True)]
                lengths = [len(ids) for ids in encode_queries(seated[name], prompts, 0)]
                routing = writing = ""
                if name in (MIKE, MIKE_PAPER):
                    (memory,) = stream.find_artifacts(name)
                    routing, writing = (
                        f"{statistics.median(_time(lambda do=do, prompt=prompt: do([prompt])) for prompt in prompts):.4f}"  # type: ignore[misc]
                        for do in (memory.route, lambda asked, own=seated[name]: encode_queries(own, asked, 0))  # type: ignore[attr-defined]
                    )
                spelt = (f"{statistics.median(taken[name]):.4f}", f"{statistics.median(ratios):.3f}")
                table.add_row(kind, name, *spelt, routing, writing, f"{statistics.median(lengths):.0f}")
    out.print(table)


def _time(do: Callable[[], object]) -> float:
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def _print_truncation(stream: Stream) -> None:
    inside, outside = ([lesson for lesson in stream.drawn.lessons if lesson.in_scope is scope] for scope in (True, False))
    lessons = [*inside[:_TRUNCATED], *outside[:_TRUNCATED]]
    table = Table(title=f"KL(teacher ‖ student), nats per position, {len(lessons)} lessons: the likeliest tokens and one bucket")
    table.add_column("student")
    for top_k in ("whole vocabulary", *(f"top {top_k}" for top_k in _TOP_KS)):
        table.add_column(top_k, justify="right")
    for name in (D4S_NAME, DISTILLED):
        found = measure_truncation(stream.base, stream.find_artifacts(name), lessons, DistillOptions(), _TOP_KS)
        table.add_row(name, *(f"{found[top_k]:.4f}" for top_k in (None, *_TOP_KS)))
    out.print(table)


def draw_methods(found: Found, path: Path) -> None:
    """Generalization against specificity, a small mark per seed, a large one for the mean: neighbours, other facts of the subject."""
    figure, axes = open_figure((10, 4.6), 1, 2, sharex=True, sharey=True)
    # Okabe and Ito's colours; marks tell the methods apart without them.
    looks = dict(
        zip(
            METHODS,
            (("#000000", "s"), ("#D55E00", "v"), ("#E69F00", "o"), ("#009E73", "^"), ("#56B4E9", "D"), ("#0072B2", "*")),
            strict=True,
        )
    )
    panels = {"truth": "questions about other persons", "same subject, truth": "other facts of the same person"}
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        for method, (colour, mark) in looks.items():
            across, up = ([shares[method][name] for shares in found.values()] for name in ("generalization", measure))
            axis.scatter(across, up, s=18, color=colour, marker=mark, alpha=0.45, linewidths=0)
            size = 190 if mark == "*" else 80
            axis.scatter(statistics.mean(across), statistics.mean(up), s=size, color=colour, marker=mark, label=method, edgecolors="white")
        axis.set(title=title, xlabel="generalization: held-out paraphrases that say the new fact")
    axes[0].set_ylabel("specificity: answers that are still true")
    axes[0].legend(fontsize=8)
    figure.suptitle(CAVEAT, fontsize=7)
    save_figure(figure, path, dpi=120)


def _spell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}".removeprefix("0")


def _print_load(when: str) -> None:
    out.print(f"[dim]load {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), {when}[/]")


if __name__ == "__main__":
    typer.run(run)
