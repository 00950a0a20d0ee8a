"""Whether a batch costs more the longer a stream has lived: CPU-seconds per stage of 100 batches on the built-in base.

    python -m benchmarks.growth [--batches 100] [--batch 7]

Compares the median of the last eleven batches with that of batches 2 to 12, in one run, through the code a stream uses (local storage,
no Prefect, no MLflow). The retention sample, the one thing that grows until it is full, is held at 20 edits so that it is full from
the second batch; the gate's budgets are opened wide, so that every batch takes one round.
"""

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from errata.builtin import CAVEAT
from errata.edits import Submission, spell_submission
from errata.settings import load_settings
from errata.world import make_world
from registry.inbox import drop_lines
from registry.stream import open_stream
from tasks.committing import commit_batch
from tasks.editing import merge_pairs, prepare_pairs
from tasks.evaluating import judge_candidate
from tasks.intake import order_batch
from tasks.onboarding import BUILTIN_NAME, start_stream

_STAGES = ("order", "prepare", "merge", "evaluate", "commit")
_OPEN_GATE = {"MAX_Z_LOSS": "20", "MIN_OWN_SPECIFICITY": "0", "MIN_SPECIFICITY": "0", "MIN_RETENTION": "0", "MAX_RETENTION_DROP": "1"}
_OPEN_GATE |= {"MAX_LOCALITY_KL": "100", "MAX_NORM_RATIO": "1000", "MIN_EFFICACY": "0"}

out = Console(width=110)


def run(
    batches: Annotated[int, typer.Option(min=30, help="Batches of the stream.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Edits per batch.")] = 7,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    with tempfile.TemporaryDirectory() as root:
        os.environ |= {f"ERRATA_GATE__{name}": value for name, value in _OPEN_GATE.items()}
        os.environ |= {"ERRATA_ROOT": str(Path(root) / "root"), "ERRATA_EVALUATE__RETENTION_SAMPLE": "20", "ERRATA_STREAM": "growth"}
        settings = load_settings()
        start_stream(settings, BUILTIN_NAME)
        edits = make_world().make_edits(batches * batch, 0, "distinct")
        spent: dict[str, list[float]] = defaultdict(list)
        for index in track(range(batches), "batches", console=out, transient=True):
            stream = open_stream(settings.root, settings.stream, settings.cache)
            chunk = edits[index * batch : (index + 1) * batch]
            drop_lines(stream, [spell_submission(Submission(edit=edit)) for edit in chunk])
            for name, seconds in _apply_one(settings.stream).items():
                spent[name].append(seconds)
    _print(spent, batches, batch)


def _apply_one(stream: str) -> dict[str, float]:
    spent: dict[str, float] = {}

    def timed(name: str, stage: Callable[..., Any], *args: Any) -> Any:
        begun = time.process_time()
        result = stage.fn(*args)  # type: ignore[attr-defined]  # the plain function of a Prefect task
        spent[name] = time.process_time() - begun
        return result

    order = timed("order", order_batch, stream)
    prepared = timed("prepare", prepare_pairs, stream, order)
    candidate = timed("merge", merge_pairs, stream, order, prepared, prepared.ready)
    judged = timed("evaluate", judge_candidate, stream, order, candidate, [])
    timed("commit", commit_batch, stream, order, prepared, [judged])
    return spent


def _print(spent: dict[str, list[float]], batches: int, batch: int) -> None:
    table = Table(title=f"CPU-seconds per batch of {batch} edits, {torch.get_num_threads()} threads")
    for name in ("stage", "batches 2–12", f"batches {batches - 10}–{batches}", "ratio"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    whole = [sum(values) for values in zip(*(spent[name] for name in _STAGES), strict=True)]
    for name, values in [*((name, spent[name]) for name in _STAGES), ("all", whole)]:
        early, late = median(values[1:12]), median(values[-11:])
        table.add_row(name, f"{early:.3f}", f"{late:.3f}", f"{late / early:.2f}")
    out.print(table)


if __name__ == "__main__":
    typer.run(run)
