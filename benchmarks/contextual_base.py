"""The built-in base that reads facts in context: what it knows bare, what it reads, what it keeps although a fact stands in front.

    python -m benchmarks.contextual_base [--edits 200] [--seed 0] [--sizes 100,300]

Trains the base if the cache has none. Facts contradict what the base knows, as the edits of its world do; demonstrations are edits of other
persons. Strict argmax accuracy: every token of the answer must be the model's first choice, teacher forced. A paraphrase is every phrasing
of the fact but its own; "another person" is a neighbour of the edit, who has the edit's old object, asked with the fact in front anyway.
D4S writes edits of distinct persons with the base's own profile.
"""

import json
import random
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import MemoryBlobs, load_builtin
from benchmarks.edit_quality import share, write_stream
from errata.builtin import CAVEAT, CONTEXTUAL, REPORT_FILE, ensure_builtin
from errata.candidates import load_artifacts
from errata.editors.d4s.editor import D4S
from errata.edits import Edit
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact
from errata.settings import load_settings
from errata.world import World

DEMONSTRATIONS = (0, 4, 8, 12)
OWN, PARAPHRASE, OTHER_PERSON, OTHER_RELATION = "own prompt", "paraphrase", "another person", "another relation"
_PER_KIND = 200
"""Questions of a kind at most: drawn from all."""

out = Console(width=150)

Rows = list[tuple[str, str]]


def run(
    edits: Annotated[int, typer.Option(min=20, help="Facts put in front of questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the edits.")] = 0,
    sizes: Annotated[str, typer.Option(help="Edits that D4S writes, comma-separated.")] = "100,300",
) -> None:
    out.print(f"[dim]{CAVEAT}[/]")
    base, editor, world = load_builtin(CONTEXTUAL)
    report = json.loads((ensure_builtin(CONTEXTUAL, load_settings().cache) / REPORT_FILE).read_text())
    out.print(f"{CONTEXTUAL.digest}, trained in {report['seconds']} s, {report['cpu_seconds']} CPU-s")
    out.print(f"bare: trained prompts {report['accuracy_trained']:.4f}, withheld phrasings {report['accuracy_withheld']:.4f}")
    _print_reading(base, world, edits, seed)
    _print_editing(base, editor, world, [int(size) for size in sizes.split(",")], seed)


def _print_reading(base: Base, world: World, count: int, seed: int) -> None:
    table = Table(title="with a fact in front: the fact's target, or (the last two) the truth")
    for name in ("demonstrations", "words of the target", OWN, PARAPHRASE, OTHER_PERSON, OTHER_RELATION):
        table.add_column(name, justify="right")
    one = world.make_edits(count, seed)
    two = [edit for edit in world.make_edits(len(world.persons), seed, "mixed") if " " in edit.target_new][:count]
    pool = world.make_edits(count, seed + 1)
    for shown in DEMONSTRATIONS:
        for words, edits in (("one", one), ("two", two)):
            asked = ask_in_context(world, edits, pool, shown, seed)
            table.add_row(str(shown), words, *(f"{share(base, rows):.3f}" for rows in asked.values()))
    out.print(table)


def _print_editing(base: Base, editor: D4S, world: World, sizes: Sequence[int], seed: int) -> None:
    table = Table(title="D4S, edits of distinct persons in batches of 20; the base's own share in brackets")
    for name in ("edits", "efficacy", "generalization", "specificity", "untouched persons"):
        table.add_column(name, justify="right")
    for size in sizes:
        blobs, stream = MemoryBlobs(), world.make_edits(size, seed)
        manifest, _ = write_stream(blobs, base, editor, stream, 20)
        near = [(probe.prompt, probe.answers[0]) for edit in stream for probe in edit.neighborhood_prompts]
        far = world.untouched(stream)[:2_000]
        own_near, own_far = share(base, near), share(base, far)
        with attach(base, load_artifacts(blobs, manifest)):
            efficacy = share(base, [(edit.rewrite_prompt, edit.target_new) for edit in stream])
            general = share(base, [(prompt, edit.target_new) for edit in stream for prompt in edit.paraphrase_prompts])
            table.add_row(
                str(size),
                f"{efficacy:.3f}",
                f"{general:.3f}",
                f"{share(base, near):.3f} ({own_near:.3f})",
                f"{share(base, far):.3f} ({own_far:.3f})",
            )
    out.print(table)


def ask_in_context(world: World, edits: Sequence[Edit], pool: Sequence[Edit], demonstrations: int, seed: int) -> dict[str, Rows]:
    """What is asked with an edit's fact in front, and the answer that is right: rows of (text, answer) by kind of question."""
    rng = random.Random(f"contexts {seed} {demonstrations}")
    rows: dict[str, Rows] = {OWN: [], PARAPHRASE: [], OTHER_PERSON: [], OTHER_RELATION: []}
    for edit in edits:
        others = [_state(other) for other in pool if other.subject != edit.subject]
        shown, fact = rng.sample(others, demonstrations), _state(edit)
        other_relation = rng.choice([known for known in world.facts_of(edit.subject) if known.relation.name != edit.relation_id])
        asked = [(OWN, edit.rewrite_prompt, edit.target_new), (OTHER_RELATION, rng.choice(other_relation.prompts), other_relation.object)]
        asked += [(PARAPHRASE, prompt, edit.target_new) for prompt in edit.paraphrase_prompts]
        asked += [(OTHER_PERSON, probe.prompt, probe.answers[0]) for probe in edit.neighborhood_prompts]
        for kind, query, answer in asked:
            rows[kind].append(("".join(spell_context(fact, shown, query)), answer))
    return {kind: rng.sample(all_rows, min(len(all_rows), _PER_KIND)) for kind, all_rows in rows.items()}


def _state(edit: Edit) -> Fact:
    """The edit as an edit memory keeps it."""
    return Fact(edit.edit_id, edit.subject, edit.prompt, edit.target_new, (), edit.paraphrase_prompts)


if __name__ == "__main__":
    typer.run(run)
