"""Second moments: what they cost, and whether what the report says of more tokens comes true.

    OMP_NUM_THREADS=1 python -m benchmarks.moments [--tokens 40000]

Both layers of the built-in base's profile, in 8 shards on local storage. The corpus is longer than all that is read of it.
"""

import tempfile
import time
from itertools import pairwise
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import load_builtin
from errata.builtin import CAVEAT
from errata.corpus import MAKESHIFT, find_corpus
from errata.editors.d4s.moments import Moments
from errata.settings import load_settings
from errata.suggestions import BUILTIN_SUGGESTION
from registry.shared import get_moments
from registry.storage.base import open_storage
from tasks.measuring import SHARDS, make_plan, pool_stored, sum_part


def main(tokens: Annotated[int, typer.Option(help="Of the longest of four runs, each twice as long as the one before.")] = 40_000) -> None:
    console, corpus = Console(), find_corpus(MAKESHIFT, load_settings().cache)
    base, _, _ = load_builtin()
    speeds = Table("tokens", "tokens per CPU-second")
    changes = Table("tokens", "layer", "effective rank", "error of C", "predicted", "actual")
    measured: list[Moments] = []
    with tempfile.TemporaryDirectory() as root:
        storage = open_storage(root)
        for wanted in (tokens // 8, tokens // 4, tokens // 2, tokens):
            plan = make_plan(base.digest, BUILTIN_SUGGESTION.prepare.layers, MAKESHIFT, corpus, wanted, SHARDS, 0)
            begun = time.process_time()
            for shard in range(plan.shards):
                sum_part(storage, base, corpus, plan, shard, lambda _done: None)
            measured.append(Moments.from_bytes(get_moments(storage, pool_stored(storage, plan))))
            speeds.add_row(f"{wanted:,}", f"{wanted / (time.process_time() - begun):,.0f}")
    for before, after in pairwise(measured):
        report = before.report
        assert report is not None
        for row in report.layers:
            actual = float((after.c[row.layer] - before.c[row.layer]).norm() / before.c[row.layer].norm())
            said = (report.estimate_error(row), report.predict_change(after.tokens - before.tokens, row), actual)
            shares = [f"{share:.2%}" for share in said if share is not None]
            changes.add_row(f"{before.tokens:,}", str(row.layer), f"{row.effective_rank:.1f}", *shares)
    console.print(speeds, changes, CAVEAT)


if __name__ == "__main__":
    typer.run(main)
