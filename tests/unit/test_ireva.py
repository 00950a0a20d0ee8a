"""iReVa on a random base: what its neurons answer, and what they leave alone; tombstones; blocks that are stored once; retrofit."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from errata.editors.base import Pairs
from errata.editors.ireva import state as states
from errata.editors.ireva.editor import IReVa
from errata.editors.ireva.irrelevant import find_own
from errata.editors.ireva.retrofit import Untrained, retrofit_neurons
from errata.editors.ireva.state import NeuronState
from errata.editors.neurons import NeuronPatch, find_bias, find_scale, open_gate, standardise
from errata.editors.rows import TargetRow, build_rows
from errata.edits import Edit, digest_of
from errata.errors import EditorError
from errata.evaluation.metrics import all_correct
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base, load_base
from errata.modeling.patch import attach
from errata.modeling.tokens import encode_prompt, encode_target
from errata.modeling.trace import capture_outputs, trace_inputs
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, Retrofit
from errata.suggestions import suggest_neurons
from errata.world import make_world

LAYER = 1
WIDTH = 48
REACH = find_bias(0.75, WIDTH)


@pytest.fixture(scope="module")
def make_editor(editable: Base) -> Callable[..., IReVa]:
    def make(*, retrofit: Retrofit | None = None, chunk_tokens: int = 4_096, most: int = 30, **gate: Any) -> IReVa:
        options = NeuronOptions(layer=LAYER, retrofit=retrofit, max_target_tokens=most)
        solve = GateOptions(**gate)
        return IReVa(NeuronProfile(base=editable.digest, prepare=options, solve=solve), editable.layout, chunk_tokens=chunk_tokens)

    return make


@pytest.fixture(scope="module")
def editor(make_editor: Callable[..., IReVa]) -> IReVa:
    return make_editor()


def prepare(editor: IReVa, base: Base, *edits: Edit) -> Pairs:
    prepared = editor.prepare(base, edits)
    assert prepared.pairs is not None and not prepared.refused
    return prepared.pairs


def solve(editor: IReVa, state: NeuronState) -> NeuronPatch:
    patch = editor.solve(state)
    assert patch is not None
    return patch


def write(editor: IReVa, base: Base, *edits: Edit) -> NeuronState:
    return editor.merge(editor.empty_state(), prepare(editor, base, *edits), None)


def takes(base: Base, patch: NeuronPatch, edits: Sequence[Edit]) -> list[bool]:
    """Whether the whole target of each is what the model says."""
    asked = [(edit.rewrite_prompt, edit.target_new) for edit in edits]
    with attach(base, [patch]):
        scored = score_targets(base, asked, batch_tokens=2_048)
    return [all_correct(scored[question].chosen, scored[question].target) for question in asked]


def generate(base: Base, patch: NeuronPatch, edit: Edit) -> list[int]:
    """As many tokens as the target has, decoded with a KV cache."""
    ids = torch.tensor([encode_prompt(base.tokenizer, edit.rewrite_prompt)])
    count = len(encode_target(base.tokenizer, edit.target_new))
    with attach(base, [patch]), torch.no_grad():
        return list(
            base.model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        )


def speak(base: Base, prompt: str) -> torch.Tensor:
    """Logits [vocabulary] after a prompt."""
    with torch.no_grad():
        return base.model(input_ids=torch.tensor([encode_prompt(base.tokenizer, prompt)])).logits[0, -1]


def read_input(base: Base, prompt: str) -> torch.Tensor:
    """[1, d] what a neuron sees at the end of a prompt."""
    with trace_inputs({0: base.layout.mlp_of(base.model, LAYER)}, lambda x: x[:, -1], stop=True) as found, torch.no_grad():
        base.model(input_ids=torch.tensor([encode_prompt(base.tokenizer, prompt)]))
    return found[0]


# What neurons are made of


def test_a_key_is_the_standardised_input_and_a_value_the_row_of_the_unembedding(
    editor: IReVa, editable: Base, make_edit: Callable[..., Edit]
) -> None:
    edit = make_edit(0)
    pairs = prepare(editor, editable, edit)
    ids = encode_target(editable.tokenizer, edit.target_new)
    assert pairs.sizes == (len(ids),)
    assert torch.equal(pairs.residuals, editable.model.lm_head.weight[ids].float())
    torch.testing.assert_close(pairs.keys[LAYER][:1], standardise(read_input(editable, edit.rewrite_prompt)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pairs.keys[LAYER].square().sum(1), torch.full((len(ids),), WIDTH - 1.0), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("tokens", [1, 40, 4_096])
def test_neurons_do_not_depend_on_their_company(
    make_editor: Callable[..., IReVa], editable: Base, make_edit: Callable[..., Edit], tokens: int
) -> None:
    edits = [make_edit(number, number % 4, target_new="New York" if number % 2 else "Oslo") for number in range(8)]
    whole = prepare(make_editor(chunk_tokens=tokens), editable, *edits)
    for row, edit in enumerate(edits):
        alone, taken = prepare(make_editor(), editable, edit), whole.take([row])
        assert torch.equal(alone.residuals, taken.residuals)
        torch.testing.assert_close(alone.keys[LAYER], taken.keys[LAYER], rtol=1e-4, atol=1e-4)


# Targets of every kind

TARGETS = ("New York", "New England", "1,234", "21 November 2026", "Ångström-Łukasz 東京", "a", "−273.15 °C", "Oslo", "New", "N")


def test_targets_of_every_kind_are_written_side_by_side(editor: IReVa, editable: Base, make_edit: Callable[..., Edit]) -> None:
    edits = [make_edit(number, target_new=target) for number, target in enumerate(TARGETS)]
    patch = solve(editor, write(editor, editable, *edits))
    assert takes(editable, patch, edits) == [True] * len(edits)
    for edit in edits:
        assert generate(editable, patch, edit) == encode_target(editable.tokenizer, edit.target_new)


@pytest.mark.parametrize("old", TARGETS)
@pytest.mark.parametrize("new", ["New York", "New England", "1,234", "New"])
def test_what_replaces_an_edit_is_said_whole(editor: IReVa, editable: Base, make_edit: Callable[..., Edit], old: str, new: str) -> None:
    """Targets that share their first tokens, one being the beginning of the other: neither is mixed into the other."""
    if old == new:
        return
    before, after = make_edit(0, target_new=old), make_edit(0, target_new=new)
    was, becomes = prepare(editor, editable, before), prepare(editor, editable, after)
    state = editor.merge(editor.merge(editor.empty_state(), was, None), becomes, was)
    assert state.count == 1 and not state.dead, "its tombstone would catch what the new one is to answer"
    assert takes(editable, solve(editor, state), [after]) == [True]
    assert generate(editable, solve(editor, state), after) == encode_target(editable.tokenizer, new)


def test_a_target_may_be_the_prompt_of_another_edit(editor: IReVa, editable: Base) -> None:
    """Or its beginning: the neurons of the first answer within the target, that of the second right behind it."""
    first = Edit(subject="Bo Lind", prompt="{} says:", target_new="The home of Anna Keller")
    second = Edit(subject="Anna Keller", prompt="The home of {}", target_new="Oslo")
    third = Edit(subject="Zoe Berg", prompt="{} says:", target_new="The home")
    edits = [first, second, third]
    patch = solve(editor, write(editor, editable, *edits))
    assert takes(editable, patch, edits) == [True] * 3
    for edit in edits:
        assert generate(editable, patch, edit) == encode_target(editable.tokenizer, edit.target_new)


def test_a_target_that_is_too_long_is_refused_with_the_reason(
    make_editor: Callable[..., IReVa], editable: Base, make_edit: Callable[..., Edit]
) -> None:
    long, short = make_edit(0, target_new="a very long answer that never ends"), make_edit(1, target_new="Oslo")
    count = len(encode_target(editable.tokenizer, long.target_new))
    prepared = make_editor(most=count - 1).prepare(editable, [long, short])
    assert f"at most {count - 1} tokens, found {count}: each takes a neuron" in prepared.refused[long.edit_id]
    assert prepared.pairs is not None and prepared.pairs.owners == ((short.edit_id,),)
    assert not make_editor(most=count).prepare(editable, [long]).refused


def test_a_subject_in_another_case_has_neurons_of_its_own(editor: IReVa, editable: Base) -> None:
    """But one scope: what is written for the one takes the place of the other's tombstone where their prompts look alike."""
    edits = [
        Edit(subject=name, prompt="The home of {}", target_new=home) for name, home in (("Anna Keller", "Oslo"), ("ANNA KELLER", "Rome"))
    ]
    pairs = prepare(editor, editable, *edits)
    assert pairs.scopes[0] == pairs.scopes[1]
    assert takes(editable, solve(editor, write(editor, editable, *edits)), edits) == [True, True]


# The gate


def build_state(editor: IReVa, keys: torch.Tensor, values: torch.Tensor | None = None, scopes: Sequence[str] = ()) -> NeuronState:
    """Neurons with these keys [n, d], each of an edit of its own: e0, e1, …"""
    return editor.empty_state().add(build_pairs(editor, keys, values, scopes), REACH)


def build_pairs(editor: IReVa, keys: torch.Tensor, values: torch.Tensor | None = None, scopes: Sequence[str] = (), first: int = 0) -> Pairs:
    empty, count = editor.empty_state(), len(keys)
    values = torch.eye(WIDTH)[torch.arange(count) % WIDTH] if values is None else values
    owners = tuple((f"e{number + first}",) for number in range(count))
    kept = tuple(scopes) or tuple(f"s{number + first}" for number in range(count))
    return Pairs(empty.base, empty.prepare, owners, values, {LAYER: keys}, sizes=(1,) * count, scopes=kept)


def draw_keys(count: int, seed: int = 0) -> torch.Tensor:
    return standardise(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)))


def tilt(key: torch.Tensor, cosine: float, seed: int = 1) -> torch.Tensor:
    """[d] standardised, with this cosine to a standardised key [d]."""
    other = draw_keys(1, seed)[0]
    other = standardise(other - (other @ key) / (key @ key) * key)
    return cosine * key + (1 - cosine**2) ** 0.5 * other


def respond(patch: NeuronPatch, x: torch.Tensor) -> torch.Tensor:
    return patch.place_on(torch.device("cpu"))(x)


@pytest.mark.parametrize("theta", [0.0, 0.3, 0.65, 0.75, 0.9])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_theta_is_a_cosine(make_editor: Callable[..., IReVa], theta: float, pooling: str) -> None:
    editor, key = make_editor(theta=theta, pooling=pooling), draw_keys(1)
    patch = solve(editor, build_state(editor, key))
    for scale, shift in ((1.0, 0.0), (7.0, -3.0), (0.01, 100.0)):
        below, above = (scale * tilt(key[0], theta + step)[None] + shift for step in (-0.002, 0.002))
        assert torch.equal(respond(patch, below), torch.zeros(1, WIDTH)), "exactly nothing"
        assert respond(patch, above)[0, 0] > 0


@pytest.mark.parametrize(("theta", "gain"), [(0.75, 80.0), (0.5, 80.0), (0.9, 3.0)])
def test_an_exact_match_adds_its_gain_in_values(make_editor: Callable[..., IReVa], theta: float, gain: float) -> None:
    editor, keys, values = make_editor(theta=theta, gain=gain), draw_keys(5), torch.randn(5, WIDTH)
    patch = solve(editor, build_state(editor, keys, values))
    torch.testing.assert_close(respond(patch, keys), gain * values, rtol=1e-3, atol=1e-3)


def test_the_nearest_neuron_answers_alone_and_a_sum_is_of_all_that_fire(make_editor: Callable[..., IReVa]) -> None:
    key = draw_keys(1)[0]
    keys = torch.stack([tilt(key, 0.95, 1), tilt(key, 0.9, 2), tilt(key, 0.2, 3)])
    for pooling, firing in (("max", 1), ("sum", 2)):
        editor = make_editor(pooling=pooling)
        added = respond(solve(editor, build_state(editor, keys)), key[None])[0]
        assert [float(entry) > 0 for entry in added[:3]] == [True, firing > 1, False]


def test_of_equal_keys_the_newest_live_one_answers(editor: IReVa) -> None:
    keys = draw_keys(1).repeat(3, 1)
    pairs = build_pairs(editor, keys)
    state = editor.empty_state()
    for row in range(3):
        state = state.add(pairs.take([row]), REACH)
        assert respond(solve(editor, state), keys[:1])[0].argmax() == row
    state = state.remove(pairs.take([2]))
    assert respond(solve(editor, state), keys[:1])[0].argmax() == 1, "a tombstone yields to what is live at the same place"


def test_one_prompt_in_two_slots_is_answered_by_the_newer(editor: IReVa, editable: Base, make_edit: Callable[..., Edit]) -> None:
    """Its keys are read twice, in other company, and differ by their rounding. A withdrawal leaves the other one speaking."""
    for person in range(12):
        old, new = make_edit(person, target_new="Oslo"), make_edit(person, target_new="Rome", relation_id="home")
        assert old.slot != new.slot
        first = prepare(editor, editable, make_edit(12, target_new="21 November"), old).take([1])
        second = prepare(editor, editable, new)
        state = editor.merge(editor.merge(editor.empty_state(), first, None), second, None)
        assert takes(editable, solve(editor, state), [old, new]) == [False, True]
        assert takes(editable, solve(editor, editor.merge(state, None, first)), [old, new]) == [False, True]
        assert takes(editable, solve(editor, editor.merge(state, None, second)), [old, new]) == [True, False]


def test_what_is_explained_is_what_answers(editor: IReVa) -> None:
    """Among equal keys and almost equal ones, many of them."""
    keys = draw_keys(6).repeat(100, 1) + 1e-6 * torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(3))
    values = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(4))
    pairs = build_pairs(editor, keys, values)
    patch = solve(editor, editor.empty_state().add(pairs, REACH).remove(pairs.take(range(0, 600, 7))))
    x = torch.stack([tilt(key, 0.95, seed) for seed, key in enumerate(draw_keys(6))])
    neurons = patch.place_on(torch.device("cpu"))
    for firing, added in zip(neurons.explain(x), neurons(x), strict=True):
        number = int(firing.place.edits[0][1:])
        assert firing.place.live and number >= 588
        torch.testing.assert_close(added / added.norm(), values[number] / values[number].norm())
        assert firing.added == pytest.approx(float(added.norm() / values[number].norm()), rel=1e-3)


def test_the_published_gate_whispers_below_its_threshold(make_editor: Callable[..., IReVa]) -> None:
    key = draw_keys(1)
    added = [
        respond(solve(editor, build_state(editor, key)), tilt(key[0], 0.74)[None]).abs().max()
        for editor in (make_editor(), make_editor(gate="published"))
    ]
    assert added[0] == 0 and added[1] > 0


# Tombstones


def test_a_withdrawn_edit_is_silent_where_another_is_near(editor: IReVa) -> None:
    key = draw_keys(1)[0]
    keys = torch.stack([key, tilt(key, 0.9)])
    pairs = build_pairs(editor, keys)
    state = editor.merge(editor.empty_state(), pairs, None)
    assert respond(solve(editor, state), keys).argmax(1).tolist() == [0, 1]
    state = editor.merge(state, None, pairs.take([0]))
    patch = solve(editor, state)
    assert torch.equal(respond(patch, key[None]), torch.zeros(1, WIDTH)), "without the tombstone its neighbour would answer"
    assert respond(patch, keys[1:])[0].argmax() == 1
    never = respond(solve(editor, editor.merge(editor.empty_state(), pairs.take([1]), None)), key[None])
    assert never.abs().max() > 0

    again = editor.merge(state, pairs.take([0]), None)
    assert again.count == 2 and not again.dead
    assert respond(solve(editor, again), keys).argmax(1).tolist() == [0, 1]


def test_only_what_is_near_and_of_its_subject_takes_the_place_of_a_tombstone(editor: IReVa) -> None:
    key, far = draw_keys(2)
    pairs = build_pairs(editor, torch.stack([key, far]), scopes=("anna", "hugo"))
    state = editor.merge(editor.merge(editor.empty_state(), pairs, None), None, pairs.take([0]))
    for other, scope, left in ((tilt(key, 0.9), "anna", 0), (tilt(key, 0.9), "zoe", 1), (tilt(key, 0.5), "anna", 1)):
        added = editor.merge(state, build_pairs(editor, other[None], scopes=(scope,), first=9), None)
        assert len(added.dead) == left


def test_withdrawing_everything_gives_the_base_back(editor: IReVa, editable: Base, make_edit: Callable[..., Edit]) -> None:
    edits = [make_edit(number, number % 4, target_new=target) for number, target in enumerate(TARGETS)]
    said = speak(editable, edits[0].rewrite_prompt)
    pairs, state = prepare(editor, editable, *edits), write(editor, editable, *edits)
    for row in (3, 0, 7, 1, 2, 4, 5, 6, 8):
        state = editor.merge(state, None, pairs.take([row]))
        patch = solve(editor, state)
        with attach(editable, [patch]):
            withdrawn = speak(editable, edits[row].rewrite_prompt)
        assert torch.equal(withdrawn, speak(editable, edits[row].rewrite_prompt)), "a withdrawn edit's prompt is answered by the base"
    state = editor.merge(state, None, pairs.take([9]))
    assert editor.solve(state) is None and state.to_bytes() == editor.empty_state().to_bytes()
    assert torch.equal(speak(editable, edits[0].rewrite_prompt), said)


@pytest.mark.parametrize("seed", range(4))
def test_any_history_answers_as_its_live_edits_do(
    make_editor: Callable[..., IReVa], editable: Base, make_edit: Callable[..., Edit], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Edits, re-edits, withdrawals and edits again, in small blocks: what is live is said, what was withdrawn is what the base says, and
    the stored state goes on as the one in memory."""
    monkeypatch.setattr(states, "BLOCK", 6)
    editor, rng = make_editor(), random.Random(seed)
    state, live, gone = editor.empty_state(), dict[int, Edit](), dict[int, Edit]()
    pairs: dict[str, Pairs] = {}
    for _ in range(40):
        person = rng.randrange(12)
        old = live.pop(person, None)
        if old is not None and rng.random() < 0.4:
            state, gone[person] = editor.merge(state, None, pairs[old.edit_id]), old
        else:
            new = make_edit(person, target_new=rng.choice([target for target in TARGETS if not old or target != old.target_new]))
            pairs[new.edit_id] = prepare(editor, editable, new)
            state = editor.merge(state, pairs[new.edit_id], pairs[old.edit_id] if old else None)
            live[person] = new
            gone.pop(person, None)
        if rng.random() < 0.3:
            stored = editor.load_state(state.to_bytes(), lambda digest, parts=state.parts: parts[digest]())
            assert stored.to_bytes() == state.to_bytes() and stored.dead == state.dead
            state = stored
    assert state.count == len(live) and len(live) > 3
    patch = solve(editor, state)
    assert takes(editable, patch, list(live.values())) == [True] * len(live)
    for edit in gone.values():
        plain = speak(editable, edit.rewrite_prompt)
        with attach(editable, [patch]):
            assert torch.equal(speak(editable, edit.rewrite_prompt), plain)
    rebuilt = solve(editor, write(editor, editable, *live.values()))
    for name, tensor in rebuilt.written.items():
        torch.testing.assert_close(patch.written[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_the_state_does_not_hold_cannot_be_removed(editor: IReVa) -> None:
    keys = draw_keys(3)
    pairs = build_pairs(editor, keys)
    state = editor.empty_state().add(pairs, REACH).remove(pairs.take([1]))
    with pytest.raises(EditorError, match="found 1 of 1 that it does not"):
        state.remove(pairs.take([1]))
    with pytest.raises(EditorError, match="found 1 of 1 that it does not"):
        state.remove(build_pairs(editor, keys[2:], first=7))


# Blocks


def fill(editor: IReVa, batches: int, size: int = 10, first: int = 0) -> list[Pairs]:
    keys = draw_keys(batches * size, seed=first)
    return [build_pairs(editor, keys[start : start + size], first=first + start) for start in range(0, batches * size, size)]


def test_a_batch_writes_the_last_block_and_no_other(editor: IReVa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BLOCK", 25)
    state = editor.empty_state()
    seen: list[tuple[str, ...]] = []
    for pairs in fill(editor, 20):
        state = state.add(pairs, REACH)
        assert state.digests[: len(seen[-1]) if seen else 0] == (seen[-1] if seen else ()), "closed blocks stay as they are"
        assert list(state.parts) == list(state.digests) == [digest_of(read()) for read in state.parts.values()]
        assert len(state.blocks[-1].residuals) <= 25 + 10
        seen.append(state.digests)
    assert len(state.digests) >= 5
    whole = len(state.to_bytes()) + sum(len(read()) for read in state.parts.values())
    assert len(state.to_bytes()) < whole / 4
    patch = solve(editor, state)
    assert tuple(patch.parts) == state.digests and len(patch.to_bytes()) < whole / 4


def test_a_stored_state_and_patch_are_read_from_their_parts(editor: IReVa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BLOCK", 25)
    batches, state = fill(editor, 12), editor.empty_state()
    for pairs in batches:
        state = state.add(pairs, REACH)
    state = state.remove(batches[2].take([3])).remove(batches[11].take([0, 9]))
    stored = editor.load_state(state.to_bytes(), lambda digest: state.parts[digest]())
    patch = solve(editor, state)
    read = NeuronPatch.from_bytes(patch.to_bytes(), lambda digest: patch.parts[digest]())
    for other in (solve(editor, stored), read):
        assert other.to_bytes() == patch.to_bytes() and tuple(other.parts) == tuple(patch.parts)
        assert other.places == patch.places
        x = torch.cat([pairs.keys[LAYER] for pairs in batches])
        assert torch.equal(respond(other, x), respond(patch, x))
    assert stored.count == 117 and stored.remove(batches[5]).count == 107


def test_a_tombstone_that_leaves_a_closed_block_writes_that_block_only(editor: IReVa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BLOCK", 25)
    batches, state = fill(editor, 12), editor.empty_state()
    for pairs in batches:
        state = state.add(pairs, REACH)
    gone = batches[4].take([5])
    buried = state.remove(gone)
    assert buried.digests == state.digests, "a tombstone is a number beside the blocks"
    back = buried.add(gone, REACH)
    changed = [number for number, (old, new) in enumerate(zip(buried.digests, back.digests, strict=False)) if old != new]
    assert changed == [1] and back.count == 120 and not back.dead
    assert list(back.parts) == [digest_of(read()) for read in back.parts.values()]
    assert respond(solve(editor, back), gone.keys[LAYER]).abs().max() > 0
    for name, tensor in solve(editor, state).written.items():
        assert torch.equal(solve(editor, back).written[name], tensor)


def test_a_block_whose_tombstones_all_leave_is_gone(editor: IReVa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "BLOCK", 10)
    batches, state = fill(editor, 4), editor.empty_state()
    for pairs in batches:
        state = state.add(pairs, REACH)
    for number in (3, 1):  # the last block, then a closed one
        state = state.remove(batches[number]).add(batches[number], REACH)
        assert state.count == 40 and not state.dead
        assert len(state.digests) == len(state.blocks) - 1
        assert list(state.parts) == [digest_of(read()) for read in state.parts.values()]
    keys = torch.cat([pairs.keys[LAYER] for pairs in batches])
    assert (respond(solve(editor, state), keys).abs().amax(1) > 0).all()


# Retrofit


@pytest.fixture(scope="module")
def untrained(editable: Base, make_edit: Callable[..., Edit]) -> Untrained:
    edits = [make_edit(number, number % 4) for number in range(6)]
    rows = [encode_prompt(editable.tokenizer, edit.rewrite_prompt) for edit in edits]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    places = torch.tensor([len(row) - 1 for row in rows])
    mlp, block = editable.layout.mlp_of(editable.model, LAYER), editable.layout.block(editable.model, LAYER)
    with torch.no_grad(), capture_outputs({"out": block}) as outputs, trace_inputs({"in": mlp}, lambda x: x) as inputs:
        editable.model(input_ids=ids)
    targets = torch.tensor([encode_target(editable.tokenizer, edit.target_new)[0] for edit in edits])
    every = torch.arange(len(rows))
    keys, values = standardise(inputs["in"][every, places]), editable.model.lm_head.weight[targets].detach().clone()
    return Untrained(keys, values, targets, every, places, outputs["out"])


def train(base: Base, untrained: Untrained, rows: Sequence[int], strangers: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    index = torch.tensor(list(rows))
    some = Untrained(
        *(getattr(untrained, name)[index] for name in ("keys", "values", "targets", "rows", "places")), hidden=untrained.hidden
    )
    return retrofit_neurons(base, LAYER, Retrofit(**{"theta": 0.75, "gain": 80.0, **options}), some, [strangers] * len(some.keys))


def test_training_lowers_the_loss_of_every_neuron(editable: Base, untrained: Untrained) -> None:
    strangers, losses = draw_keys(8, seed=5), []
    for steps in (1, 2, 5, 20):
        losses.append(train(editable, untrained, range(6), strangers, steps=steps)[2])
    untouched = train(editable, untrained, range(6), strangers, steps=1, lr=1e-12)[2]
    assert (losses[-1] < untouched).all()
    means = [float(loss.mean()) for loss in (untouched, *losses)]
    assert means == sorted(means, reverse=True)


def test_a_neuron_is_trained_alone_whoever_else_is(editable: Base, untrained: Untrained) -> None:
    strangers = draw_keys(8, seed=5)
    together = train(editable, untrained, range(6), strangers)
    for rows in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        for found, whole in zip(train(editable, untrained, rows, strangers), together, strict=True):
            torch.testing.assert_close(found, whole[rows], rtol=2e-3, atol=2e-3)


def test_a_key_that_is_held_goes_on_answering_its_own_input(editable: Base, untrained: Untrained) -> None:
    strangers = draw_keys(8, seed=5)
    drifts = [
        ((train(editable, untrained, range(6), strangers, steps=20, reconstruction=weight)[0] - untrained.keys) * untrained.keys).sum(1)
        for weight in (0.0, 1.0)
    ]
    assert drifts[1].abs().mean() < 0.5 * drifts[0].abs().mean()


def test_irrelevance_quietens_a_neuron_on_strangers(editable: Base, untrained: Untrained) -> None:
    near = torch.stack([tilt(untrained.keys[0], 0.9, seed) for seed in range(5)])

    def hear(weight: float) -> float:
        keys = train(editable, untrained, [0], near, steps=20, irrelevance=weight)[0]
        return float((near @ keys[0] - REACH).clamp(min=0).mean())

    assert hear(1.0) < 0.9 * hear(0.0)


def test_a_neuron_is_no_stranger_to_its_own_prompt(editable: Base, make_edit: Callable[..., Edit]) -> None:
    """Texts that a subject begins may come upon the prompt of the edit itself: every state that is read there is left out, no other."""
    edits = [Edit(subject=make_edit(person).subject, prompt="{}" + word, target_new="Oslo") for person in range(18) for word in ("", " is")]
    rows = [build_rows(editable.tokenizer, edit, ("{}",), editable.span) for edit in edits]
    plain = find_own(editable, LAYER, edits, [replace(row, contexts=[]) for row in rows])
    # As if the edit's prompt were the subject and what is sampled first behind it.
    texts = [sample_text(editable, edit) for edit in edits]
    meant = [replace(row, contexts=[TargetRow(text, 0, [len(text) - 1])]) for row, text in zip(rows, texts, strict=True)]
    for all_states, kept in zip(plain, find_own(editable, LAYER, edits, meant), strict=True):
        assert len(kept) in (len(all_states) - 1, len(all_states) - 2), "one state, or two where both texts go the same way"
        assert all(any(torch.allclose(state, one, atol=1e-4) for one in all_states) for state in kept)


def sample_text(base: Base, edit: Edit) -> list[int]:
    """The subject and the first token that is sampled behind it, for the first of its texts."""
    ids = encode_prompt(base.tokenizer, edit.subject)
    rng = torch.Generator().manual_seed(int(digest_of(f"{edit.subject_key} 0".encode())[:12], 16))
    torch.randint(2, 11, (1,), generator=rng)
    with torch.no_grad():
        chances = base.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    return [*ids, int(torch.multinomial(chances, 1, generator=rng))]


def test_an_edit_that_was_trained_is_written(make_editor: Callable[..., IReVa], editable: Base, make_edit: Callable[..., Edit]) -> None:
    editor = make_editor(retrofit=Retrofit(theta=0.75, gain=80.0))
    edits = [make_edit(number, target_new=target) for number, target in enumerate(TARGETS[:6])]
    plain, trained = (make.prepare(editable, edits) for make in (make_editor(), editor))
    assert all(trained.notes[edit.edit_id].target_nll <= plain.notes[edit.edit_id].target_nll for edit in edits)
    assert takes(editable, solve(editor, write(editor, editable, *edits)), edits) == [True] * len(edits)


def test_scale_and_bias_belong_together() -> None:
    """An exact match, whose product is d − 1, adds the gain."""
    for theta, gain in ((0.0, 320.0), (0.75, 80.0)):
        excess = torch.tensor(WIDTH - 1 - find_bias(theta, WIDTH))
        assert float(find_scale(theta, gain, WIDTH) * open_gate(excess, silent=True)) == pytest.approx(gain)


@pytest.mark.slow
def test_the_builtin_base_takes_a_mixed_stream_and_its_withdrawals(builtin_base: Path) -> None:
    """Several edits per person, re-edits, targets of two words, with the published values."""
    base, world = load_base(builtin_base, device="cpu"), make_world()
    suggested = suggest_neurons(base.layout.count_layers(base.model), builtin=True)
    editor = IReVa(NeuronProfile(base=base.digest, prepare=suggested.prepare, solve=suggested.solve), base.layout)
    state, live = editor.empty_state(), dict[str, Edit]()
    stream = {edit.edit_id: edit for edit in world.make_edits(120, 0, "mixed")}
    whole = prepare(editor, base, *stream.values())
    pairs = {edit_id: whole.take([row]) for row, (edit_id,) in enumerate(whole.owners)}
    for edit in stream.values():
        old = live.pop(edit.slot, None)
        state = editor.merge(state, pairs[edit.edit_id], pairs[old.edit_id] if old else None)
        live[edit.slot] = edit
    edits = list(live.values())
    neighbours = [probe.prompt for edit in edits for probe in edit.neighborhood_prompts]

    def choose(prompts: Sequence[str], patch: NeuronPatch | None) -> list[int]:
        with attach(base, [patch] if patch else []):
            scored = score_targets(base, [(prompt, None) for prompt in prompts], batch_tokens=2_048)
        return [scored[prompt, None].chosen[0] for prompt in prompts]

    def agree(prompts: Sequence[str], patch: NeuronPatch) -> float:
        return mean(one == other for one, other in zip(choose(prompts, patch), choose(prompts, None), strict=True))

    assert mean(takes(base, solve(editor, state), edits)) > 0.98
    assert agree(neighbours, solve(editor, state)) > 0.98
    for edit in edits[::3]:
        state = editor.merge(state, None, pairs[edit.edit_id])
    kept = [edit for edit in edits if edit not in edits[::3]]
    assert mean(takes(base, solve(editor, state), kept)) > 0.98
    assert agree([edit.rewrite_prompt for edit in edits[::3]], solve(editor, state)) > 0.98
    for edit in edits[::3]:
        state = editor.merge(state, pairs[edit.edit_id], None)
    assert not state.dead and mean(takes(base, solve(editor, state), edits)) > 0.98
