"""What weights of 16 bits cost: the same edits written into one base in float32, bfloat16 and float16.

    python -m benchmarks.casting [--edits 50] [--seed 0]

Edits are solved in float64 whatever the weights are, and W0 + Δ is cast once. Two things are lost by fewer bits: the base computes more
coarsely, and what is written is rounded. The second row of each dtype tells them apart: the same Δ on the same weights, held in float32.
"""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import load_builtin
from benchmarks.edit_quality import share
from benchmarks.tiny_base import PEOPLE, SENTENCES, build_edit, choose_options, write_base
from errata.editors.artifacts import WeightDelta
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.edits import Edit
from errata.modeling.loading import Base, hold_base, load_base
from errata.modeling.patch import attach
from errata.monitors.norms import measure_norms
from errata.profiles import PrepareOptions, Profile, SolveOptions
from errata.report import Casting
from errata.suggestions import BUILTIN_SUGGESTION

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

out = Console(width=140)


def run(
    edits: Annotated[int, typer.Option(help="Edits of distinct persons, written together.")] = 50,
    alone: Annotated[int, typer.Option(help="So many of them are also written each by itself.")] = 10,
) -> None:
    table = Table(title="strict argmax accuracy; alone: means over edits written each by itself")
    for name in ("base", "weights", "efficacy", "generalization", "specificity", "casting error", "entries lost"):
        table.add_column(name, justify="left" if name in ("base", "weights") else "right")
    base, _, world = load_builtin()
    suggested, texts = BUILTIN_SUGGESTION, world.corpus(seed=0)
    made = world.make_edits(edits, 0, "distinct")
    for name, parts in ((f"built-in, {edits} edits", [made]), (f"built-in, {alone} alone", [[edit] for edit in made[:alone]])):
        _compare(table, name, base, suggested.prepare, suggested.lam, texts, parts)
    with tempfile.TemporaryDirectory() as folder:
        tiny = load_base(write_base(Path(folder)), device="cpu")
    few = [build_edit(person, person % 4, person) for person in range(min(edits, len(PEOPLE)))]
    _compare(table, f"random, {len(few)} edits", tiny, choose_options(), 1.0, SENTENCES, [few])
    out.print(table)


def cast_base(base: Base, dtype: torch.dtype) -> Base:
    """The same base with weights of another dtype; `base` stays as it is."""
    return hold_base(copy.deepcopy(base.model).to(dtype), base.tokenizer)


def build_editor(base: Base, options: PrepareOptions, lam: float, texts: Sequence[str]) -> D4S:
    """D4S with second moments of the base itself."""
    moments = collect_moments(base, options.layers, texts)
    solve = SolveOptions(lam=lam, spread="even" if len(options.layers) > 1 else "single", moments="-")
    return D4S(Profile(base=base.digest, prepare=options, solve=solve), moments, base.layout)


def write_edits(editor: D4S, base: Base, edits: Sequence[Edit]) -> WeightDelta:
    """All edits in one batch."""
    prepared = editor.prepare(base, edits, groups=editor.find_groups(base, edits))
    artifact = editor.solve(editor.merge(editor.empty_state(), prepared.pairs, None))
    assert artifact is not None and not prepared.refused, prepared.refused
    return artifact


def _compare(
    table: Table, name: str, base: Base, options: PrepareOptions, lam: float, texts: Sequence[str], parts: Sequence[Sequence[Edit]]
) -> None:
    """Rows of means over `parts`, each of which is written alone."""
    for dtype in DTYPES:
        told = str(dtype).removeprefix("torch.")
        cast = cast_base(base, dtype)
        editor = build_editor(cast, options, lam, texts)
        artifacts = [write_edits(editor, cast, part) for part in parts]
        losses = [loss for artifact in artifacts if (loss := _measure_casting(cast, artifact))]
        lost = [_mean([loss.error for loss in losses]), _mean([loss.lost for loss in losses])]
        table.add_row(name, told, *_judge(cast, artifacts, parts), *lost)
        if losses:
            whole = cast_base(cast, torch.float32)
            held = [WeightDelta(whole.digest, artifact.deltas) for artifact in artifacts]
            table.add_row("", f"{told} held in float32", *_judge(whole, held, parts), style="dim")
    table.add_section()


def _measure_casting(base: Base, artifact: WeightDelta) -> Casting | None:
    return Casting.over([norms.casting for norms in measure_norms(base, artifact.deltas) if norms.casting])


def _judge(base: Base, artifacts: Sequence[WeightDelta], parts: Sequence[Sequence[Edit]]) -> list[str]:
    shares: list[list[float]] = [[], [], []]
    for artifact, edits in zip(artifacts, parts, strict=True):
        rewrites = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
        general = [(prompt, edit.target_new) for edit in edits for prompt in edit.paraphrase_prompts]
        near = [(probe.prompt, probe.answers[0]) for edit in edits for probe in edit.neighborhood_prompts]
        with attach(base, [artifact]):
            for found, rows in zip(shares, (rewrites, general, near), strict=True):
                found.extend([share(base, rows)] if rows else [])
    return [_mean(found) for found in shares]


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):.4f}" if values else "–"


if __name__ == "__main__":
    typer.run(run)
