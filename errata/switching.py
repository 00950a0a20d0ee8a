"""Switching edits off one at a time: the withdrawal test of iReVa (algorithms.md §3.2; `evaluate/eval_retrieving.py`)."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from errata.editors.artifacts import Artifact
from errata.editors.base import Editor, Pairs, Progress
from errata.editors.neurons import NeuronPatch
from errata.edits import Edit
from errata.evaluation.scoring import encode_questions, score_rows, score_targets, split_by_tokens
from errata.modeling.beside import respond_beside
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.traceability import SwitchedOff

FEW = 50
"""Pairs that are switched off where each takes a solve of its own, unless somebody asks for more."""

T = TypeVar("T")
_Ids = tuple[int, ...]


def choose_sample(artifact: Artifact | None, live: Sequence[T], sample: int | None, seed: int) -> list[T]:
    """The edits to switch off: `sample` of them; without a number all where that takes one pass, else `FEW`."""
    size = sample if sample is not None else len(live) if isinstance(artifact, NeuronPatch) else FEW
    return list(live) if size >= len(live) else random.Random(f"trace {seed}").sample(live, size)


def switch_off(
    base: Base,
    editor: Editor[Any],
    state: Any,
    blocks: Iterable[Pairs],
    edits: Mapping[str, Edit],
    batch_tokens: int,
    on_progress: Progress | None = None,
    *,
    one_by_one: bool = False,
) -> list[SwitchedOff]:
    """Switch off each pair alone and ask the edits that it carries: token ids at the positions of `target_new`, which is forced. The
    published code does so token by token, each token of a target being an edit there.

    Neurons are silenced for their own prompts only, all in one pass; that equals a tombstone each (there is a test). Where there are
    weights, each pair is subtracted and the rest solved: the state that a withdrawal makes, though members of a key group leave together.

    Args:
        state: of all live pairs.
        blocks: pairs of the state; rows without an edit in `edits` are passed over.
        edits: those to ask, by id.
        one_by_one: a withdrawal for each, whatever the editor.

    Raises:
        BaseMismatchError: state and base do not fit.
        EditorError: a system cannot be solved, or pairs that the state does not hold.
    """
    questions = {edit_id: (edit.rewrite_prompt, edit.target_new) for edit_id, edit in edits.items()}
    artifact = editor.solve(state)
    before = score_targets(base, questions.values(), batch_tokens=batch_tokens)
    with attach(base, [artifact] if artifact else []):
        after = score_targets(base, questions.values(), batch_tokens=batch_tokens)
    rows: list[SwitchedOff] = []
    for block in blocks:
        asked = [(index, edit_id) for index, owners in enumerate(block.owners) for edit_id in owners if edit_id in edits]
        if isinstance(artifact, NeuronPatch) and not one_by_one:
            found = _silence(base, artifact, [(block.owners[index], edits[edit_id]) for index, edit_id in asked], batch_tokens)
        else:
            found = _subtract(base, editor, state, block, [(index, edits[edit_id]) for index, edit_id in asked], batch_tokens)
        for (_, edit_id), without in zip(asked, found, strict=True):
            question = questions[edit_id]
            rows.append(_compare(base, edits[edit_id], after[question].target, before[question].chosen, after[question].chosen, without))
            if on_progress:
                on_progress(len(rows), len(edits))
    return rows


def _silence(base: Base, patch: NeuronPatch, asked: Sequence[tuple[tuple[str, ...], Edit]], batch_tokens: int) -> Iterator[_Ids]:
    """What is predicted of each edit without the neurons of its owners, in order."""
    neurons = patch.place_on(base.device)
    rows = encode_questions(base, [(edit.rewrite_prompt, edit.target_new) for _, edit in asked])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    found: dict[int, _Ids] = {}
    for span in split_by_tokens([len(rows[index][0]) for index in order], batch_tokens):
        batch = [order[place] for place in span]
        withheld = [asked[index][0] for index in batch for _ in rows[index][1]]
        with respond_beside(base, patch.layer, partial(neurons.answer_without, withheld=withheld)):
            scored = score_rows(base, [rows[index] for index in batch])
        found |= {index: each.chosen for index, each in zip(batch, scored, strict=True)}
    yield from (found[index] for index in range(len(rows)))


def _subtract(
    base: Base, editor: Editor[Any], state: Any, block: Pairs, asked: Sequence[tuple[int, Edit]], batch_tokens: int
) -> Iterator[_Ids]:
    """What is predicted of each edit by the state without its pair, in order; edits of one pair stand side by side."""
    solved: tuple[int, Artifact | None] = (-1, None)
    for index, edit in asked:
        if index != solved[0]:
            solved = (index, editor.solve(editor.merge(state, None, block.take([index]))))
        with attach(base, [solved[1]] if solved[1] else []):
            question = (edit.rewrite_prompt, edit.target_new)
            yield score_targets(base, [question], batch_tokens=batch_tokens)[question].chosen


def _compare(base: Base, edit: Edit, target: _Ids, before: _Ids, after: _Ids, without: _Ids) -> SwitchedOff:
    def spell(ids: _Ids) -> str:
        # −1 stands where logits were not finite.
        return str(base.tokenizer.decode([token for token in ids if token >= 0])).strip()

    return SwitchedOff(
        id=edit.edit_id,
        target=edit.target_new,
        base=spell(before),
        edited=spell(after),
        without=spell(without),
        known=before == target,
        taken=after == target,
        retrieved=without != after,
        consistent=without == before,
    )
