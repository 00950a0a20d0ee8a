"""Left alone for many batches, with faults: nothing lost, nothing twice, memory flat.

    python -m benchmarks.soak [--batches 200] [--every 10] [--size 4]

`errata up --every` on the built-in base. A file is dropped, a scheduled run applies it and ends, the next is dropped. In turn: a run is
killed in the middle (kill -9), a file holds malformed lines, MLflow's server is killed, the worker is killed, and twice nothing.
Afterwards every edit has to be live exactly once, a replay of the log has to be sound, and MLflow's champion has to be the head.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.live import Live, run_live
from errata.builtin import CAVEAT
from errata.edits import Edit, Submission, spell_submission
from errata.world import make_world
from flows.children import find_family
from registry.inbox import drop_lines
from tasks.replaying import replay_log

_FAULTS = ("run killed", "none", "malformed lines", "mlflow killed", "none", "worker killed")
_PARTS = {"prefect server": "prefect", "mlflow": "mlflow", "worker start": "worker"}
"""A part of the command line → whose memory it is."""
_YOUNG = 65.0
"""Seconds that a process must have lived before it is killed: `errata up` gives up on one that it started again sooner ago."""

out = Console(width=110)


def run(
    batches: Annotated[int, typer.Option(min=6, help="Files to drop.")] = 200,
    every: Annotated[int, typer.Option(min=5, help="Seconds between scheduled runs.")] = 10,
    size: Annotated[int, typer.Option(min=1, help="Edits per file.")] = 4,
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    edits = make_world().make_edits(batches * size, 0, "distinct")
    with tempfile.TemporaryDirectory() as temporary, run_live(Path(temporary), "--every", str(every)) as live:
        seconds: dict[str, list[float]] = {}
        memory: list[dict[str, int]] = []
        faults: Counter[str] = Counter()
        for index in range(batches):
            fault = _FAULTS[index % len(_FAULTS)]
            live.wait_for(lambda: not live.read_runs("PENDING", "RUNNING"))  # a run takes whatever comes while it is at it
            done = _drop(live, edits[index * size : (index + 1) * size], fault)
            faults[fault if done else f"{fault}: not possible, too young"] += 1
            begun = time.monotonic()
            live.wait_for(lambda count=(index + 1) * size: _count_live(live) >= count)
            seconds.setdefault(fault, []).append(time.monotonic() - begun)
            memory.append(_measure(live))
            out.print(f"{index + 1:4} {fault:16} {seconds[fault][-1]:6.1f} s  {memory[-1]}", highlight=False)
        head = live.stream.refresh().champion
        live.wait_for(lambda: live.find_champion() == head)
        _print(seconds, memory, faults, live.count_runs("COMPLETED", "FAILED", "CRASHED"))
        _check(live, edits)


def _drop(live: Live, edits: Sequence[Edit], fault: str) -> bool:
    """A file, and the fault; whether it could be had."""
    lines = [spell_submission(Submission(edit=edit)) for edit in edits]
    drop_lines(live.stream, [b'{"subject": "nobody"}', b"{", *lines] if fault == "malformed lines" else lines)
    if fault == "run killed":
        return _kill(live, "prefect.engine", 0.0, patience=120.0)
    if fault in ("mlflow killed", "worker killed"):
        return _kill(live, {"mlflow killed": "mlflow server", "worker killed": "worker start"}[fault], _YOUNG)
    return True


def _kill(live: Live, part: str, age: float, patience: float = 0.0) -> bool:
    end = time.monotonic() + patience
    while True:
        for process in find_family(Path(live.state["logs"])):
            with suppress(psutil.Error):
                if part in " ".join(process.cmdline()) and time.time() - process.create_time() >= age:
                    time.sleep(3.0 if age == 0 else 0.0)  # somewhere in the middle
                    process.kill()
                    return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


def _count_live(live: Live) -> int:
    time.sleep(0.3)
    live.stream.refresh()
    return live.stream.index.counts().get("live", 0)


def _measure(live: Live) -> dict[str, int]:
    """MiB of `errata up` and of each process that stays."""
    found = {"up": psutil.Process(live.process.pid).memory_info().rss >> 20}
    for process in find_family(Path(live.state["logs"])):
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            for part, name in _PARTS.items():
                if part in line:
                    found[name] = found.get(name, 0) + (process.memory_info().rss >> 20)
    return found


def _print(seconds: dict[str, list[float]], memory: Sequence[dict[str, int]], faults: Counter[str], states: dict[str, int]) -> None:
    table = Table(title=f"{len(memory)} files; runs: {states}; {dict(faults)}")
    for name in ("fault", "files", "median s", "most s"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for fault, values in seconds.items():
        table.add_row(fault, str(len(values)), f"{median(values):.0f}", f"{max(values):.0f}")
    out.print(table)
    part = max(len(memory) // 4, 1)
    table = Table(title="memory, MiB, medians")
    for name in ("process", "first quarter", "last quarter"):
        table.add_column(name, justify="left" if name == "process" else "right")
    for name in memory[0]:
        rows = (memory[:part], memory[-part:])
        table.add_row(name, *(f"{median(row.get(name, 0) for row in chosen):.0f}" for chosen in rows))
    out.print(table)


def _check(live: Live, edits: Sequence[Edit]) -> None:
    rows = Counter(row.id for row in live.stream.index.find_rows("live"))
    wrong = {edit.edit_id for edit in edits if rows[edit.edit_id] != 1} | (rows.keys() - {edit.edit_id for edit in edits})
    report = replay_log.fn(live.stream.name, None, True)  # type: ignore[attr-defined]  # the plain function of a Prefect task
    out.print(f"{len(edits)} edits, {len(wrong)} of them not live exactly once; replay {'sound' if report.sound else 'UNSOUND'}")
    if wrong or not report.sound:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(run)
