"""Keys that are read under what the layers below have written: as published, one edit after the other, and through batches that resume."""

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from benchmarks.common import MemoryBlobs
from benchmarks.reference import compute_keys, compute_residual
from errata.candidates import StoredPair, prepare_batch
from errata.editors.base import Pairs
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments, collect_moments
from errata.editors.d4s.reading import read_base, read_keys
from errata.editors.rows import build_rows
from errata.edits import Edit
from errata.errors import BaseMismatchError
from errata.manifests import PairRef
from errata.modeling.loading import Base
from errata.modeling.patch import add_deltas, attach
from errata.profiles import PrepareOptions, Profile, SolveOptions

LAYERS = (0, 1, 2)
LAM = 3.0
SMALL = 5
"""Edits that `prepare_batch` stores at once, here."""


@pytest.fixture(scope="module")
def options(editable_options: PrepareOptions) -> PrepareOptions:
    return editable_options.model_copy(update={"layers": LAYERS, "contexts": ("{}", "I say: {}"), "clamp": 0.5, "keying": "cascade"})


@pytest.fixture(scope="module")
def moments(editable: Base, sentences: Sequence[str]) -> Moments:
    return collect_moments(editable, LAYERS, sentences)


@pytest.fixture(scope="module")
def editor(editable: Base, options: PrepareOptions, moments: Moments) -> D4S:
    solve = SolveOptions(lam=LAM, spread="d4s_code", moments="0" * 64)
    return D4S(Profile(base=editable.digest, prepare=options, solve=solve), moments, editable.layout)


@pytest.fixture(scope="module")
def edits(make_edit: Callable[..., Edit]) -> list[Edit]:
    return [make_edit(person, relation) for relation in range(2) for person in range(6)]


def write_as_published(base: Base, edits: Sequence[Edit], options: PrepareOptions, moments: Moments) -> dict[int, torch.Tensor]:
    """nlpkeg/D4S `memit_main.py`, edit by edit: each layer is solved and put in place before the key of the next one is read."""
    rk: dict[int, torch.Tensor] = {}
    kk: dict[int, torch.Tensor] = {}
    updates: dict[int, torch.Tensor] = {}
    for edit in edits:
        residual = compute_residual(base, edit, options).residual.double()
        updates = {}
        for index, layer in enumerate(LAYERS):
            with add_deltas(base, {base.layout.weight_name(lower): update.float() for lower, update in updates.items()}):
                key = compute_keys(base, edit, options)[layer].double()
            rk[layer] = rk.get(layer, 0) + torch.outer(residual, key)
            kk[layer] = kk.get(layer, 0) + torch.outer(key, key)
            c = moments.c[layer].double()
            system = LAM * (c + 1e-6 * c.diagonal().mean() * torch.eye(len(c))) + kk[layer]
            updates[layer] = torch.linalg.solve(system, rk[layer].T).T / (len(LAYERS) - index)
    return updates


def test_one_by_one_it_is_the_published_computation(
    editor: D4S, editable: Base, edits: list[Edit], options: PrepareOptions, moments: Moments
) -> None:
    state = editor.empty_state()
    for edit in edits:
        state = editor.merge(state, editor.prepare(editable, [edit], state=state).pairs, None)
    found = editor.solve_exact(state)
    for layer, wanted in write_as_published(editable, edits, options, moments).items():
        delta = found[editable.layout.weight_name(layer)]
        assert float((delta - wanted).norm() / wanted.norm()) < 1e-4
    frozen = editor.prepare(editable, edits).pairs
    assert frozen is not None
    other = editor.solve_exact(editor.merge(editor.empty_state(), frozen, None))[editable.layout.weight_name(2)]
    assert float((other - wanted).norm() / wanted.norm()) > 1e-2, "the order in which edits come makes no difference"


def test_residuals_and_first_keys_are_those_of_the_base(editor: D4S, editable: Base, edits: list[Edit], options: PrepareOptions) -> None:
    """Whatever is live: only keys above the first layer know of it."""
    before = editor.prepare(editable, edits[:8]).pairs
    assert before is not None
    state = editor.merge(editor.empty_state(), before, None)
    fresh, later = (editor.prepare(editable, edits[8:], state=ground).pairs for ground in (None, state))
    assert fresh is not None and later is not None
    assert torch.equal(fresh.residuals, later.residuals)
    assert torch.equal(fresh.keys[0], later.keys[0])
    for layer in LAYERS[1:]:
        assert not torch.allclose(fresh.keys[layer], later.keys[layer], rtol=1e-3)


def test_keys_of_the_untouched_base_are_those_of_the_first_pass(editable: Base, edits: list[Edit], options: PrepareOptions) -> None:
    rows = [build_rows(editable.tokenizer, edit, options.contexts, editable.span) for edit in edits]
    units = [rows[:2], rows[2:3], rows[3:7]]
    reading = read_base(editable, units, LAYERS)
    for layer in LAYERS:
        assert torch.allclose(read_keys(editable, units, layer), reading.keys[layer], rtol=1e-5, atol=1e-6)


def test_an_edited_model_is_no_base_for_it(editor: D4S, editable: Base, edits: list[Edit]) -> None:
    pairs = editor.prepare(editable, edits[:2]).pairs
    assert pairs is not None
    artifact = editor.solve(editor.merge(editor.empty_state(), pairs, None))
    assert artifact is not None
    with attach(editable, [artifact]), pytest.raises(BaseMismatchError, match="expected the untouched base"):
        editor.prepare(editable, edits[:2])


def test_an_interrupted_batch_ends_as_one_that_was_not(
    editor: D4S, editable: Base, edits: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that were stored count as written for those that follow."""
    monkeypatch.setattr("errata.candidates._CHUNK", SMALL)
    blobs, notes = MemoryBlobs(), dict[str, StoredPair]()
    before = editor.prepare(editable, edits[:1]).pairs
    assert before is not None
    state = editor.merge(editor.empty_state(), before, None)

    def remember(digest: str, losses: Mapping[str, Sequence[float]]) -> None:
        if notes:
            raise KeyboardInterrupt
        notes.update({name: StoredPair(ref=PairRef(pairs=digest, row=row), losses=tuple(left)) for row, (name, left) in _number(losses)})

    with pytest.raises(KeyboardInterrupt):
        prepare_batch(blobs, editor, editable, edits[1:], {}, remember, state=state)
    assert len(notes) == SMALL
    resumed = prepare_batch(blobs, editor, editable, edits[1:], notes, lambda *_: None, state=state)
    whole = prepare_batch(blobs, editor, editable, edits[1:], {}, lambda *_: None, state=state)
    assert resumed == whole
    elsewhere = prepare_batch(blobs, editor, editable, edits[1:], {}, lambda *_: None)
    assert elsewhere.refs != whole.refs, "what is live makes no difference"


def test_pairs_of_a_cascade_belong_to_no_other_profile(editor: D4S, options: PrepareOptions) -> None:
    frozen = options.model_copy(update={"keying": "frozen"})
    assert frozen.digest != options.digest
    assert not editor.order_free
    foreign = Pairs(editor.empty_state().base, frozen.digest, (("e",),), torch.ones(1, 1), {layer: torch.ones(1, 1) for layer in LAYERS})
    with pytest.raises(BaseMismatchError, match="prepare options"):
        editor.merge(editor.empty_state(), foreign, None)


def _number(losses: Mapping[str, Sequence[float]]) -> list[tuple[int, tuple[str, Sequence[float]]]]:
    return list(enumerate(losses.items()))
