"""Whether a stream stays as quick as on its first day: opening, committing, and bytes of state, up to 10,000 commits.

    python -m benchmarks.long_run [--commits 10000] [--batch 1] [--width 1024]

Synthetic pairs of the shape that the built-in base gives (two layers, keys of 1,024, residuals of 256), written through the code that a
stream uses: objects, the commit protocol, checkpoints, local storage. Between the lengths that are measured, commits name their pairs
and change lists, and nobody solves; at each of them a snapshot is taken and five whole batches are timed.
*Opening* is done by a process of its own, first without and then with its local cache; memory is what it took beyond its imports.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, cast

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from errata.candidates import build_candidate, extend_state, load_state, spell_changes, start_manifest, take_snapshot
from errata.compaction import compact_state
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.edits import Edit, canonical_json
from errata.manifests import PairRef, extend_recipe
from errata.modeling.layout import ModelLayout
from errata.profiles import PrepareOptions, Profile, SolveOptions
from registry.commit import commit
from registry.events import EditsCommit, InitCommit
from registry.rows import BatchRow, FileUse, Outcome
from registry.stream import create_stream

_BASE, _PROFILE, _NAME = "b" * 64, "c" * 64, "long"
_LAYERS = (2, 3)
_TIMED = 5
"""Whole batches timed at each length."""
_SNAPSHOT_EVERY = 10
_WRITER: dict[str, Any] = {"actor": "benchmark", "host": "here", "versions": {"errata": "0"}, "time": datetime.now(UTC)}

out = Console(width=130)


class Point(NamedTuple):
    """What was measured at one length of the log."""

    commits: int
    live: int
    form: str
    state: int
    """Bytes of the snapshot."""
    cold: int
    """Bytes of all pairs objects."""
    batch: dict[str, float]
    """Stage → CPU seconds, median of whole batches."""
    wall: float
    """Wall seconds of one whole batch."""
    worst: float
    """CPU seconds of the longest commit since the length before, as a rule one whose checkpoint merged large segments."""
    compaction: float
    """CPU seconds to sum all live pairs anew, compare and store."""
    gap: float
    """Relative, of the weights after it."""
    openings: dict[str, dict[str, Any]]


def run(
    commits: Annotated[int, typer.Option(min=10, help="Length of the log.")] = 10_000,
    batch: Annotated[int, typer.Option(min=1, help="Edits per commit.")] = 1,
    width: Annotated[int, typer.Option(min=16, help="Width of a key; a residual has a quarter of it.")] = 1_024,
    root: Annotated[Path | None, typer.Option(help="Empty folder to keep the stream in; a temporary one without it.")] = None,
) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        writer = _Writer(_make_editor(width), str(root or Path(work) / "root"), Path(work) / "cache", batch, width)
        begun, cpu = time.perf_counter(), time.process_time()
        points = [writer.reach(length, Path(work) / "probe") for length in _list_lengths(commits)]
        spent = f"{time.perf_counter() - begun:.0f} s, {time.process_time() - cpu:.0f} CPU-seconds"
    out.print(
        f"{commits:,} commits of {batch} edits, keys of {width}, {torch.get_num_threads()} threads; all in {spent}, "
        f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )
    _print_openings(points)
    _print_batches(points)
    _print_bytes(points)


class _Writer:
    """Writes one stream, commit by commit."""

    def __init__(self, editor: D4S, root: str, cache: Path, batch: int, width: int) -> None:
        self._editor, self._root, self._batch, self._width = editor, root, batch, width
        self._manifest = start_manifest(editor, _BASE, _PROFILE)
        init = InitCommit(
            seq=0, parent="", base={"kind": "folder", "digest": _BASE}, profile=_PROFILE, editors=("d4s",), manifest="0" * 64, **_WRITER
        )
        self._stream = create_stream(root, _NAME, init, json.loads(self._manifest.to_bytes()), cache)
        self._state, self._waiting = editor.empty_state(), list[Pairs]()
        self._cold = self._live = 0
        self._worst = 0.0

    def reach(self, length: int, probe: Path) -> Point:
        """Go on to `length` commits, whole batches last, and measure."""
        for seq in track(range(self._stream.head.seq + 1, length - _TIMED + 1), f"to commit {length:,}", console=out, transient=True):
            self._write_plain(snapshot=seq == length - _TIMED)
        worst, self._worst = self._worst, 0.0
        timed = [self._write_whole() for _ in range(_TIMED)]
        state = load_state(self._stream.objects, self._editor, self._manifest.layers[0].state)
        shutil.rmtree(probe, ignore_errors=True)
        openings = {how: _open_elsewhere(self._root, probe) for how in ("cold", "cached")}
        data = len(state.to_bytes())
        spent = {name: median(item[name] for item in timed) for name in timed[0]}
        begun = time.process_time()
        live = [PairRef(pairs=row.pairs or "", row=row.row or 0) for row in self._stream.index.find_rows("live")]
        gap = compact_state(self._stream.objects, self._editor, self._manifest, live).gap
        compaction, form = time.process_time() - begun, "sums" if state.pairs is None else "pairs"
        wall = spent.pop("wall")
        return Point(length, self._live, form, data, self._cold, spent, wall, worst, compaction, gap, openings)

    def _write_plain(self, snapshot: bool) -> None:
        """A commit that nobody solves; the state catches up where a snapshot is wanted."""
        refs, pairs = self._store_pairs()
        self._waiting.append(pairs)
        objects, layer = self._stream.objects, self._manifest.layers[0]
        if snapshot or len(self._waiting) * self._batch >= 500:
            self._state = self._editor.merge(self._state, Pairs.concatenate(self._waiting), None)
            self._waiting = []
        changes = spell_changes(refs, [])
        objects.put(changes)
        ref = extend_state(layer.state, changes)
        ref = ref.model_copy(update={"pairs_since": ref.pairs_since[-_SNAPSHOT_EVERY:]})
        if snapshot:
            ref = take_snapshot(ref, objects.put(self._state.to_bytes()), {})
        recipe = extend_recipe(self._manifest.recipe, "add", pairs.digest_rows())
        self._manifest = self._manifest.model_copy(update={"layers": (layer.model_copy(update={"state": ref}),), "recipe": recipe})
        begun = time.process_time()
        self._commit(refs)
        self._worst = max(self._worst, time.process_time() - begun)

    def _write_whole(self) -> dict[str, float]:
        """A batch as the flow writes it from stored pairs on; what it took."""
        refs, pairs = self._store_pairs()
        wall, begun = time.perf_counter(), time.process_time()
        made = build_candidate(self._stream.objects, self._editor, self._manifest, add=refs, remove=[], snapshot_every=_SNAPSHOT_EVERY)
        merged = time.process_time()
        self._manifest = made.manifest
        self._commit(refs)
        done = time.process_time()
        spent = {"merge and solve": merged - begun, "commit": done - merged, "both": done - begun, "wall": time.perf_counter() - wall}
        self._waiting.append(pairs)
        return spent

    def _store_pairs(self) -> tuple[list[PairRef], Pairs]:
        first, count = self._live, self._batch
        owners = tuple((f"edit-{index:07}",) for index in range(first, first + count))
        keys = {layer: torch.randn(count, self._width) for layer in _LAYERS}
        pairs = Pairs(_BASE, PrepareOptions(layers=_LAYERS).digest, owners, torch.randn(count, self._width // 4), keys)
        data = pairs.to_bytes()
        self._cold += len(data)
        self._live += count
        digest = self._stream.objects.put(data)
        return [PairRef(pairs=digest, row=row) for row in range(count)], pairs

    def _commit(self, refs: list[PairRef]) -> None:
        stream, head = self._stream, self._stream.head
        first = self._live - len(refs)
        edits = [
            Edit(id=f"edit-{first + row:07}", subject=f"Person {first + row}", prompt="{} lives in", target_new="Paris")
            for row in range(len(refs))
        ]
        raw = stream.objects.put(b"".join(canonical_json(edit.model_dump(mode="json", exclude_none=True)) + b"\n" for edit in edits))
        name, seq = f"{head.seq + 1}.jsonl", head.seq + 1
        rows, outcomes = [], []
        for row, edit in enumerate(edits):
            where: dict[str, Any] = {"occurrence": f"{edit.edit_id}@{seq}", "origin": f"{name}:{row + 1}", "file": raw, "line": row + 1}
            rows.append(BatchRow(position=row, edit=edit, **where).model_dump(mode="json", exclude_none=True))
            outcomes.append(Outcome(outcome="live", pairs=refs[row].pairs, row=row, **where).model_dump(mode="json", exclude_none=True))
        draft = EditsCommit(
            seq=seq,
            parent=head.digest,
            batch=stream.objects.put_rows(rows),
            outcomes=stream.objects.put_rows(outcomes),
            pairs=tuple(dict.fromkeys(ref.pairs for ref in refs)),
            manifest=stream.objects.put(self._manifest.to_bytes()),
            files=(FileUse(digest=raw, name=name, lines=((1, len(refs)),), done=True),),
            decision="accept",
            promoted=True,
            **_WRITER,
        )
        commit(stream, draft, head)


def _open_elsewhere(root: str, cache: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.opening", root, _NAME, str(cache)]
    facts: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return facts


def _list_lengths(commits: int) -> Iterator[int]:
    length = 10
    while length < commits:
        yield length
        length *= 10
    yield commits


def _make_editor(width: int) -> D4S:
    keys = torch.randn(2 * width, width)
    moments = Moments(_BASE, "synthetic", 0, len(keys), dict.fromkeys(_LAYERS, keys.T @ keys / len(keys)))
    solve = SolveOptions(lam=200.0, spread="even", moments="0" * 64)
    profile = Profile(base=_BASE, prepare=PrepareOptions(layers=_LAYERS), solve=solve)
    return D4S(profile, moments, cast(ModelLayout, SimpleNamespace(weight_name=lambda layer: f"layer.{layer}")))


def _print_openings(points: list[Point]) -> None:
    columns = ("commits", "rows", "cold, s", "CPU, s", "MiB", "reads", "keys listed", "cached, s", "CPU, s", "MiB", "reads")
    table = _make_table("opening", columns)
    for point in points:
        cold, cached = point.openings["cold"], point.openings["cached"]
        asked = cold["asked"]
        table.add_row(
            *(f"{point.commits:,}", f"{cold['rows']:,}", f"{cold['wall']:.3f}", f"{cold['cpu']:.3f}", f"{cold['mib']:.0f}"),
            *(f"{asked['read']}", f"{asked.get('listed', 0)}"),
            *(f"{cached['wall']:.3f}", f"{cached['cpu']:.3f}", f"{cached['mib']:.0f}", f"{cached['asked']['read']}"),
        )
    out.print(table)


def _print_batches(points: list[Point]) -> None:
    table = _make_table(
        "one batch, CPU seconds",
        ("commits", "state is", *points[0].batch, "wall, s", "worst commit", "commit / first", "both / first", "both / first sums"),
    )
    sums = next((point for point in points if point.form == "sums"), None)
    for point in points:
        first, spent = points[0].batch, point.batch
        table.add_row(
            *(f"{point.commits:,}", point.form, *(f"{value:.4f}" for value in spent.values()), f"{point.wall:.4f}", f"{point.worst:.3f}"),
            *(f"{spent[name] / first[name]:.2f}" for name in ("commit", "both")),
            f"{spent['both'] / sums.batch['both']:.2f}" if sums and point.form == "sums" else "–",
        )
    out.print(table)


def _print_bytes(points: list[Point]) -> None:
    table = _make_table("bytes, and a compaction", ("live edits", "state is", "state", "cold pairs", "compact, CPU s", "weights moved by"))
    for point in points:
        row = (f"{point.live:,}", point.form, f"{point.state:,}", f"{point.cold:,}", f"{point.compaction:.2f}", f"{point.gap:.1e}")
        table.add_row(*row)
    out.print(table)


def _make_table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    return table


if __name__ == "__main__":
    typer.run(run)
