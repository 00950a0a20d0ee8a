"""The withdrawal test of iReVa (algorithms.md §3.2) on the built-in base, for both editors: retrieve success and consistency, in percent.

    python -m benchmarks.withdrawal_trace [--edits 1000] [--sample 50] [--seeds 1] [--kind distinct]

Edits are of distinct facts (person, relation), drawn from the whole world, so that several are about one person; `distinct` has another
person each time, 800 at most. iReVa: θ .75, gain 80, beside the last layer; every edit is switched off alone. D4S: the profile of the
built-in base; a sample, since each takes a solve. A pair that several edits of one person share is subtracted as a whole. Lines before
the table say what became of the edits, by whether another live edit is about the same person. `bystanders`: with all edits live, the share
of facts about persons whom no edit names that the model predicts as the base does. What other edits do to those, they do to the prompt
of an edit that left, too.
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import load_builtin
from errata.editors.artifacts import Artifact
from errata.editors.base import Editor
from errata.editors.ireva.editor import IReVa
from errata.edits import Edit
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.profiles import NeuronProfile
from errata.suggestions import suggest_neurons
from errata.switching import FEW, choose_sample, switch_off
from errata.traceability import SwitchedOff, summarise
from tasks._progress import show_progress

_BATCH_TOKENS = 8_192
_BYSTANDERS = 500

out = Console(width=140)


def run(
    edits: Annotated[int, typer.Option(min=1, help="Live edits.")] = 1_000,
    sample: Annotated[int, typer.Option(min=1, help="Edits that are switched off with D4S.")] = FEW,
    seeds: Annotated[int, typer.Option(min=1, help="Streams.")] = 1,
    kind: Annotated[Literal["slots", "distinct"], typer.Option(help="Facts of any person, or one per person.")] = "slots",
) -> None:
    base, d4s, world = load_builtin()
    chosen = suggest_neurons(base.layout.count_layers(base.model), builtin=True)
    ireva = IReVa(NeuronProfile(base=base.digest, prepare=chosen.prepare, solve=chosen.solve), base.layout)
    table = Table(title=f"{edits:,} live edits, layer {chosen.prepare.layer}, θ {chosen.solve.theta}, gain {chosen.solve.gain:g}")
    for name in ("editor", "seed", "off", "RS", "Con", "known", "untaken", "RS own", "Con own", "bystanders", "prepare, s", "switch, s"):
        table.add_column(name, justify="right")
    editors: list[tuple[Editor[Any], int | None]] = [(ireva, None), (d4s, sample)]
    for seed in range(seeds):
        stream = world.make_edits(edits, seed, kind)
        for editor, size in editors:
            begun = time.perf_counter()
            state, pairs = _write(base, editor, stream)
            prepared = time.perf_counter()
            live = [edit for edit in stream if edit.edit_id in {name for owners in pairs.owners for name in owners}]
            asked = {edit.edit_id: edit for edit in choose_sample(editor.solve(state), live, size, seed)}
            with show_progress(f"{editor.name}: switching edits off") as on_progress:
                rows = switch_off(base, editor, state, [pairs], asked, _BATCH_TOKENS, on_progress)
            switched = time.perf_counter()
            found = summarise(rows, len(live))
            shares = (found.retrieve_success, found.consistency)
            own = (found.retrieve_success_own, found.consistency_own)
            table.add_row(
                *(editor.name, str(seed), str(len(rows))),
                *(f"{share.percent:.1f}" for share in shares),
                *(str(found.known), str(found.untaken)),
                *(f"{share.percent:.1f}" for share in own),
                _ask_bystanders(base, editor.solve(state), world.untouched(live)[:_BYSTANDERS]),
                *(f"{prepared - begun:.1f}", f"{switched - prepared:.1f}"),
            )
            persons = Counter(edit.subject for edit in live)
            alone = {True: "alone", False: "not alone"}
            told = Counter(f"{_explain(row)} ({alone[persons[asked[row.id].subject] == 1]})" for row in rows)
            for reason, count in sorted(told.items()):
                out.print(f"{editor.name}, seed {seed}: {count} {reason}")
    out.print(table)


def _write(base: Base, editor: Editor[Any], stream: list[Edit]) -> tuple[Any, Any]:
    pairs = editor.prepare(base, stream, groups=editor.find_groups(base, stream)).pairs
    assert pairs is not None, "the built-in world's edits can be prepared"
    return editor.merge(editor.empty_state(), pairs, None), pairs


def _ask_bystanders(base: Base, artifact: Artifact | None, questions: Sequence[tuple[str, str]]) -> str:
    """Percent of (prompt, answer) that are predicted as the base does."""
    if not questions:
        return "–"
    before = score_targets(base, questions, batch_tokens=_BATCH_TOKENS)
    with attach(base, [artifact] if artifact else []):
        after = score_targets(base, questions, batch_tokens=_BATCH_TOKENS)
    return f"{100 * sum(after[question].chosen == before[question].chosen for question in before) / len(before):.1f}"


def _explain(row: SwitchedOff) -> str:
    """Which kind of edit this is."""
    if row.retrieved and row.consistent:
        return "pass both"
    missed = " and ".join(name for name, passed in (("RS", row.retrieved), ("Con", row.consistent)) if not passed)
    if row.known:
        return f"fail {missed}: the base predicts the target"
    if not row.taken:
        return f"fail {missed}: the edit does not take"
    return f"fail {missed}: {'still the target' if not row.retrieved else 'neither the target nor the answer of the base'} without it"


if __name__ == "__main__":
    typer.run(run)
