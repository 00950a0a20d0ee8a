"""What running unattended costs besides the work: Prefect's share of a batch, and the way from a dropped file to the champion.

    python -m benchmarks.orchestration [--batches 8] [--drops 5] [--every 40]

Both on the built-in base, with the servers of an `errata up` on this machine.
(a) `apply-edits` in one process, against those servers. Overhead of a batch is the wall time of the flow less the sum of what the plain
functions of its stages took (those that talk to MLflow included), warm: the first two batches are not counted.
(b) The schedule at work. Seconds from the rename that makes a file visible until MLflow's server names the new commit as champion, one
file at a time, dropped at other moments of the interval each. `waited` is until the run was due, `start` until its process had begun the
flow (a new Python that imports torch, Prefect and MLflow), `run` the rest.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from prefect.settings import PREFECT_API_URL, temporary_settings
from rich.console import Console
from rich.table import Table

from benchmarks.live import STREAM, Live, run_live
from errata.builtin import CAVEAT
from errata.edits import Edit
from errata.world import make_world

_TARGET = 2.0
"""Seconds of overhead per batch that we allow ourselves."""
_COLD = 2
"""Batches until everything is imported and cached."""

out = Console(width=110)


def run(
    batches: Annotated[int, typer.Option(min=_COLD + 1, help="Batches of (a).")] = 8,
    drops: Annotated[int, typer.Option(min=1, help="Files of (b).")] = 5,
    every: Annotated[int, typer.Option(min=5, help="Seconds between scheduled runs in (b).")] = 40,
    size: Annotated[int, typer.Option(min=1, help="Edits per batch.")] = 10,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    edits = make_world().make_edits(max(batches, drops) * size, 0, "distinct")
    chunks = [edits[index * size : (index + 1) * size] for index in range(max(batches, drops))]
    with tempfile.TemporaryDirectory() as home, run_live(Path(home), "--every", str(every)) as live:
        _print_ways(live, [_drop(live, chunk, every * index / drops) for index, chunk in enumerate(chunks[:drops])], every, size)
    with tempfile.TemporaryDirectory() as home, run_live(Path(home), "--no-schedules") as live:
        os.environ["ERRATA_MLFLOW__TRACKING_URI"] = live.state["mlflow"]
        logging.disable(logging.INFO)
        with temporary_settings({PREFECT_API_URL: f"{live.state['prefect']}/api"}):
            _print_overhead(_apply(live, chunks[:batches]), size)


def _drop(live: Live, edits: Sequence[Edit], pause: float) -> dict[str, float]:
    """Seconds of the way of one file."""
    time.sleep(pause)
    expected = live.stream.refresh().seq + 1
    live.submit(edits)
    dropped = datetime.now(UTC)
    live.wait_for(lambda: live.find_champion() == expected)
    there = datetime.now(UTC)
    # The run that committed: the newest that had begun when the commit was made.
    moment = live.stream.log.read(expected).time if live.stream.refresh() else there
    begun = [run for run in live.read_runs("RUNNING", "COMPLETED") if datetime.fromisoformat(run["start_time"]) <= moment]
    due, start = (datetime.fromisoformat(begun[0][name]) for name in ("expected_start_time", "start_time"))
    due = max(due, dropped)
    return {
        "waited": (due - dropped).total_seconds(),
        "start": (start - due).total_seconds(),
        "run": (there - start).total_seconds(),
        "all": (there - dropped).total_seconds(),
    }


def _print_ways(live: Live, ways: Sequence[dict[str, float]], every: int, size: int) -> None:
    table = Table(title=f"file of {size} edits → champion, every {every} s; errata up was ready after {live.seconds:.0f} s")
    table.add_column("seconds")
    for name in ways[0]:
        table.add_column(name, justify="right")
    for what, choose in (("least", min), ("median", median), ("most", max)):
        table.add_row(what, *(f"{choose([way[name] for way in ways]):.1f}" for name in ways[0]))
    out.print(table)


def _apply(live: Live, chunks: Sequence[Sequence[Edit]]) -> list[tuple[float, float]]:
    """Wall seconds of the flow and of its stages, for each batch."""
    from flows import edit

    spent: list[float] = []
    for name in ("order_batch", "prepare_pairs", "merge_pairs", "judge_candidate", "commit_batch", "project_versions", "refresh_sums"):
        task: Any = getattr(edit, name)
        task.fn = _time(task.fn, spent)
    rows = []
    for chunk in chunks:
        live.submit(chunk)
        spent.clear()
        begun = time.perf_counter()
        (summary,) = edit.apply_edits(STREAM)
        rows.append((time.perf_counter() - begun, sum(spent)))
        assert summary.decision == "accept", summary
    return rows[_COLD:]


def _time(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - begun)

    return timed


def _print_overhead(rows: Sequence[tuple[float, float]], size: int) -> None:
    table = Table(title=f"one batch of {size} edits, {len(rows)} warm batches")
    for name in ("seconds", "flow", "stages", "overhead"):
        table.add_column(name, justify="right" if name != "seconds" else "left")
    for what, choose in (("least", min), ("median", median), ("most", max)):
        table.add_row(what, *(f"{choose(values):.2f}" for values in (*zip(*rows, strict=True), [wall - work for wall, work in rows])))
    out.print(table)
    overhead = median(wall - work for wall, work in rows)
    out.print(f"overhead {overhead:.2f} s per batch: {'within' if overhead <= _TARGET else 'ABOVE'} the {_TARGET:.0f} s that we allow")


if __name__ == "__main__":
    typer.run(run)
