"""Stored pairs to a candidate: what is stored is enough to go on from, and an interruption costs no computed pair."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from errata.candidates import StoredPair, build_candidate, load_artifacts, load_state, name_pair, prepare_batch, read_pairs, start_manifest
from errata.editors import base
from errata.editors.catalogue import make_editor
from errata.editors.d4s.editor import D4S
from errata.editors.d4s.moments import Moments, collect_moments
from errata.edits import Edit, digest_of
from errata.errors import BaseMismatchError
from errata.manifests import Manifest, PairRef
from errata.modeling.loading import Base
from errata.profiles import PrepareOptions, Profile, SolveOptions

CHUNK = 8
"""Edits that `prepare_batch` stores at once, here."""


class Blobs(base.Blobs):
    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def get(self, digest: str) -> bytes:
        return self.data[digest]

    def put(self, data: bytes) -> str:
        self.data[digest_of(data)] = data
        return digest_of(data)


class Counting:
    """An editor that notes which edits it was asked to prepare."""

    def __init__(self, editor: Any) -> None:
        self._editor, self.prepared = editor, list[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._editor, name)

    def prepare(self, base: Base, edits: Sequence[Edit], *rest: Any) -> Any:
        self.prepared += [edit.edit_id for edit in edits]
        return self._editor.prepare(base, edits, *rest)


@pytest.fixture(scope="module", autouse=True)
def _chunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("errata.candidates._CHUNK", CHUNK)
        yield


@pytest.fixture(scope="module")
def moments(editable: Base, editable_options: PrepareOptions, sentences: Sequence[str]) -> Moments:
    return collect_moments(editable, editable_options.layers, sentences)


@pytest.fixture(scope="module")
def make(editable: Base, editable_options: PrepareOptions, moments: Moments) -> Callable[..., Any]:
    def make(lam: float = 1.0) -> Any:
        solve = SolveOptions(lam=lam, spread="single", moments="0" * 64)
        return make_editor("d4s", Profile(base=editable.digest, prepare=editable_options, solve=solve), moments, editable.layout)

    return make


@pytest.fixture(scope="module")
def editor(make: Callable[..., Any]) -> Any:
    return make()


@pytest.fixture(scope="module")
def edits(make_edit: Callable[..., Edit]) -> list[Edit]:
    return [make_edit(number % 18, number // 18, number) for number in range(60)]


@pytest.fixture(scope="module")
def stored(editor: Any, editable: Base, edits: list[Edit]) -> tuple[Blobs, list[PairRef]]:
    """60 pairs in objects of 8."""
    blobs = Blobs()
    batch = prepare_batch(blobs, editor, editable, edits, {}, lambda pairs, losses: None)
    return blobs, [batch.refs[edit.edit_id] for edit in edits]


@pytest.fixture
def blobs(stored: tuple[Blobs, list[PairRef]]) -> Blobs:
    mine = Blobs()
    mine.data = dict(stored[0].data)
    return mine


@pytest.fixture
def refs(stored: tuple[Blobs, list[PairRef]]) -> list[PairRef]:
    return stored[1]


def walk(blobs: Blobs, editor: Any, steps: Sequence[tuple[Sequence[PairRef], Sequence[PairRef]]], every: int = 10) -> list[Manifest]:
    """The manifests of batches of (add, remove), one built on the other."""
    manifests = [start_manifest(editor, "b" * 64, "c" * 64)]
    for add, remove in steps:
        manifests.append(build_candidate(blobs, editor, manifests[-1], add, remove, every).manifest)
    return manifests


def test_nothing_but_named_objects_passes_on(editor: Any, blobs: Blobs, refs: list[PairRef]) -> None:
    head = start_manifest(editor, "b" * 64, "c" * 64)
    before = head.to_bytes()
    candidate = build_candidate(blobs, editor, head, refs[:3], [], 10)
    assert head.to_bytes() == before
    assert Manifest.from_bytes(candidate.manifest.to_bytes()) == candidate.manifest
    layer = candidate.manifest.layers[0]
    assert layer.artifact in blobs.data and set(layer.state.pairs_since) <= blobs.data.keys()
    pairs = read_pairs(blobs, refs[:3])
    assert pairs is not None
    assert candidate.fits.keys() == {owner for owners in pairs.owners for owner in owners}
    again = build_candidate(blobs, editor, head, refs[:3], [], 10)
    assert again.manifest.to_bytes() == candidate.manifest.to_bytes()


@pytest.mark.parametrize("every", [1, 3, 10])
def test_a_snapshot_every_n_commits(editor: Any, blobs: Blobs, refs: list[PairRef], every: int) -> None:
    manifests = walk(blobs, editor, [(refs[i : i + 2], refs[i - 2 : i - 1]) if i else (refs[:2], []) for i in range(0, 14, 2)], every)
    for number, manifest in enumerate(manifests):
        state = manifest.layers[0].state
        assert len(state.pairs_since) == number % every
        assert (state.snapshot is not None) == (number >= every)
        if number and number % every:
            assert state.snapshot == manifests[number - 1].layers[0].state.snapshot


@pytest.mark.parametrize("size", [2, 20], ids=["few", "many"])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_replayed_change_lists_are_the_state(editor: Any, blobs: Blobs, refs: list[PairRef], size: int, every: int) -> None:
    """Three batches add, and the second and third take back what the one before added first."""
    steps = [(refs[:size], []), (refs[size : 2 * size], refs[:1]), (refs[2 * size : 3 * size], refs[size : size + 2])]
    state = editor.empty_state()
    for manifest, (add, remove) in zip(walk(blobs, editor, steps, every)[1:], steps, strict=True):
        state = editor.merge(state, read_pairs(blobs, add), read_pairs(blobs, remove))
        replayed = load_state(blobs, editor, manifest.layers[0].state)
        assert replayed.count == state.count
        assert replayed.to_bytes() == state.to_bytes()
        assert load_artifacts(blobs, manifest)[0].to_bytes() == editor.solve(state).to_bytes()


def test_taking_everything_back_leaves_no_artifact(editor: Any, blobs: Blobs, refs: list[PairRef]) -> None:
    last = walk(blobs, editor, [(refs[:4], []), ([], refs[:4])])[-1]
    assert last.artifacts == []
    assert load_artifacts(blobs, last) == []
    assert load_state(blobs, editor, last.layers[0].state).count == 0


def test_the_recipe_follows_the_pairs_and_not_the_batches(editor: Any, blobs: Blobs, refs: list[PairRef]) -> None:
    whole = walk(blobs, editor, [(refs[:6], [])])[-1]
    for split in ([(refs[:1], []), (refs[1:6], [])], [([ref], []) for ref in refs[:6]]):
        assert walk(blobs, editor, split)[-1].recipe == whole.recipe
    # Nor does it follow where the pairs lie: one object each, in place of one for all.
    pairs = read_pairs(blobs, refs[:6])
    assert pairs is not None
    moved = [PairRef(pairs=blobs.put(pairs.take([row]).to_bytes()), row=0) for row in range(6)]
    assert walk(blobs, editor, [(moved, [])])[-1].recipe == whole.recipe


def test_another_way_to_the_same_edits_is_another_recipe(
    editor: Any, make: Callable[..., Any], blobs: Blobs, refs: list[PairRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [
        walk(blobs, editor, [(refs[:3], [])])[-1].recipe,
        walk(blobs, editor, [(refs[2::-1], [])])[-1].recipe,
        walk(blobs, editor, [(refs[:4], []), ([], refs[3:4])])[-1].recipe,
        walk(blobs, make(lam=2.0), [(refs[:3], [])])[-1].recipe,
    ]
    monkeypatch.setattr(D4S, "version", "2")
    recipes.append(walk(blobs, editor, [(refs[:3], [])])[-1].recipe)
    other_base, other_profile = start_manifest(editor, "d" * 64, "c" * 64), start_manifest(editor, "b" * 64, "d" * 64)
    recipes += [build_candidate(blobs, editor, head, refs[:3], [], 10).manifest.recipe for head in (other_base, other_profile)]
    assert len(set(recipes)) == len(recipes)


def test_pairs_are_read_in_the_order_asked_for(blobs: Blobs, refs: list[PairRef], edits: list[Edit]) -> None:
    wanted = [55, 3, 52, 2, 1]  # to and fro between objects
    pairs = read_pairs(blobs, [refs[row] for row in wanted])
    assert pairs is not None
    assert pairs.owners == tuple((edits[row].edit_id,) for row in wanted)
    assert read_pairs(blobs, []) is None


def test_progress_counts_the_whole_batch(editor: Any, editable: Base, edits: list[Edit]) -> None:
    calls: list[tuple[int, int]] = []
    blobs, notes = Blobs(), dict[str, StoredPair]()
    prepare_batch(blobs, editor, editable, edits[:2], {}, remember_in(notes), None)
    prepare_batch(blobs, editor, editable, edits, notes, remember_in(notes), lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[0][0] > 2 and calls[-1] == (60, 60)


def remember_in(notes: dict[str, StoredPair]) -> Callable[[str, Mapping[str, Sequence[float]]], None]:
    def remember(pairs: str, losses: Mapping[str, Sequence[float]]) -> None:
        for row, (name, left) in enumerate(losses.items()):
            notes[name] = StoredPair(ref=PairRef(pairs=pairs, row=row), losses=tuple(left))

    return remember


@pytest.mark.parametrize("fails", ["the note", "the editor"])
def test_a_retry_takes_up_what_was_stored(editor: Any, editable: Base, edits: list[Edit], fails: str) -> None:
    """The second chunk fails. The retry computes what is missing only, and ends where an undisturbed run does."""
    edits = edits[:20]
    blobs, notes, counting = Blobs(), dict[str, StoredPair](), Counting(editor)
    remember = remember_in(notes)

    def remember_once(pairs: str, losses: Mapping[str, Sequence[float]]) -> None:
        if notes and fails == "the note":
            raise OSError("no space")
        remember(pairs, losses)

    def prepare_once(base: Base, batch: Sequence[Edit], *rest: Any) -> Any:
        if notes and fails == "the editor":
            raise OSError("no power")
        return counting.prepare(base, batch, *rest)

    failing = Counting(editor)
    failing.prepare = prepare_once  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no "):
        prepare_batch(blobs, failing, editable, edits, {}, remember_once)
    assert notes.keys() == {name_pair([edit]) for edit in edits[:CHUNK]}
    counting.prepared.clear()
    retried = prepare_batch(blobs, counting, editable, edits, notes, remember)
    assert counting.prepared == [edit.edit_id for edit in edits[CHUNK:]]
    undisturbed = prepare_batch(Blobs(), editor, editable, edits, {}, lambda pairs, losses: None)
    assert retried == undisturbed
    # A third run has nothing to do at all.
    counting.prepared.clear()
    assert prepare_batch(blobs, counting, editable, edits, notes, remember) == retried
    assert counting.prepared == []


def test_a_pair_is_used_again_by_its_owner_only(editor: Any, editable: Base, edits: list[Edit]) -> None:
    """The same fact under another id gets a pair of its own: pairs say whose they are."""
    blobs, notes, counting = Blobs(), dict[str, StoredPair](), Counting(editor)
    prepare_batch(blobs, counting, editable, edits[:1], notes, remember_in(notes))
    renamed = edits[0].model_copy(update={"id": "renamed"})
    batch = prepare_batch(blobs, counting, editable, [renamed], notes, remember_in(notes))
    assert counting.prepared == [edits[0].edit_id, "renamed"]
    pairs = read_pairs(blobs, [batch.refs["renamed"]])
    assert pairs is not None and pairs.owners == (("renamed",),)


def test_refused_edits_have_no_pair_and_stop_nobody(editor: Any, editable: Base, edits: list[Edit]) -> None:
    blobs, notes = Blobs(), dict[str, StoredPair]()
    long = edits[0].model_copy(update={"id": "long", "prompt": "very " * 80 + "long home of {}"})
    batch = prepare_batch(blobs, editor, editable, [edits[1], long, edits[2]], {}, remember_in(notes))
    assert batch.refs.keys() == batch.losses.keys() == {edits[1].edit_id, edits[2].edit_id}
    assert batch.refused.keys() == {"long"}
    assert notes.keys() == {name_pair([edits[1]]), name_pair([edits[2]])}
    alone = prepare_batch(blobs, editor, editable, [long], {}, remember_in(notes))
    assert not alone.refs and alone.refused.keys() == {"long"}


def test_a_change_list_says_what_was_done(editor: Any, blobs: Blobs, refs: list[PairRef]) -> None:
    manifest = walk(blobs, editor, [(refs[:2], []), ([refs[9], refs[8], refs[3]], refs[:1])])[-1]
    first, second = (json.loads(blobs.get(digest)) for digest in manifest.layers[0].state.pairs_since)
    one, two = refs[0].pairs, refs[8].pairs
    assert first == [{"op": "add", "pairs": one, "rows": [0, 1]}]
    assert second == [
        {"op": "remove", "pairs": one, "rows": [0]},
        {"op": "add", "pairs": two, "rows": [1, 0]},
        {"op": "add", "pairs": one, "rows": [3]},
    ]


def test_a_base_of_another_digest_is_not_prepared_on(editor: Any, editable: Base, edits: list[Edit]) -> None:
    blobs = Blobs()
    with pytest.raises(BaseMismatchError):
        prepare_batch(blobs, editor, dataclasses.replace(editable, digest="0" * 64), edits[:1], {}, lambda pairs, losses: None)
    assert blobs.data == {}
