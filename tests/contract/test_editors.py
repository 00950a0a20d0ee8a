"""Every editor of the catalogue under the same promises (design §5). A new editor is a row of `EDITORS` and, where it needs options of
its own, a line in `_make`; nothing else here changes.

Each promise is tried with few edits and with many, since an editor may keep the two in different forms. Weights are equal "to 1e-8"
where the norm of their difference is below that share of their own norm.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from errata.editors.artifacts import WeightDelta, load_artifact
from errata.editors.base import Editor, Pairs
from errata.editors.catalogue import EDITORS, make_editor
from errata.editors.d4s.moments import Moments, collect_moments
from errata.edits import Edit
from errata.errors import BaseMismatchError, EditorError
from errata.modeling.loading import Base, hold_base
from errata.modeling.patch import attach
from errata.modeling.tokens import encode_prompt, encode_target
from errata.profiles import PrepareOptions, Profile, SolveOptions

EQUAL = 1e-8
FEW, MANY = 12, 64


@pytest.fixture(scope="module")
def moments(editable: Base, editable_options: PrepareOptions, sentences: Sequence[str]) -> Moments:
    return collect_moments(editable, editable_options.layers, sentences)


def _make(name: str, base: Base, options: PrepareOptions, moments: Moments) -> Editor[Any]:
    profile = Profile(base=base.digest, prepare=options, solve=SolveOptions(lam=1.0, spread="single", moments="0" * 64))
    return make_editor(name, profile, moments, base.layout)


@pytest.fixture(scope="module", params=sorted(EDITORS))
def editor(request: pytest.FixtureRequest, editable: Base, editable_options: PrepareOptions, moments: Moments) -> Editor[Any]:
    return _make(request.param, editable, editable_options, moments)


@pytest.fixture(scope="module")
def edits(make_edit: Callable[..., Edit]) -> list[Edit]:
    return [make_edit(number % 18, number // 18, number) for number in range(MANY)]


@pytest.fixture(scope="module")
def every(editor: Editor[Any], editable: Base, edits: list[Edit]) -> Pairs:
    prepared = editor.prepare(editable, edits)
    assert prepared.pairs is not None and not prepared.refused
    return prepared.pairs


@pytest.fixture(params=[FEW, MANY], ids=["few", "many"])
def pairs(request: pytest.FixtureRequest, every: Pairs) -> Pairs:
    return every.take(range(request.param))


def add(editor: Editor[Any], *parts: Pairs | None) -> Any:
    state = editor.empty_state()
    for part in parts:
        state = editor.merge(state, part, None)
    return state


def pick(pairs: Pairs, rows: Sequence[int]) -> Pairs:
    return pairs.take(list(rows))


def solve(editor: Editor[Any], state: Any) -> WeightDelta:
    artifact = editor.solve(state)
    assert artifact is not None
    return artifact


def distance(found: WeightDelta, expected: WeightDelta) -> float:
    """Largest relative distance over the weights."""
    assert found.deltas.keys() == expected.deltas.keys()
    pairs = [(delta.double(), expected.deltas[name].double()) for name, delta in found.deltas.items()]
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def copy_weights(base: Base) -> dict[str, bytes]:
    tensors = {**dict(base.model.named_parameters()), **dict(base.model.named_buffers())}
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def count_hooks(base: Base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


def test_it_says_what_it_is(editor: Editor[Any]) -> None:
    assert EDITORS[editor.name].name == editor.name
    assert isinstance(editor.version, str) and editor.version
    assert isinstance(editor.order_free, bool)
    assert json.loads(json.dumps(dict(editor.options))) == dict(editor.options)


def test_the_facts_are_written(editor: Editor[Any], editable: Base, edits: list[Edit], pairs: Pairs) -> None:
    def answers() -> list[bool]:
        found = []
        for edit in edits[: len(pairs)]:
            ids, target = encode_prompt(editable.tokenizer, edit.rewrite_prompt), encode_target(editable.tokenizer, edit.target_new)
            logits = editable.model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
            found.append(logits.argmax(-1).tolist() == target)
        return found

    assert sum(answers()) < 0.1 * len(pairs)
    with attach(editable, [solve(editor, add(editor, pairs))]):
        assert sum(answers()) > 0.9 * len(pairs)


def test_preparing_leaves_the_base_bit_for_bit(editor: Editor[Any], editable: Base, edits: list[Edit]) -> None:
    before, hooks = copy_weights(editable), count_hooks(editable)
    editor.prepare(editable, edits[:3])

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        editor.prepare(editable, edits[:3], stop)
    assert copy_weights(editable) == before
    assert count_hooks(editable) == hooks
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in editable.model.parameters())


def test_preparing_is_deterministic_and_reads_no_probes(editor: Editor[Any], editable: Base, edits: list[Edit]) -> None:
    probes = {"paraphrase_prompts": ("Where is home?",), "neighborhood_prompts": ["The home of Ida Roth"], "portability_prompts": ["Who?"]}
    probed = [Edit.model_validate({**edit.model_dump(), **probes}) for edit in edits[:4]]
    first, second = editor.prepare(editable, edits[:4]).pairs, editor.prepare(editable, probed).pairs
    assert first is not None and second is not None
    assert first.to_bytes() == second.to_bytes()


def test_progress_is_told_to_the_end(editor: Editor[Any], editable: Base, edits: list[Edit]) -> None:
    calls: list[tuple[int, int]] = []
    editor.prepare(editable, edits[:5], lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (5, 5)


def test_an_edit_that_cannot_be_prepared_is_refused_alone(editor: Editor[Any], editable: Base, edits: list[Edit]) -> None:
    # A tokenizer that drops one character: where it is the whole subject or target, nothing is left to place.
    backend = Tokenizer.from_str(editable.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("☃", "")
    deaf = dataclasses.replace(editable, tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))
    bad = {
        "long": edits[0].model_copy(update={"id": "long", "prompt": "very " * 80 + "long home of {}"}),
        "subject": edits[0].model_copy(update={"id": "subject", "subject": "☃"}),
        "target": edits[0].model_copy(update={"id": "target", "target_new": "☃"}),
    }
    prepared = editor.prepare(deaf, [bad["long"], edits[1], bad["subject"], bad["target"], edits[2]])
    assert prepared.refused.keys() == bad.keys()
    assert "64 tokens" in prepared.refused["long"]
    assert "☃" in prepared.refused["subject"] and "☃" in prepared.refused["target"]
    assert prepared.pairs is not None
    assert prepared.pairs.owners == ((edits[1].edit_id,), (edits[2].edit_id,))
    assert prepared.notes.keys() == {edits[1].edit_id, edits[2].edit_id}
    assert editor.prepare(deaf, [bad["subject"]]).pairs is None


def test_stored_pairs_are_the_pairs(editor: Editor[Any], pairs: Pairs) -> None:
    stored = Pairs.from_bytes(pairs.to_bytes())
    assert stored.to_bytes() == pairs.to_bytes()
    assert stored.digest_rows() == pairs.digest_rows()
    assert len(set(stored.digest_rows())) == len(pairs)
    assert stored.owners == pairs.owners
    assert solve(editor, add(editor, stored)).to_bytes() == solve(editor, add(editor, pairs)).to_bytes()


@pytest.mark.parametrize("size", [1, 5, 23])
def test_any_order_and_split_gives_the_same_weights(editor: Editor[Any], pairs: Pairs, size: int) -> None:
    if not editor.order_free:
        pytest.skip(f"{editor.name} depends on order and says so")
    rows = list(range(len(pairs)))
    random.Random(size).shuffle(rows)
    state = add(editor, *(pick(pairs, rows[start : start + size]) for start in range(0, len(rows), size)))
    assert state.count == len(pairs)
    assert distance(solve(editor, state), solve(editor, add(editor, pairs))) < EQUAL


def test_solving_is_deterministic(editor: Editor[Any], pairs: Pairs) -> None:
    state = add(editor, pairs)
    before = state.to_bytes()
    assert solve(editor, state).to_bytes() == solve(editor, state).to_bytes()
    assert state.to_bytes() == before


def test_removing_everything_gives_back_the_base(editor: Editor[Any], editable: Base, pairs: Pairs) -> None:
    weights = copy_weights(editable)
    state = add(editor, pairs)
    with attach(editable, [solve(editor, state)]):
        assert copy_weights(editable) != weights
    for start in range(0, len(pairs), 7):
        state = editor.merge(state, None, pick(pairs, range(start, min(start + 7, len(pairs)))))
    assert state.count == 0
    assert state.to_bytes() == editor.empty_state().to_bytes()
    assert editor.solve(state) is None
    with attach(editable, []):
        assert copy_weights(editable) == weights


def test_a_removed_edit_was_never_there(editor: Editor[Any], pairs: Pairs) -> None:
    rest = range(3, len(pairs))
    state = editor.merge(add(editor, pairs), None, pick(pairs, [1, 0, 2]))
    assert state.count == len(rest)
    assert distance(solve(editor, state), solve(editor, add(editor, pick(pairs, rest)))) < EQUAL


def test_a_replacement_equals_never_having_had_the_old(
    editor: Editor[Any], editable: Base, make_edit: Callable[..., Edit], pairs: Pairs
) -> None:
    new = editor.prepare(editable, [make_edit(0, 0, 1), make_edit(1, 0, 3)]).pairs
    assert new is not None
    assert not set(new.digest_rows()) & set(pairs.digest_rows())
    replaced = editor.merge(add(editor, pairs), new, pick(pairs, [0, 1]))
    assert replaced.count == len(pairs)
    assert distance(solve(editor, replaced), solve(editor, add(editor, pick(pairs, range(2, len(pairs))), new))) < EQUAL


def test_a_stored_state_is_the_state(editor: Editor[Any], pairs: Pairs) -> None:
    half = len(pairs) // 2
    state = add(editor, pick(pairs, range(half)))
    stored = editor.load_state(state.to_bytes())
    assert stored.count == state.count
    assert stored.to_bytes() == state.to_bytes()
    rest = pick(pairs, range(half, len(pairs)))
    continued, direct = editor.merge(stored, rest, None), editor.merge(state, rest, None)
    assert solve(editor, continued).to_bytes() == solve(editor, direct).to_bytes()


def test_a_stored_artifact_is_the_artifact(editor: Editor[Any], pairs: Pairs) -> None:
    artifact = solve(editor, add(editor, pairs))
    stored = load_artifact(artifact.to_bytes())
    assert stored.to_bytes() == artifact.to_bytes()
    assert stored.base == artifact.base


@pytest.mark.parametrize("name", ["base", "prepare"])
def test_pairs_made_elsewhere_are_refused(editor: Editor[Any], pairs: Pairs, name: str) -> None:
    foreign = dataclasses.replace(pairs, **{name: "f" * 64})
    with pytest.raises(BaseMismatchError, match="expected .* found ffffffffffff"):
        editor.merge(editor.empty_state(), foreign, None)
    with pytest.raises(BaseMismatchError, match="expected .* found ffffffffffff"):
        editor.merge(add(editor, pairs), None, foreign)
    with pytest.raises(BaseMismatchError):
        Pairs.concatenate([pairs, foreign])


def test_another_base_is_refused(editor: Editor[Any], editable: Base, edits: list[Edit], pairs: Pairs) -> None:
    torch.manual_seed(1)
    other = hold_base(type(editable.model)(editable.model.config), editable.tokenizer)
    with pytest.raises(BaseMismatchError, match=other.digest[:12]):
        editor.prepare(other, edits[:1])
    with pytest.raises(BaseMismatchError, match=other.digest[:12]), attach(other, [solve(editor, add(editor, pairs))]):
        pass


def test_more_than_there_is_cannot_be_removed(editor: Editor[Any], pairs: Pairs) -> None:
    state = add(editor, pick(pairs, [0, 1]))
    with pytest.raises(EditorError, match="expected at most 2 pairs to remove, found 3"):
        editor.merge(state, None, pick(pairs, [0, 1, 2]))


def test_fits_are_shares(editor: Editor[Any], pairs: Pairs) -> None:
    fits = editor.measure_fits(add(editor, pairs), pairs)
    assert fits.shape == (len(pairs),)
    assert bool(((fits > 0) & (fits < 1)).all())
