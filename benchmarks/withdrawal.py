"""Taking edits back: seconds and exactness of withdrawing 1, 10 and 100 of 1,000 and of 10,000 edits.

    python -m benchmarks.withdrawal [--sizes 1000 10000] [--width 3072]

Synthetic pairs of the shape that one layer of GPT-2 small gives (keys of 3,072, residuals of 768), 100 to a commit, a snapshot every
ten. *Withdraw* is all that the flow does with weights: read the state and the named pairs, subtract, solve, store. *Exact* compares,
in float64, with the remaining pairs added up from nothing, which is what `errata withdraw --check` does at the cost given. Each is also
given as a ratio to *a batch*: the same work for 100 new edits on the same state, in the same run.
"""

import random
import time
from types import SimpleNamespace
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import MemoryBlobs
from errata.candidates import build_candidate, start_manifest
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments
from errata.exactness import measure_exactness
from errata.manifests import Manifest, PairRef
from errata.modeling.layout import ModelLayout
from errata.profiles import PrepareOptions, Profile, SolveOptions

_BASE = "b" * 64
_BATCH = 100
_SNAPSHOT_EVERY = 10

out = Console(width=110)


def run(
    sizes: Annotated[list[int] | None, typer.Option(help="Live edits; 1,000 and 10,000 unless told.")] = None,
    width: Annotated[int, typer.Option(min=64, help="Width of a key; a residual has a quarter of it.")] = 3_072,
) -> None:
    torch.manual_seed(0)
    table = Table(title=f"withdrawal, keys of {width}, {torch.get_num_threads()} threads")
    names = ("live", "withdrawn", "withdraw, s", "CPU, s", "of a batch", "objects read", "check, s", "exact to", "same bits")
    for name in names:
        table.add_column(name, justify="right")
    for size in sizes or [1_000, 10_000]:
        blobs, editor = _CountingBlobs(), _make_editor(width)
        manifest, refs = _fill(blobs, editor, size, width)
        whole = _time_batch(blobs, editor, manifest, width)
        out.print(f"{size:,} live: a batch of {_BATCH} takes {whole:.2f} CPU-seconds")
        for count in (1, 10, 100):
            leaving = set(random.Random(count).sample(range(size), count))
            blobs.read = 0
            begun, cpu = time.perf_counter(), time.process_time()
            removed = [refs[index] for index in sorted(leaving)]
            candidate = build_candidate(blobs, editor, manifest, add=[], remove=removed, snapshot_every=_SNAPSHOT_EVERY)
            withdrawn, spent, read = time.perf_counter() - begun, time.process_time() - cpu, blobs.read
            live = [ref for index, ref in enumerate(refs) if index not in leaving]
            exactness = measure_exactness(blobs, editor, candidate.manifest, live)
            checked = time.perf_counter() - begun - withdrawn
            row = (f"{size:,}", f"{count}", f"{withdrawn:.2f}", f"{spent:.2f}", f"{spent / whole:.2f}", f"{read}", f"{checked:.2f}")
            table.add_row(*row, f"{exactness.relative:.1e}", "yes" if exactness.identical else "no")
    out.print(table)


class _CountingBlobs(MemoryBlobs):
    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def get(self, digest: str) -> bytes:
        self.read += 1
        return super().get(digest)


def _make_editor(width: int) -> D4S:
    keys = torch.randn(4 * width, width, dtype=torch.float64)
    moments = Moments(_BASE, "synthetic", 0, len(keys), {0: (keys.T @ keys / len(keys)).float()})
    solve = SolveOptions(lam=1_000.0, spread="single", moments="0" * 64)
    profile = Profile(base=_BASE, prepare=PrepareOptions(layers=(0,)), solve=solve)
    return D4S(profile, moments, cast(ModelLayout, SimpleNamespace(weight_name=lambda layer: f"layer.{layer}")))


def _fill(blobs: MemoryBlobs, editor: Any, size: int, width: int) -> tuple[Manifest, list[PairRef]]:
    """A stream of `size` live edits, and where their pairs are."""
    manifest, refs = start_manifest(editor, _BASE, "p" * 64), []
    for start in track(range(0, size, _BATCH), f"{size:,} edits", console=out, transient=True):
        batch = _store_pairs(blobs, range(start, min(start + _BATCH, size)), width)
        manifest = build_candidate(blobs, editor, manifest, add=batch, remove=[], snapshot_every=_SNAPSHOT_EVERY).manifest
        refs += batch
    return manifest, refs


def _time_batch(blobs: MemoryBlobs, editor: Any, manifest: Manifest, width: int) -> float:
    """CPU seconds of one batch of new edits on this state; the stream does not keep it."""
    batch = _store_pairs(blobs, range(10**6, 10**6 + _BATCH), width)
    begun = time.process_time()
    build_candidate(blobs, editor, manifest, add=batch, remove=[], snapshot_every=_SNAPSHOT_EVERY)
    return time.process_time() - begun


def _store_pairs(blobs: MemoryBlobs, numbers: range, width: int) -> list[PairRef]:
    owners = tuple((f"edit-{number}",) for number in numbers)
    pairs = Pairs(
        _BASE, PrepareOptions(layers=(0,)).digest, owners, torch.randn(len(owners), width // 4), {0: torch.randn(len(owners), width)}
    )
    stored = blobs.put(pairs.to_bytes())
    return [PairRef(pairs=stored, row=row) for row in range(len(owners))]


if __name__ == "__main__":
    typer.run(run)
