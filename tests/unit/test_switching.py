"""The withdrawal test: what is measured in one pass is what a withdrawal of each edit alone would give."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.editors.ireva.editor import IReVa
from errata.editors.neurons import Block, NeuronPatch
from errata.edits import Edit
from errata.modeling.loading import Base
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, PrepareOptions, Profile, SolveOptions
from errata.switching import FEW, choose_sample, switch_off
from errata.traceability import SwitchedOff, summarise

Make = Callable[..., Edit]


@pytest.fixture(scope="module")
def edits(make_edit: Make) -> list[Edit]:
    """Targets of one token and of several, with a common beginning; the last prompt reads like the first, about another subject."""
    found = [make_edit(number % 18, number // 18, number) for number in range(30)]
    found += [make_edit(person, 2, target_new=f"chess {last}") for person, last in ((3, "tennis"), (4, "golf"))]
    return [*found, Edit(subject="home", prompt="The {} of Anna Keller", target_new="Oslo")]


def place(base: Base, **gate: Any) -> IReVa:
    solve = GateOptions.model_validate(gate)
    return IReVa(NeuronProfile(base=base.digest, prepare=NeuronOptions(layer=1), solve=solve), base.layout)


def prepare(editor: Any, base: Base, edits: Sequence[Edit]) -> Pairs:
    pairs: Pairs | None = editor.prepare(base, edits).pairs
    assert pairs is not None and len(pairs) == len(edits)
    return pairs


def name(edits: Sequence[Edit]) -> dict[str, Edit]:
    return {edit.edit_id: edit for edit in edits}


@pytest.mark.parametrize("gate", [{}, {"theta": 0.3, "gate": "published"}, {"theta": 0.3, "pooling": "sum"}], ids=str)
def test_silencing_all_in_one_pass_is_withdrawing_each(editable: Base, edits: list[Edit], gate: dict[str, Any]) -> None:
    editor = place(editable, **gate)
    pairs = prepare(editor, editable, edits)
    state = editor.merge(editor.merge(editor.empty_state(), pairs, None), None, pairs.take([5, 31]))  # two tombstones
    live = [edit for index, edit in enumerate(edits) if index not in (5, 31)]
    told: list[tuple[int, int]] = []

    def measure(**how: Any) -> list[SwitchedOff]:
        blocks = [pairs.take(range(10)), pairs.take(range(10, len(pairs)))]
        return switch_off(editable, editor, state, blocks, name(live), 256, lambda *step: told.append(step), **how)

    found = measure()
    assert [row.id for row in found] == [edit.edit_id for edit in live]
    assert told == [(done, len(live)) for done in range(1, len(live) + 1)]
    assert found == measure(one_by_one=True)
    assert sum(row.retrieved for row in found) > 0.5 * len(live)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), pooled=st.booleans(), silent=st.booleans())
def test_to_leave_a_pair_out_is_its_tombstone(data: st.DataObject, pooled: bool, silent: bool) -> None:
    """To the bit under max pooling, with equal keys of different edits and older tombstones."""
    seed = data.draw(st.integers(0, 999))
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=6))
    torch.manual_seed(seed)
    keys = torch.randn(sum(sizes), 8)[torch.randint(0, max(sum(sizes) // 2, 1), (sum(sizes),))]  # many are equal
    keys = (keys - keys.mean(1, keepdim=True)) / keys.std(1, keepdim=True)
    owners = tuple((f"edit-{number}",) for number in range(len(sizes)))
    block = Block(owners, tuple(sizes), keys, torch.randn(sum(sizes), 8))
    dead = frozenset(data.draw(st.sets(st.integers(0, len(sizes) - 1), max_size=len(sizes) - 2)))
    patch = NeuronPatch("b" * 64, 0, 0.2, 3.0, silent, pooled, (block,), dead, {})
    x = torch.cat([keys, torch.randn(4, 8)])
    for pair in set(range(len(sizes))) - dead:
        found = patch.place_on(x.device).answer_without(x, [owners[pair]] * len(x))
        expected = replace(patch, dead=dead | {pair}).place_on(x.device)(x)
        assert torch.equal(found, expected) if pooled else torch.allclose(found, expected, atol=1e-5)


def test_weights_are_solved_without_each_pair(
    editable: Base, editable_options: PrepareOptions, sentences: Sequence[str], edits: list[Edit]
) -> None:
    solve = SolveOptions(lam=1.0, spread="single", moments="0" * 64)
    moments = collect_moments(editable, editable_options.layers, sentences)
    editor = D4S(Profile(base=editable.digest, prepare=editable_options, solve=solve), moments, editable.layout)
    some = edits[:12]
    pairs = prepare(editor, editable, some)
    state = editor.merge(editor.empty_state(), pairs, None)
    before = state.to_bytes()
    found = switch_off(editable, editor, state, [pairs], name(some[2:8]), 256)
    assert [row.id for row in found] == [edit.edit_id for edit in some[2:8]]
    assert sum(row.taken for row in found) >= 5
    assert sum(row.retrieved for row in found) >= 5 and sum(row.consistent for row in found) >= 4
    assert state.to_bytes() == before


def test_the_last_edit_leaves_the_base(editable: Base, edits: list[Edit]) -> None:
    editor = place(editable)
    pairs = prepare(editor, editable, edits[:1])
    state = editor.merge(editor.empty_state(), pairs, None)
    for one_by_one in (False, True):
        (row,) = switch_off(editable, editor, state, [pairs], name(edits[:1]), 256, one_by_one=one_by_one)
        assert row.taken and row.retrieved and row.consistent and row.without == row.base
    assert switch_off(editable, editor, editor.empty_state(), [], {}, 256) == []


def switched(edit_id: str, **fields: bool) -> SwitchedOff:
    usual = {"known": False, "taken": True, "retrieved": True, "consistent": True}
    return SwitchedOff(id=edit_id, target="t", base="b", edited="t", without="b", **{**usual, **fields})


def test_shares_say_over_what_they_are() -> None:
    rows = [
        *(switched(f"good {number}") for number in range(6)),
        switched("known", known=True, retrieved=False),
        switched("untaken", taken=False, retrieved=False, consistent=False),
        switched("echo", consistent=False),
        switched("stuck", retrieved=False, consistent=False),
    ]
    found = summarise(rows, live=40)
    assert (found.live, found.known, found.untaken, found.failing) == (40, 1, 1, 4)
    assert (found.retrieve_success.edits, found.retrieve_success.percent, found.consistency.percent) == (10, 70.0, 70.0)
    assert (found.retrieve_success_own.edits, found.retrieve_success_own.percent) == (8, 87.5)
    assert found.consistency_own.percent == 75.0
    assert [row.id for row in found.worst] == ["untaken", "stuck", "known", "echo"]
    assert found.metrics()["retrieve_success"] == 70.0
    nothing = summarise([], live=0)
    assert nothing.retrieve_success.percent is None and "consistency" not in nothing.metrics()


def test_a_sample_is_all_where_that_is_cheap() -> None:
    patch = NeuronPatch("b" * 64, 0, 0.5, 1.0, True, True, (), frozenset(), {})
    live = list(range(200))
    assert choose_sample(patch, live, None, 0) == live
    chosen = choose_sample(None, live, None, 0)
    assert len(chosen) == len(set(chosen)) == FEW and chosen == choose_sample(None, live, None, 0) != choose_sample(None, live, None, 1)
    assert len(choose_sample(patch, live, 7, 0)) == 7 and choose_sample(None, live[:3], 7, 0) == live[:3]
