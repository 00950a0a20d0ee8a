"""Every editor of the catalogue under the same promises (design §5), and each way it can be set that changes how it works. A new one is a
row of `CASES`; nothing else here changes.

Each promise is tried with few edits and with many, since an editor may keep the two in different forms. Weights are equal "to 1e-8"
where the norm of their difference is below that share of their own norm.
"""

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from errata.editors.artifacts import Artifact
from errata.editors.base import Editor, Pairs
from errata.editors.catalogue import EDITORS, make_editor
from errata.editors.d4s.moments import Moments, collect_moments
from errata.editors.kinds import load_artifact
from errata.edits import Edit
from errata.errors import BaseMismatchError, EditorError
from errata.evaluation.scoring import score_targets
from errata.modeling.loading import Base, hold_base
from errata.modeling.patch import attach
from errata.modeling.tokens import encode_prompt
from errata.profiles import AnyProfile, GateOptions, NeuronOptions, NeuronProfile, PrepareOptions, Profile, Retrofit, SolveOptions

EQUAL = 1e-8
FEW, MANY = 12, 64


class Case(NamedTuple):
    editor: str
    setting: str
    make_profile: Callable[[str, PrepareOptions], AnyProfile]
    """Of a base's digest, and of what suits the editable base."""
    written: tuple[float, float] = (0.9, 0.9)
    """Least share of few and of many facts that take on the random base. For D4S its residuals are larger than its hidden states: what its
    lower layer writes moves the keys of the upper one out of reach, where those are not read again."""
    most: float = 1.0
    """Largest fit there can be: D4S's layers may be asked for 1/L, 1/(L−1), …, 1 of the residual each."""


def write_weights(spread: str, layers: tuple[int, ...], keys: str = "frozen") -> Callable[[str, PrepareOptions], AnyProfile]:
    def make_profile(base: str, options: PrepareOptions) -> AnyProfile:
        solve = SolveOptions.model_validate({"lam": 1.0, "spread": spread, "moments": "0" * 64})
        return Profile(base=base, prepare=options.model_copy(update={"layers": layers, "keying": keys}), solve=solve)

    return make_profile


def add_neurons(**retrofit: float) -> Callable[[str, PrepareOptions], AnyProfile]:
    def make_profile(base: str, _: PrepareOptions) -> AnyProfile:
        trained = Retrofit.model_validate(retrofit) if retrofit else None
        return NeuronProfile(base=base, prepare=NeuronOptions(layer=1, retrofit=trained), solve=GateOptions())

    return make_profile


CASES = (
    Case("d4s", "single", write_weights("single", (1,))),
    Case("d4s", "even", write_weights("even", (0, 1)), (0.9, 0.2)),
    Case("d4s", "refresh", write_weights("refresh", (0, 1)), (0.9, 0.1)),
    Case("d4s", "d4s_code", write_weights("d4s_code", (0, 1)), (0.7, 0.1), most=1.5),
    Case("d4s", "d4s_code-cascade", write_weights("d4s_code", (0, 1), "cascade"), most=1.5),
    Case("ireva", "plain", add_neurons()),
    Case("ireva", "retrofit", add_neurons(theta=0.75, gain=80.0), most=1.5),
)


@pytest.fixture(scope="module")
def moments(editable: Base, sentences: Sequence[str]) -> Moments:
    return collect_moments(editable, [0, 1], sentences)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.editor}-{case.setting}")
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture(scope="module")
def editor(case: Case, editable: Base, editable_options: PrepareOptions, moments: Moments) -> Editor[Any]:
    return make_editor(case.editor, case.make_profile(editable.digest, editable_options), moments, editable.layout)


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


def solve(editor: Editor[Any], state: Any) -> Artifact:
    artifact = editor.solve(state)
    assert artifact is not None
    return artifact


def distance(found: Artifact, expected: Artifact) -> float:
    """Largest relative distance over what they write."""
    assert found.written.keys() == expected.written.keys()
    pairs = [(tensor.double(), expected.written[name].double()) for name, tensor in found.written.items()]
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def reload(editor: Editor[Any], state: Any) -> Any:
    return editor.load_state(state.to_bytes(), lambda digest: state.parts[digest]())


def speak(base: Base, edit: Edit) -> torch.Tensor:
    """Logits [vocabulary] after an edit's prompt."""
    with torch.no_grad():
        return base.model(input_ids=torch.tensor([encode_prompt(base.tokenizer, edit.rewrite_prompt)])).logits[0, -1]


def copy_weights(base: Base) -> dict[str, bytes]:
    tensors = {**dict(base.model.named_parameters()), **dict(base.model.named_buffers())}
    return {name: tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def count_hooks(base: Base) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in base.model.modules())


def test_every_editor_has_a_case() -> None:
    assert {case.editor for case in CASES} == EDITORS.keys()


def test_it_says_what_it_is(editor: Editor[Any]) -> None:
    assert EDITORS[editor.name].name == editor.name
    assert isinstance(editor.version, str) and editor.version
    assert isinstance(editor.order_free, bool)
    assert json.loads(json.dumps(dict(editor.options))) == dict(editor.options)


def test_the_facts_are_written(case: Case, editor: Editor[Any], editable: Base, edits: list[Edit], pairs: Pairs) -> None:
    def answers() -> list[bool]:
        asked = [(edit.rewrite_prompt, edit.target_new) for edit in edits[: len(pairs)]]
        scored = score_targets(editable, asked, batch_tokens=2_048)
        return [scored[question].chosen == scored[question].target for question in asked]

    assert sum(answers()) < 0.1 * len(pairs)
    with attach(editable, [solve(editor, add(editor, pairs))]):
        assert sum(answers()) > case.written[len(pairs) > FEW] * len(pairs)


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


def write_in_turn(editor: Editor[Any], base: Base, batches: Sequence[Sequence[Edit]]) -> Any:
    """The state after batches of edits, each prepared for the state that it is added to."""
    state = editor.empty_state()
    for batch in batches:
        state = editor.merge(state, editor.prepare(base, batch, state=state).pairs, None)
    return state


def test_order_free_editors_write_the_same_in_any_order_and_split(editor: Editor[Any], editable: Base, edits: list[Edit]) -> None:
    """From edits to weights. Who depends on order has to say so, and who says so depends on it."""
    some = edits[:18]
    whole = write_in_turn(editor, editable, [some])
    split = write_in_turn(editor, editable, [some[12:], some[5:12][::-1], some[:5]])
    gap = distance(solve(editor, split), solve(editor, whole))
    # Rows of another chunk are padded otherwise: keys and residuals are equal only up to the float32 of the base.
    assert gap < 1e-3 if editor.order_free else gap > 1e-2


@pytest.mark.parametrize("size", [1, 5, 23])
def test_any_order_and_split_of_stored_pairs_gives_the_same_weights(editor: Editor[Any], pairs: Pairs, size: int) -> None:
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


def test_removing_everything_gives_back_the_base(editor: Editor[Any], editable: Base, edits: list[Edit], pairs: Pairs) -> None:
    weights, hooks, said = copy_weights(editable), count_hooks(editable), speak(editable, edits[0])
    state = add(editor, pairs)
    with attach(editable, [solve(editor, state)]):
        assert not torch.equal(speak(editable, edits[0]), said)
    assert count_hooks(editable) == hooks
    for start in range(0, len(pairs), 7):
        state = editor.merge(state, None, pick(pairs, range(start, min(start + 7, len(pairs)))))
    assert state.count == 0
    assert state.to_bytes() == editor.empty_state().to_bytes()
    assert editor.solve(state) is None
    with attach(editable, []):
        assert copy_weights(editable) == weights
        assert torch.equal(speak(editable, edits[0]), said)


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
    stored = reload(editor, state)
    assert stored.count == state.count
    assert stored.to_bytes() == state.to_bytes()
    rest = pick(pairs, range(half, len(pairs)))
    continued, direct = editor.merge(stored, rest, None), editor.merge(state, rest, None)
    assert solve(editor, continued).to_bytes() == solve(editor, direct).to_bytes()


def test_a_stored_artifact_is_the_artifact(editor: Editor[Any], pairs: Pairs) -> None:
    artifact = solve(editor, add(editor, pairs))
    stored = load_artifact(artifact.to_bytes(), lambda digest: artifact.parts[digest]())
    assert stored.to_bytes() == artifact.to_bytes()
    assert stored.base == artifact.base


def test_what_is_left_of_removed_edits_is_said(editor: Editor[Any], pairs: Pairs) -> None:
    """A state built anew keeps nothing from anybody."""
    full, rest = add(editor, pairs), range(3, len(pairs))
    assert editor.find_uncovered(full) == {}
    uncovered = editor.find_uncovered(editor.merge(full, None, pick(pairs, range(3))))
    removed, live = ({ids for row in rows for ids in pairs.owners[row]} for rows in (range(3), rest))
    assert set(uncovered) <= removed and set(uncovered.values()) <= live
    assert editor.find_uncovered(add(editor, pick(pairs, rest))) == {}


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


def test_fits_are_shares(case: Case, editor: Editor[Any], pairs: Pairs) -> None:
    """Of what is asked for: the whole residual, or more where layers are asked for more of it."""
    fits = editor.measure_fits(add(editor, pairs), pairs)
    assert fits.shape == (len(pairs),)
    assert bool(((fits >= 0) & (fits <= case.most + 1e-6)).all())
    # A trained neuron may lose its own key to another one where keys of different facts are as near as on a random base.
    assert float((fits > 0).double().mean()) > 0.95
