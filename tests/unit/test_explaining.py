"""Why an answer is what it is: what is said of it agrees with what happened while it was decoded, and with plain computations."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from errata.candidates import read_blocks
from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import WeightDelta
from errata.editors.base import Blobs, Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import collect_moments
from errata.editors.ireva.editor import IReVa
from errata.edits import Edit
from errata.evaluation.generation import generate_answers
from errata.explaining import SHOWN, explain_answer, list_edits
from errata.manifests import PairRef
from errata.modeling.loading import Base
from errata.modeling.patch import attach
from errata.modeling.tokens import encode_prompt
from errata.modeling.trace import visit_inputs
from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, PrepareOptions, Profile, SolveOptions

LONG = 4


@pytest.fixture(scope="module")
def edits(make_edit: Callable[..., Edit]) -> list[Edit]:
    return [make_edit(number, number % 2, number) for number in range(12)] + [make_edit(12, 2, target_new="chess tennis")]


@pytest.fixture(scope="module")
def ireva(editable: Base) -> IReVa:
    return IReVa(NeuronProfile(base=editable.digest, prepare=NeuronOptions(layer=1), solve=GateOptions()), editable.layout)


@pytest.fixture(scope="module")
def d4s(editable: Base, editable_options: PrepareOptions, sentences: Sequence[str]) -> D4S:
    options = editable_options.model_copy(update={"layers": (0, 1)})
    profile = Profile(base=editable.digest, prepare=options, solve=SolveOptions(lam=1.0, spread="even", moments="0" * 64))
    return D4S(profile, collect_moments(editable, [0, 1], sentences), editable.layout)


def prepare(editor: Any, base: Base, edits: Sequence[Edit]) -> tuple[Pairs, Any]:
    """Pairs, and the state that they make."""
    pairs = editor.prepare(base, edits).pairs
    assert pairs is not None
    return pairs, editor.merge(editor.empty_state(), pairs, None)


def never() -> Iterator[Pairs]:
    raise AssertionError("neurons are in the artifact, no pair is to be read")
    yield


def test_the_neuron_that_fired_is_named(editable: Base, ireva: IReVa, edits: list[Edit]) -> None:
    _, state = prepare(ireva, editable, edits)
    patch = ireva.solve(state)
    assert patch is not None
    for edit in edits:
        found = explain_answer(editable, [patch], edit.rewrite_prompt, never(), max_new_tokens=LONG)
        first = found.said[0]
        assert first.firing is not None and first.firing.told == "fired"
        assert (first.firing.place.edits, first.firing.place.token) == ((edit.edit_id,), 0)
        assert first.firing.cosine == pytest.approx(1, abs=1e-4) and first.firing.added == pytest.approx(patch.gain, rel=1e-2)
        assert first.firing.rival is not None and first.firing.rival.edits != (edit.edit_id,) and first.firing.margin > 0
        assert first.logprob > first.base_logprob
        assert edit.edit_id in list_edits(found)
        assert (found.neurons, found.compared, found.near, found.pushes, found.token) == (len(patch.places), 0, (), (), None)
    several = [said.firing for said in found.said if said.firing][:2]
    assert [(firing.place.edits, firing.place.token) for firing in several] == [((edit.edit_id,), 0), ((edit.edit_id,), 1)]


def test_what_is_said_is_what_decoding_did(editable: Base, ireva: IReVa, edits: list[Edit]) -> None:
    """The MLP's inputs as a decoder with a KV cache met them, token by token."""
    _, state = prepare(ireva, editable, edits)
    patch = ireva.solve(state)
    assert patch is not None
    prompts = [edit.rewrite_prompt for edit in edits] + ["The weather of today", "Oslo"]
    mlp = {0: editable.layout.mlp_of(editable.model, patch.layer)}
    told = set()
    for prompt in prompts:
        met: list[torch.Tensor] = []
        with attach(editable, [patch]), visit_inputs(mlp, lambda _key, inputs, met=met: met.append(inputs[0, -1:])):  # type: ignore[misc]
            (answer,) = generate_answers(editable, [prompt], max_new_tokens=LONG, batch_tokens=64)
        found = explain_answer(editable, [patch], prompt, never(), max_new_tokens=LONG)
        assert found.answer == answer
        expected = patch.place_on(editable.device).explain(torch.cat(met))[: len(found.said)]
        assert len(expected) == len(found.said)
        for said, firing in zip(found.said, expected, strict=True):
            assert said.firing is not None
            assert (said.firing.place, said.firing.told) == (firing.place, firing.told)
            assert said.firing.cosine == pytest.approx(firing.cosine, abs=1e-4)
            told.add(firing.told)
    assert told == {"fired", "none"}


def test_a_tombstone_and_silence_are_told_apart(editable: Base, ireva: IReVa, edits: list[Edit]) -> None:
    pairs, state = prepare(ireva, editable, edits)
    patch = ireva.solve(ireva.merge(state, None, pairs.take([2])))
    assert patch is not None
    said = explain_answer(editable, [patch], edits[2].rewrite_prompt, never(), max_new_tokens=1).said[0]
    assert said.firing is not None
    assert (said.firing.told, said.firing.place.edits, said.firing.added) == ("tombstone", (edits[2].edit_id,), 0.0)
    assert said.logprob == pytest.approx(said.base_logprob, abs=1e-5)
    said = explain_answer(editable, [patch], "Marie Curie is", never(), max_new_tokens=1).said[0]
    assert said.firing is not None
    assert said.firing.told == "none" and said.firing.excess < 0 and said.firing.activation == 0
    assert said.firing.excess == pytest.approx(said.firing.cosine - patch.theta)


def test_the_nearest_keys_and_what_the_delta_adds(editable: Base, d4s: D4S, edits: list[Edit]) -> None:
    pairs, state = prepare(d4s, editable, edits)
    delta = d4s.solve(state)
    assert delta is not None
    for edit in edits:
        found = explain_answer(editable, [delta], edit.rewrite_prompt, [pairs], max_new_tokens=1)
        ids = encode_prompt(editable.tokenizer, edit.rewrite_prompt)
        assert found.compared == len(pairs) and len(found.near) == SHOWN and found.neurons == 0
        nearest = found.near[0]
        assert (nearest.edits, nearest.token, found.token) == ((edit.edit_id,), len(ids) - 1, len(ids) - 1)
        assert nearest.cosine == pytest.approx(1, abs=1e-5) and nearest.layers.keys() == {0, 1}
        assert [near.cosine for near in found.near] == sorted((near.cosine for near in found.near), reverse=True)
        with torch.no_grad():
            plain = editable.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            with attach(editable, [delta]):
                edited = editable.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        said = int(edited.argmax())
        assert (found.said[0].logprob, found.said[0].base_logprob) == pytest.approx((float(edited[said]), float(plain[said])), abs=1e-4)
    first = found.pushes[0]
    key, name = pairs.keys[0][-1], editable.layout.weight_name(0)
    share = (delta.deltas[name] @ key).norm() / (editable.layout.read_weight(editable.model, 0) @ key).norm()
    assert (first.layer, first.share) == (0, pytest.approx(float(share), rel=1e-3))
    assert [push.layer for push in found.pushes] == [0, 1]


def test_blocks_of_pairs_are_compared_as_one(editable: Base, d4s: D4S, edits: list[Edit]) -> None:
    pairs, state = prepare(d4s, editable, edits)
    delta = d4s.solve(state)
    assert delta is not None
    blocks = [pairs.take(range(start, min(start + 3, len(pairs)))) for start in range(0, len(pairs), 3)]
    found, whole = (explain_answer(editable, [delta], "The home of", given, max_new_tokens=1) for given in (blocks, [pairs]))
    assert (found.compared, [near.edits for near in found.near]) == (whole.compared, [near.edits for near in whole.near])


def test_stored_pairs_come_block_by_block(monkeypatch: pytest.MonkeyPatch, editable: Base, d4s: D4S, edits: list[Edit]) -> None:
    class Store(Blobs):
        def get(self, digest: str) -> bytes:
            return stored[digest]

    pairs, _ = prepare(d4s, editable, edits)
    stored = {"one": pairs.take(range(4)).to_bytes(), "two": pairs.take(range(4, 9)).to_bytes()}
    refs = [PairRef(pairs="two", row=row) for row in (4, 0, 2)] + [PairRef(pairs="one", row=row) for row in (3, 1)] * 2
    monkeypatch.setattr("errata.candidates._BLOCK", 2)
    told: list[tuple[int, int]] = []
    blocks = list(read_blocks(Store(), refs, lambda *step: told.append(step)))
    assert [owners for block in blocks for owners in block.owners] == [pairs.owners[row] for row in (1, 3, 4, 6, 8)]
    assert max(map(len, blocks)) == 2 and told == [(2, 5), (4, 5), (5, 5)]


def test_without_edits_there_is_nothing_to_name(editable: Base) -> None:
    found = explain_answer(editable, [], "The home of Bo Lind", never(), max_new_tokens=LONG)
    (answer,) = generate_answers(editable, ["The home of Bo Lind"], max_new_tokens=LONG, batch_tokens=64)
    assert (found.answer, found.neurons, found.compared, found.near, found.pushes) == (answer, 0, 0, (), ())
    assert all(said.firing is None and said.logprob == said.base_logprob for said in found.said) and list_edits(found) == []


def test_an_adapter_has_no_keys_to_name(editable: Base, d4s: D4S, edits: list[Edit]) -> None:
    """It adapts other weights than edits are written into, and was not made from pairs. What the delta beneath it did is told as ever."""
    pairs, state = prepare(d4s, editable, edits)
    delta = d4s.solve(state)
    assert delta is not None
    name = f"{editable.layout.blocks}.1.attn.c_attn.weight"
    d_in, d_out = editable.model.get_parameter(name).shape
    adapter = LoraAdapter(editable.digest, 1.0, {name: torch.full((1, d_in), 0.01)}, {name: torch.full((d_out, 1), 0.01)})
    found = explain_answer(editable, [delta, adapter], edits[0].rewrite_prompt, [pairs], max_new_tokens=LONG)
    assert edits[0].edit_id in list_edits(found) and [push.layer for push in found.pushes] == [0, 1]
    alone = explain_answer(editable, [adapter], edits[0].rewrite_prompt, never(), max_new_tokens=LONG)
    assert (alone.near, alone.pushes, alone.compared) == ((), (), 0)


def test_another_base_is_refused(editable: Base) -> None:
    from errata.errors import BaseMismatchError

    with pytest.raises(BaseMismatchError):
        explain_answer(editable, [WeightDelta("f" * 64, {})], "The home of Bo Lind", [], max_new_tokens=1)
